"""Settings: values, and clear words about impossible ones. What they do is tested in test_generate.py."""

from __future__ import annotations

import pytest

from xmoe.errors import ConfigError
from xmoe.generation.settings import GenerationConfig, experts_per_token, read_settings
from xmoe.model.config import preset


def test_effort_without_a_table_says_what_to_do():
    with pytest.raises(ConfigError, match="set num_experts_per_tok"):
        experts_per_token(preset("gpt_oss_20b"), reasoning_effort="low")


def test_experts_are_bounded_by_the_poorest_layer():
    config = preset("tiny", num_experts=(10, 4, 6, 5), reasoning_effort=None)
    assert experts_per_token(config, 4) == 4
    with pytest.raises(ConfigError, match="4 experts a layer"):
        experts_per_token(config, 5)


def test_settings_are_values():
    assert GenerationConfig(stop="x").stop == ("x",)
    assert GenerationConfig(stop_tokens=[1, 1, 2]).stop_tokens == {1, 2}


def test_keywords_are_sorted_and_unknown_ones_refused():
    generation, sampling = read_settings({"max_new_tokens": 5, "top_k": 3})
    assert (generation.max_new_tokens, sampling.top_k) == (5, 3)
    with pytest.raises(ConfigError, match=r"unknown setting 'top_n'; known: .*top_k"):
        read_settings({"top_n": 3})
