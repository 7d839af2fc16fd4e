"""Layers with unlike numbers of experts: every way in which a config.json says so."""

import json

import pytest

from xmoe.checkpoint.config_writing import check_expressible, config_text
from xmoe.checkpoint.layouts import LAYOUTS
from xmoe.errors import CheckpointError, ConfigError
from xmoe.model.config import preset


def test_uneven_experts(read):
    config = preset("tiny", num_experts=(10, 8, 5, 6))
    content = json.loads(config_text(config, LAYOUTS["native"]))
    assert read(content, [10, 8, 5, 6])[0] == config
    with pytest.raises(CheckpointError, match=r"8 experts in layer 1 .* have 7 rows"):
        read(content, [10, 7, 5, 6])
    with pytest.raises(ConfigError, match="5 to 10 experts"):
        check_expressible(config, LAYOUTS["hf-bf16"])


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
def test_expert_counts_by_layer(gpt_oss, read, changes):
    config, extra = read(gpt_oss(**changes), [32, 20])
    assert config.num_experts == (32, 20) and config.num_experts_per_tok == 4
    assert "per_layer_config" not in extra and "block_configs" not in extra, "they would contradict the next cut"
    if changes != {"num_local_experts": None}:
        with pytest.raises(CheckpointError, match=r"20 experts in layer 1 .* have 16 rows"):
            read(gpt_oss(**changes), [32, 16])


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
def test_layers_that_differ_in_more_than_experts_are_refused(gpt_oss, read, changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(gpt_oss(**changes), [32, 20])
    assert "\n" not in str(caught.value)
