"""config.json: both published files byte for byte, and every spelling that is about."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.checkpoint import config_files
from xmoe.checkpoint.config_files import config_text, generation_text, read_config, to_model_config
from xmoe.checkpoint.layouts import LAYOUTS
from xmoe.errors import CheckpointError, ConfigError
from xmoe.model.config import FULL, PRESETS, SLIDING, preset


def read(content: dict, experts: list[int] | None = None, folder="config"):
    from pathlib import Path

    layers = content["num_hidden_layers"]
    return to_model_config(content, experts or [content.get("num_local_experts", 8)] * layers, Path(folder))


@pytest.mark.parametrize(
    ("name", "size", "sha256"),
    [
        ("gpt_oss_20b", 1806, "3a2a26ded679375b7928ddeca59764df7cea83220c1961035f6d6e232659e9ce"),
        ("gpt_oss_120b", 2089, "933aeb666a3fd851133ddd7686414f369bc564c4185fb5704416550879f10566"),
    ],
)
def test_the_published_files(name, size, sha256):
    config = preset(name)
    text = config_text(config, LAYOUTS["hf-mxfp4"]).encode()
    assert len(text) == size
    assert hashlib.sha256(text).hexdigest() == sha256
    again, extra = read(json.loads(text))
    assert again == config
    assert config_text(again, LAYOUTS["hf-mxfp4"], extra).encode() == text


def test_the_published_generation_config():
    text = generation_text(preset("gpt_oss_20b"))
    assert len(text) == 177
    assert json.loads(text)["eos_token_id"] == [200002, 199999, 200012]
    assert generation_text(preset("tiny")) is None
    assert json.loads(generation_text(preset("tiny"), {"eos_token_id": 7}))["eos_token_id"] == 7


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_preset_through_every_layout(name, layout):
    config = preset(name)
    if layout != "native":
        import dataclasses

        config = dataclasses.replace(config, tie_word_embeddings=False)
        if layout == "openai":  # it has no words for these two
            config = dataclasses.replace(config, reasoning_effort=None, initializer_range=0.02)
    content = json.loads(config_text(config, LAYOUTS[layout], {"kept": [1]}))
    layers = config.num_hidden_layers
    again, extra = to_model_config(content, [config.num_experts] * layers, "config.json")
    assert again == config
    assert extra["kept"] == [1]


def old(**changes) -> dict:
    content = json.loads(config_text(preset("gpt_oss_20b", num_hidden_layers=2), LAYOUTS["hf-mxfp4"])) | changes
    return {k: v for k, v in content.items() if v is not None}


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
def test_other_spellings_of_the_same_model(changes):
    content = old(**changes)
    assert read(content, [32, 32])[0] == read(old())[0]


def test_plain_rope_and_unusual_yarn():
    plain = read(old(rope_scaling={"rope_type": "default"}))[0]
    assert plain.rope_scaling_factor == 1.0 and plain.rope_theta == 150000
    other = read(old(rope_scaling={**NEW_ROPE, "factor": 8.0, "beta_fast": 16.0, "rope_theta": 10000.0}))[0]
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
def test_configs_that_cannot_be_followed(changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(old(**changes), [32, 32])
    assert "\n" not in str(caught.value)


def test_uneven_experts():
    config = preset("tiny", num_experts=(10, 8, 5, 6))
    content = json.loads(config_text(config, LAYOUTS["native"]))
    assert read(content, [10, 8, 5, 6])[0] == config
    with pytest.raises(CheckpointError, match=r"8 experts in layer 1 .* have 7 rows"):
        read(content, [10, 7, 5, 6])
    with pytest.raises(ConfigError, match="5 to 10 experts"):
        config_files.check_expressible(config, LAYOUTS["hf-bf16"])


def block(experts: int, **changes) -> dict:
    """One entry of `block_configs`, as NVIDIA's Puzzle writes it for GPT-OSS; `changes` go to the ffn."""
    moe = {"num_local_experts": experts, "num_experts_per_tok": 4, "expert_intermediate_dim": 2880,
           "shared_expert_intermediate_dim": 8192}  # fmt: skip
    parts = {"no_op": False, "replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"}
    attention = {**parts, "num_key_value_heads": 8, "llama4": None, "mamba": None}
    return {"attention": attention, "ffn": {**parts, "moe": moe, "intermediate_size": None, **changes}}


