"""The experts of one layer, forward and backward, dense or packed: what `dispatch.experts` runs on CUDA.

What the backward pass needs is kept, no more: x [T, D] and the pre-activation [T*K, 2F], 2 T D + 4 T K F bytes in bf16
(SonicMoE, arXiv 2512.14080). The output of down is not among them: with y = sum over slots of s (a W2^T + b2), the
gradient of s is <dy W2, a> + <dy, b2>, and dy W2 is needed anyway; a is made again from the pre-activation.
Packed experts stay frozen: gradients go through them to x and to the routing weights, so adapters can train on them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xmoe.kernels.cuda import tiles
from xmoe.kernels.cuda.gemm import grouped_gate_up, grouped_rows, grouped_sum, grouped_weight, swiglu_backward
from xmoe.kernels.cuda.mxfp4 import packed_down, packed_gate_up, packed_input_gradient, packed_linear
from xmoe.kernels.cuda.norm import Experts, combine, sum_slots
from xmoe.kernels.cuda.repack import Repacked
from xmoe.kernels.cuda.routing import SortedRows, sort_rows

Weight = Tensor | Repacked


def tile_height(count: int, num_experts: int, weight: Weight, device: torch.device) -> int:
    """Rows a tile for `count` slots over E experts, by what the first product will ask for."""
    kernel = "mxfp4_gate_up" if isinstance(weight, Repacked) else "grouped_gate_up"
    return tiles.tile(kernel, -(-count // num_experts), device)["BM"]


def sort_for(indices: Tensor, num_experts: int, weight: Weight) -> SortedRows:
    """Sort the slots, with the tile map that the first product with `weight` will ask for."""
    return sort_rows(indices, num_experts, tile_height(indices.numel(), num_experts, weight, indices.device))


def expert_parts(
    x: Tensor,
    rows: SortedRows,
    gate_up: Weight,
    gate_up_bias: Tensor,
    down: Weight,
    down_bias: Tensor,
    *,
    limit: float,
    alpha: float,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """x [T, D] through both products -> (partial sums [S, T*K, D] in the order of slots, not yet weighed; pre-activation).

    The pre-activation [T*K, 2F], rows sorted by expert, is None without `keep`.
    """
    gated = packed_gate_up if isinstance(gate_up, Repacked) else grouped_gate_up
    active, before = gated(x, rows, gate_up, gate_up_bias, limit=limit, alpha=alpha, keep=keep)
    if isinstance(down, Repacked):
        wide = x.dtype == torch.float32
        dtype = x.dtype if wide else torch.float16 if down.exact else torch.bfloat16
        return packed_down(active.to(dtype), rows, down, down_bias), before
    return grouped_rows(active.to(down.dtype), rows, down, down_bias, scatter=True).unsqueeze(0), before


def experts_forward(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Weight,
    gate_up_bias: Tensor,
    down: Weight,
    down_bias: Tensor,
    *,
    limit: float,
    alpha: float,
    norms: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, SortedRows]:
    """As :func:`xmoe.kernels.reference.experts`, weights dense or :class:`Repacked` -> (y, norms, pre-activation, rows)."""
    rows = sort_for(indices, gate_up_bias.shape[0], gate_up)
    biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    partial, before = expert_parts(x, rows, gate_up=gate_up, down=down, **biases, limit=limit, alpha=alpha, keep=keep)
    y, lengths = combine(Experts(partial, indices, weights), x.dtype, norms=norms)
    return y, lengths, before, rows


def input_gradient(dy: Tensor, rows: SortedRows, weight: Weight, **how: bool) -> Tensor:
    """dy W over sorted rows, whatever W is."""
    if isinstance(weight, Repacked):
        return packed_input_gradient(dy, rows, weight, **how)
    return grouped_rows(dy, rows, weight, transposed=True, **how)


class ExpertsFunction(torch.autograd.Function):
    """:func:`experts_forward` with the backward pass described at the top of this file."""

    @staticmethod
    def forward(ctx, x, weights, gate_up, gate_up_bias, down, down_bias, indices, limit, alpha, norms):
        y, lengths, before, rows = experts_forward(
            x,
            indices,
            weights,
            gate_up,
            gate_up_bias,
            down,
            down_bias,
            limit=limit,
            alpha=alpha,
            norms=norms,
            keep=True,
        )
        dense = [w for w in (gate_up, down) if isinstance(w, Tensor)]
        ctx.save_for_backward(x, weights, indices, before, rows.order, rows.offsets, gate_up_bias, down_bias, *dense)
        ctx.packed = [None if isinstance(w, Tensor) else w for w in (gate_up, down)]
        ctx.tile_maps, ctx.limit, ctx.alpha = rows.tile_maps, limit, alpha
        if lengths is not None:
            ctx.mark_non_differentiable(lengths)
        return y, lengths

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        x, weights, indices, before, order, offsets, gate_up_bias, down_bias, *dense = ctx.saved_tensors
        dense = iter(dense)
        gate_up, down = (next(dense) if packed is None else packed for packed in ctx.packed)
        rows = SortedRows(order, offsets, indices.shape[-1], ctx.tile_maps)
        need_x, need_weights, need_up, need_up_bias, need_down, need_down_bias = ctx.needs_input_grad[:6]
        dy = dy.to(x.dtype).contiguous()

        d_active = input_gradient(dy, rows, down, gather=True)
        d_before, scaled, d_weights = swiglu_backward(d_active, before, weights, rows, limit=ctx.limit, alpha=ctx.alpha)
        del d_active
        d_down = d_down_bias = d_up = d_up_bias = dx = None
        if need_weights:
            biased = (dy.float() @ down_bias.float().T).gather(1, indices.clamp(min=0))
            d_weights = (d_weights + biased.masked_fill(indices < 0, 0.0)).to(weights.dtype)
        if need_down:
            d_down = grouped_weight(dy, scaled, rows, down.dtype, gather_left=True)
        if need_down_bias:
            d_down_bias = grouped_sum(dy, rows, down_bias.dtype, weights=weights, gather=True)
        if need_up:
            d_up = grouped_weight(d_before, x, rows, gate_up.dtype, gather_right=True)
        if need_up_bias:
            d_up_bias = grouped_sum(d_before, rows, gate_up_bias.dtype)
        if need_x:
            dx = sum_slots(input_gradient(d_before, rows, gate_up, scatter=True), indices)
        d_weights = d_weights if need_weights else None
        return dx, d_weights, d_up, d_up_bias, d_down, d_down_bias, None, None, None, None


class ExpertLinearFunction(torch.autograd.Function):
    """x W^T + b over rows sorted by expert, differentiable in all that is dense."""

    @staticmethod
    def forward(ctx, x, weight, bias, rows):
        ctx.rows, ctx.packed = rows, weight if isinstance(weight, Repacked) else None
        ctx.save_for_backward(x, *([] if ctx.packed else [weight]))
        ctx.bias_dtype = bias.dtype
        if ctx.packed:
            return packed_linear(x, rows, weight, bias).to(x.dtype)
        return grouped_rows(x, rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *dense = ctx.saved_tensors
        weight = ctx.packed or dense[0]
        dy = dy.contiguous()
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = input_gradient(dy, ctx.rows, weight) if need_x else None
        d_weight = grouped_weight(dy, x, ctx.rows, weight.dtype) if need_weight else None
        d_bias = grouped_sum(dy, ctx.rows, ctx.bias_dtype) if need_bias else None
        return dx, d_weight, d_bias, None
