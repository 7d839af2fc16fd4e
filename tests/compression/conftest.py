"""A small model with unequal dimensions, and text for it."""

from __future__ import annotations

import pytest
import torch

from xmoe.model.config import ModelConfig
from xmoe.quantization.packed import PackedWeight

SHAPE = {
    "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 10, "intermediate_size": 64, "num_experts": 7, "num_experts_per_tok": 3, "sliding_window": 5,
    "max_position_embeddings": 64, "initial_context_length": 16, "rope_scaling_factor": 4.0,
}  # fmt: skip


@pytest.fixture
def config():
    """changes -> a ModelConfig of three layers with seven experts, three a token."""
    return lambda **changes: ModelConfig(**{**SHAPE, **changes})


@pytest.fixture
def model(random_model, config):
    """A random model of :data:`SHAPE`."""
    return random_model(config())


@pytest.fixture
def tokens():
    """int64 [6, 11]"""
    return torch.randint(0, SHAPE["vocab_size"], (6, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pack():
    """model -> the same model, its experts packed in MXFP4 (in place)."""

    def packed(model):
        for block in model.blocks:
            for name in ("gate_up", "down"):
                block.moe.experts.pack(name, PackedWeight.encode(getattr(block.moe.experts, name).data))
        return model

    return packed