@pytest.mark.parametrize(
    "changes",
    [
        {"per_layer_config": {"1": {"num_local_experts": 20}}},
        {"per_layer_config": {"0": {"num_experts": 32, "head_dim": 64}, "1": {"num_experts": 20}}},
        {"per_layer_config": {"0": {"num_experts": 32}, "1": {"num_experts": 20}}, "num_local_experts": None},
        {"block_configs": [block(32), block(20)]},
        {"num_local_experts": [32, 20]},
        {"num_local_experts": None},  # nothing is said, so the weights alone decide
    ],
)
def test_expert_counts_by_layer(changes):
    config, extra = read(old(**changes), [32, 20])
    assert config.num_experts == (32, 20) and config.num_experts_per_tok == 4
    assert "per_layer_config" not in extra and "block_configs" not in extra, "they would contradict the next cut"
    if changes != {"num_local_experts": None}:
        with pytest.raises(CheckpointError, match=r"20 experts in layer 1 .* have 16 rows"):
            read(old(**changes), [32, 16])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_layer_config": {"1": {"sliding_window": 64}}}, "layer 1 sliding_window '64'; only the number of experts"),
        ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, "layer 1 skip"),
        ({"per_layer_config": {"2": {"num_local_experts": 16}}}, "no sense for layer 2 of 2"),
        ({"per_layer_config": {"one": {"num_local_experts": 16}}}, "no sense for layer -1"),
        ({"per_layer_config": {"1": 16}}, "no sense for layer 1"),
        ({"per_layer_config": [16]}, "expected per_layer_config as an object"),
        ({"per_layer_config": {"1": {"num_local_experts": "16"}}}, "says '16' experts in layer 1"),
        ({"per_layer_config": {"1": {"num_experts": 16}}, "block_configs": [block(32), block(20)]}, "'20' experts in layer 1"),
        ({"block_configs": [block(32)]}, "block_configs as a list of 2"),
        ({"block_configs": [block(32), block(20, no_op=True)]}, "layer 1 no_op 'True'"),
        ({"block_configs": [block(32), block(20, moe=None)]}, "no ffn.moe in layer 1"),
        ({"block_configs": [block(32), "block"]}, "no ffn.moe in layer 1"),
    ],
)  # fmt: skip
def test_layers_that_differ_in_more_than_experts_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(old(**changes), [32, 20])
    assert "\n" not in str(caught.value)


def test_the_end_of_generation(tmp_path):
    assert config_files.end_tokens(tmp_path, {}) == frozenset()
    assert config_files.end_tokens(tmp_path, {"eos_token_id": 7}) == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [200002, 199999]}')
    assert config_files.end_tokens(tmp_path, {"eos_token_id": 7}) == {200002, 199999}


def test_what_a_layout_cannot_say():
    openai = LAYOUTS["openai"]
    for changes in ({"rms_norm_eps": 1e-6}, {"layer_types": (FULL, SLIDING) * 2}):
        with pytest.raises(ConfigError, match="openai layout fixes"):
            config_files.check_expressible(preset("tiny", **changes), openai)
    with pytest.raises(ConfigError, match="max_position_embeddings is 500"):
        config_files.check_expressible(preset("tiny", max_position_embeddings=500), openai)
    with pytest.raises(ConfigError, match="multiple of 32"):
        config_files.check_expressible(preset("tiny", intermediate_size=80), LAYOUTS["hf-mxfp4"])


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


ANY = st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=3)
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
            to_model_config(content, [10] * 4, "config.json")
    except CheckpointError as e:
        assert "\n" not in str(e)
