"""Rotary position embedding with YaRN scaling: positions -> cos and sin tables.

RoPE: arXiv 2104.09864. YaRN: arXiv 2309.00071, in GPT-OSS's variant, whose correction bounds are not rounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xmoe.model.config import ModelConfig


def yarn_bounds(config: ModelConfig) -> tuple[float, float]:
    """Pairs below the first bound keep their frequency, pairs above the second are slowed by the factor, not rounded.

    bound(beta) = Dh/2 * ln(context / (2 pi beta)) / ln(theta): the pair that turns beta times within the context.
    """

    def bound(beta: float) -> float:
        turns = math.log(config.initial_context_length / (beta * 2 * math.pi))
        return config.head_dim / 2 * turns / math.log(config.rope_theta)

    return max(bound(config.rope_beta_fast), 0.0), min(bound(config.rope_beta_slow), config.head_dim - 1.0)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """fp32 [Dh/2]: radians a position turns each pair by; a blend of plain and stretched frequencies under YaRN."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    plain = 1.0 / float(config.rope_theta) ** exponent
    factor = float(config.rope_scaling_factor)
    if factor <= 1.0:
        return plain
    low, high = yarn_bounds(config)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    pair = torch.arange(config.head_dim // 2, dtype=torch.float32, device="cpu")
    keep = 1.0 - ((pair - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - keep) * plain / factor + keep * plain


def concentration(config: ModelConfig) -> float:
    """What cos and sin are multiplied by under YaRN: 0.1 ln(factor) + 1; it sharpens q.k by its square."""
    factor = config.rope_scaling_factor
    return 1.0 if factor <= 1.0 else 0.1 * math.log(factor) + 1.0


def rope_tables(positions: Tensor, inverse: Tensor, concentration: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [B, S, Dh/2], for int64 positions [B, S]. Padding (-1) gets the angles of position 0."""
    angles = positions.clamp(min=0).unsqueeze(-1).float() * inverse
    return angles.cos() * concentration, angles.sin() * concentration
