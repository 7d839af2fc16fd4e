"""Packed MXFP4 experts in C on the CPU: the bytes are read once, as they lie in the checkpoint, mapped or not.

For few tokens one call does it all: values are looked up in registers while the bytes stream past, activations in
bfloat16 (or float32, as x is), sums in float32. For many, and where a gradient is wanted, the rows are sorted by expert
and every product decodes its weight piece by piece into the first cache. Neither ever holds an expert decoded.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from xmoe.kernels.adapter import Adapter
from xmoe.kernels.cpu import backend as cpu
from xmoe.kernels.cpu.library import run
from xmoe.quantization.packed import PackedWeight

FEW = 768
"""Up to so many (token, expert) pairs, reading an expert's rows once for each 4 tokens is faster (24 a 20B expert).

A number of pairs, not of pairs an expert: the two paths round differently, and a model whose experts are masked must
take the path that the smaller, pruned one takes, to give the same bits.
"""


def takes(gate_up: Tensor | PackedWeight, down: Tensor | PackedWeight) -> bool:
    """Whether both are MXFP4 weights as the kernels read them; another format, or only one of them packed, is not."""
    return sys.byteorder == "little" and all(
        isinstance(w, PackedWeight) and w.format == "mxfp4" and w.blocks.is_contiguous() and w.scales.is_contiguous()
        for w in (gate_up, down)
    )


def describe() -> str:
    """How packed experts are computed where the C kernels serve."""
    return "MXFP4 experts: decoded in registers, packed bytes read once; int8 and int4 experts: decoded piece by piece"


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: PackedWeight,
    gate_up_bias: Tensor,
    down: PackedWeight,
    down_bias: Tensor,
    *,
    limit: float = 7.0,
    alpha: float = 1.702,
    norms: bool = False,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`xmoe.kernels.reference.experts`. Differentiable in x, the routing weights, the biases and the adapters."""
    E, D, F = down.shape
    adapters = {"gate_up_adapter": gate_up_adapter, "down_adapter": down_adapter}
    inputs = (x, weights, gate_up_bias, down_bias, *(t for low in adapters.values() if low for t in (low.a, low.b)))
    if indices.numel() > FEW or (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        both = {"limit": limit, "alpha": alpha, "norms": norms, **adapters}
        return cpu.experts(x, indices, weights, gate_up, gate_up_bias, down, down_bias, **both)
    dtype, (T, K) = cpu.compute_dtype(x), indices.shape
    x, indices, weights = x.to(dtype).contiguous(), indices.contiguous(), weights.float().contiguous()
    biases = [b.contiguous() for b in (gate_up_bias, down_bias)]
    if any(b.dtype != torch.bfloat16 for b in biases):
        biases = [b.float() for b in biases]
    y = torch.empty_like(x)
    lengths = torch.empty(T, K, dtype=torch.float32) if norms else None
    run(
        "packed_experts", dtype, x, indices, weights, gate_up.blocks, gate_up.scales, biases[0],
        down.blocks, down.scales, biases[1], biases[0].dtype == torch.float32, y, lengths, T, K, E, D, F, limit, alpha,
        *_as_floats(gate_up_adapter), *_as_floats(down_adapter),
    )  # fmt: skip
    return y, lengths


def _as_floats(adapter: Adapter | None) -> tuple[Tensor | None, Tensor | None, int, float]:
    """a, b, rank and scale as the kernel takes them."""
    if adapter is None:
        return None, None, 0, 0.0
    return adapter.a.float().contiguous(), adapter.b.float().contiguous(), adapter.rank, adapter.scale
