"""Grouped-query attention: one fused projection for q, k and v, rotary positions, learned sinks, window or full."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from xmoe.kernels import dispatch
from xmoe.model.adapter import LoRA
from xmoe.model.config import ModelConfig
from xmoe.quantization.packed import PackedWeight


class Cache(Protocol):
    """What attention asks of a key-value cache; `xmoe.generation.cache` has one."""

    length: int

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take in k, v [B, S, G, Dh] at positions [B, S]; give back all that is visible, with positions [B, L]."""

    def advance(self, count: int) -> None:
        """All layers have taken in `count` tokens."""


class Linear(nn.Module):
    """weight [out, in], or packed [1, out, in], and bias [out] or None; the product itself is the kernels' business."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight: nn.Parameter | PackedWeight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter: LoRA | None = None

    def pack(self, name: str, weight: PackedWeight) -> None:
        """Put a packed weight [1, out, in] in the place of the dense parameter `name` ("weight")."""
        delattr(self, name)
        setattr(self, name, weight)

    def forward(self, x: Tensor) -> Tensor:
        y = dispatch.linear(x, self.weight, self.bias)
        return y if self.adapter is None else y + self.adapter(x)


class Attention(nn.Module):
    """Causal attention of one layer; sliding where the layer's type says so.

    Rows of `qkv.weight` are H query heads, then G key heads, then G value heads, Dh rows each.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        H, G, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.window = layer, config.window(layer)
        self.heads, self.kv_heads, self.head_dim = H, G, Dh
        self.qkv = Linear(config.hidden_size, (H + 2 * G) * Dh)
        self.out = Linear(H * Dh, config.hidden_size)
        self.sinks = nn.Parameter(torch.empty(H))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, cache: Cache | None) -> Tensor:
        """x [B, S, D] -> [B, S, D]. positions [B, S] or None (0 .. S-1, no cache); cos, sin [1 or B, S, Dh/2]."""
        B, S, _ = x.shape
        H, G = self.heads, self.kv_heads
        # split, not slices: its gradient is one concatenation, where each slice would fill a tensor of zeros.
        qk, v = self.qkv(x).view(B, S, H + 2 * G, self.head_dim).split([H + G, G], dim=2)
        q, k = dispatch.rope(qk, cos, sin).split([H, G], dim=2)
        k_pos = positions
        if cache is not None:
            k, v, k_pos = cache.update(self.layer, k, v, positions)
        mixed = dispatch.attention(q, k, v, self.sinks, window=self.window, q_pos=positions, k_pos=k_pos)
        return self.out(mixed.reshape(B, S, H * self.head_dim))
