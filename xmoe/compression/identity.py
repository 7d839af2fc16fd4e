"""Which model is this? A short hash that statistics and plans carry, so that they are not used on another model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from xmoe.model.config import ModelConfig
from xmoe.model.transformer import Transformer

# Small tensors that every layout stores alike, and that any training changes.
_WITNESSES = ("moe_norm.weight", "moe.router.weight", "moe.router.bias", "moe.experts.down_bias")


def model_hash(model: Transformer) -> str:
    """sha256 (16 hex digits) over shape, routers, expert biases and norms.

    They are rounded to bfloat16 first, so a model has one hash in every layout, in every compute type, and whether its
    experts are packed or not.
    """
    return hash_of(model.config, model.get_parameter)


def hash_of(config: ModelConfig, tensor: Callable[[str], Tensor]) -> str:
    """As :func:`model_hash` for weights that are elsewhere: `tensor` returns one by its native name."""
    digest = hashlib.sha256(f"{config.num_hidden_layers} {config.hidden_size} {config.intermediate_size}".encode())
    for layer in range(config.num_hidden_layers):
        for name in _WITNESSES:
            rounded = tensor(f"blocks.{layer}.{name}").detach().to("cpu", torch.bfloat16)
            digest.update(rounded.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
