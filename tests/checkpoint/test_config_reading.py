"""config.json as others write it: every spelling that is about, and what cannot be followed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.checkpoint.config_reading import end_tokens, read_config, to_model_config
from xmoe.checkpoint.config_writing import config_text
from xmoe.checkpoint.layouts import LAYOUTS
from xmoe.errors import CheckpointError
from xmoe.model.config import FULL, SLIDING, preset
from xmoe.model.rope import concentration, inverse_frequencies

NEW_ROPE = {
    "rope_theta": 150000.0, "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 4096, "truncate": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": NEW_ROPE},
        {"rope_scaling": None, "rope_parameters": {SLIDING: NEW_ROPE, FULL: NEW_ROPE}},
        {"rope_scaling": {**NEW_ROPE, "rope_type": None, "type": "yarn"}},
        {"rope_scaling": None},  # transformers assumes the published values
        {"num_local_experts": None, "num_experts": 32},
        {"experts_per_token": None},
        {"num_experts_per_tok": None},
        {"swiglu_limit": None, "head_dim": 64, "layer_types": None, "initial_context_length": None},
        {"dtype": "bfloat16", "bos_token_id": 199998},
    ],
)
def test_other_spellings_of_the_same_model(gpt_oss, read, changes):
    content = gpt_oss(**changes)
    assert read(content, [32, 32])[0] == read(gpt_oss())[0]


def test_plain_rope_and_unusual_yarn(gpt_oss, read):
    plain = read(gpt_oss(rope_scaling={"rope_type": "default"}))[0]
    assert plain.rope_scaling_factor == 1.0 and plain.rope_theta == 150000
    other = read(gpt_oss(rope_scaling={**NEW_ROPE, "factor": 8.0, "beta_fast": 16.0, "rope_theta": 10000.0}))[0]
    assert (other.rope_scaling_factor, other.rope_beta_fast, other.rope_theta) == (8.0, 16.0, 10000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {**NEW_ROPE, "truncate": True}}, "truncate"),
        ({"rope_scaling": {**NEW_ROPE, "attention_factor": 1.0}}, "attention_factor"),
        ({"rope_scaling": {**NEW_ROPE, "rope_type": "llama3"}}, "'llama3'"),
        ({"rope_scaling": {SLIDING: NEW_ROPE, FULL: {"rope_type": "default"}}}, "differ by layer type"),
        ({"rope_scaling": "yarn"}, "expected an object"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha"),
        ({"attention_bias": False}, "attention_bias"),
        ({"experts_per_token": 2}, "contradicts itself: num_experts_per_tok '4', experts_per_token '2'"),
        ({"num_experts": 8}, "contradicts itself"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "2880"}, "expected a whole number"),
        ({"hidden_size": True}, "expected a whole number"),
        ({"rms_norm_eps": "small"}, "expected a number"),
        ({"layer_types": ["full", "full"]}, "layer_types"),
        ({"layer_types": 3}, "expected a list"),
        ({"num_key_value_heads": 7}, "no multiple"),
        ({"num_experts_per_tok": 64, "experts_per_token": 64}, "fewer than num_experts_per_tok"),
        ({"reasoning_effort": {"low": "one"}}, "reasoning_effort"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
    ],
)
def test_configs_that_cannot_be_followed(gpt_oss, read, changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(gpt_oss(**changes), [32, 32])
    assert "\n" not in str(caught.value)


def test_the_end_of_generation(tmp_path):
    assert end_tokens(tmp_path, {}) == frozenset()
    assert end_tokens(tmp_path, {"eos_token_id": 7}) == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [200002, 199999]}')
    assert end_tokens(tmp_path, {"eos_token_id": 7}) == {200002, 199999}


def test_files_that_are_no_config(tmp_path):
    for text, message in (
        ("{", "is no JSON"),
        ("[]", "no JSON object"),
        ("{}", "no model_type"),
        ('{"model_type": 3}', "3"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_config(tmp_path)


@pytest.mark.parametrize(
    ("layout", "key", "value", "message"),
    [
        ("openai", "rope_scaling_factor", 1e306, "max_position_embeddings is 2147483648; expected 1 to"),
        ("openai", "rope_theta", 1, "rope_theta is 1.0; expected 1.001"),
        ("native", "rms_norm_eps", -1e-5, "rms_norm_eps is -1e-05; expected 0 to"),
        (
            "hf-mxfp4",
            "sliding_window",
            2**64,
            "sliding_window is '18446744073709551616'; expected a whole number of 18 digits",
        ),
        ("hf-mxfp4", "swiglu_limit", 10**400, "swiglu_limit is '1000.*; expected a number"),
        ("native", "num_hidden_layers", 10**12, "at most 10,000"),
        ("native", "head_dim", 10**300, "head_dim is an integer of 997 bits"),
    ],
)
def test_absurd_numbers(layout, key, value, message):
    content = json.loads(config_text(preset("tiny", tie_word_embeddings=False), LAYOUTS[layout]))
    with pytest.raises(CheckpointError, match=message) as caught:
        to_model_config(content | {key: value}, [10] * 4, "config.json")
    assert "\n" not in str(caught.value)


ANY = st.none() | st.booleans() | st.integers(-5, 2**70) | st.just(10**400) | st.floats() | st.text(max_size=3)
ANY = ANY | st.lists(ANY, max_size=3) | st.dictionaries(st.text(max_size=3), ANY, max_size=2)


@given(st.sampled_from(["hf-mxfp4", "native", "openai"]), st.data())
@settings(max_examples=200, deadline=None)
def test_any_value_anywhere_is_understood_or_refused(layout, data):
    content = json.loads(config_text(preset("tiny", tie_word_embeddings=False), LAYOUTS[layout]))
    key = data.draw(st.sampled_from(sorted(content)))
    if isinstance(content[key], dict) and data.draw(st.booleans()):
        content[key] |= {data.draw(st.sampled_from(sorted(content[key]))): data.draw(ANY)}
    else:
        content[key] = data.draw(ANY)
    try:
        if content.get("model_type") in (None, "xmoe", "gpt_oss"):
            config, _ = to_model_config(content, [10] * 4, "config.json")
            if config.head_dim < 10_000:
                assert inverse_frequencies(config).isfinite().all() and concentration(config) >= 1
    except CheckpointError as e:
        assert "\n" not in str(e) and len(str(e)) < 500
