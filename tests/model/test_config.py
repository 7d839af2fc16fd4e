"""Shapes and parameter counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.errors import ConfigError
from xmoe.model.config import PRESETS, ModelConfig, preset
from xmoe.model.transformer import Transformer


def test_published_parameter_counts():
    small, large = preset("gpt_oss_20b"), preset("gpt_oss_120b")
    assert small.parameter_count() == 20_914_757_184
    assert large.parameter_count() == 116_829_156_672
    assert small.active_parameter_count() == 3_608_307_264
    assert small.active_parameter_count(input_embedding=True) == 4_187_440_704
    assert large.active_parameter_count() == 5_132_849_472
    assert large.active_parameter_count(input_embedding=True) == 5_711_982_912
    assert small.expert_parameter_count() == 24_891_840


@pytest.mark.parametrize("name", PRESETS)
def test_counts_agree_with_the_modules(name):
    with torch.device("meta"):
        model = Transformer(preset(name))
    assert sum(p.numel() for p in model.parameters()) == model.config.parameter_count()


def test_tiny_has_no_two_equal_dimensions():
    c = preset("tiny")
    sizes = [
        c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
        c.intermediate_size, 2 * c.intermediate_size, c.num_experts, c.num_experts_per_tok, c.sliding_window,
        c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim,
        (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim,
    ]  # fmt: skip
    assert len(set(sizes)) == len(sizes)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(3, 9), min_size=4, max_size=4))
def test_uneven_expert_counts_are_counted_layer_by_layer(counts):
    config = preset("tiny", num_experts=tuple(counts), reasoning_effort=None)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()
    assert [config.experts_in_layer(i) for i in range(4)] == counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 2}, "fewer than num_experts_per_tok 3"),
        ({"num_experts": (10, 9)}, "lists 2 layers; expected 4"),
        ({"num_key_value_heads": 4}, "no multiple of"),
        ({"head_dim": 13}, "expected an even number"),
        ({"layer_types": ("full_attention",)}, "expected 4"),
        ({"hidden_size": 0}, "hidden_size is 0; expected 1 to 2,147,483,647"),
        ({"num_experts": 10**30}, "num_experts is an integer of 100 bits; expected 1 to"),
        ({"num_experts": (10, 10**10, 10, 10)}, "num_experts is 10000000000; expected 1 to"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0; expected 1.001 to 1e.30"),
        ({"head_dim": -(10**5000)}, "head_dim is an integer of 16610 bits; expected 1 to"),
        ({"num_hidden_layers": 10**15}, "expected at most 10,000"),  # at once: a damaged file must not fill the memory
        ({"reasoning_effort": {"low": 11}}, "reasoning_effort"),
    ],
)
def test_contradictions_are_one_clear_line(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        preset("tiny", **changes)
    assert "\n" not in str(error.value)


def test_equal_counts_become_one_number():
    assert preset("tiny", num_experts=(10, 10, 10, 10)) == preset("tiny")
    assert isinstance(ModelConfig(**PRESETS["light"]).num_experts, int)


def test_what_some_models_have_is_allowed():
    config = preset("tiny", swiglu_limit=float("inf"), rms_norm_eps=0.0, initializer_range=0.0)
    assert config.swiglu_limit > 1e30
