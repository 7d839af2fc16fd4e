"""What happens between two layers, in one pass over a token: add up, round once, and norm.

A block's second half leaves fp32 partial sums of K experts; :func:`combine` weighs and adds them in a fixed order, so
results repeat bit for bit, without atomics. :func:`add_and_norm` does the same on the way into the next RMSNorm: residual
plus whatever came (partial sums of experts or the output of attention), the new residual and its norm in one launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from xmoe.kernels.cuda.launch import launch


@triton.jit
def token_kernel(
    residual,
    delta,
    partial,
    weights,
    indices,
    total,
    lengths,
    norm_weight,
    normed,
    half,
    inverse,
    D,
    slots,
    eps,
    SPLITS: tl.constexpr,
    K: tl.constexpr,
    BD: tl.constexpr,
):
    """One token: residual + delta + weighted experts -> total (and expert lengths); total normed -> normed and half.

    Every pointer may be None: what is absent is left out.
    """
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    ok = d < D
    at = token * D + d
    value = tl.zeros((BD,), tl.float32)
    if residual is not None:
        value += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    if delta is not None:
        value += tl.load(delta + at, mask=ok, other=0.0).to(tl.float32)
    if partial is not None:
        for k in tl.static_range(K):
            slot = token * K + k
            present = d < tl.where(tl.load(indices + slot) >= 0, D, 0)
            expert = tl.zeros((BD,), tl.float32)
            for split in tl.static_range(SPLITS):
                at_partial = partial + (split * slots + slot) * D + d
                expert += tl.load(at_partial, mask=present, other=0.0).to(tl.float32)
            if lengths is not None:
                tl.store(lengths + slot, tl.sqrt(tl.sum(expert * expert, 0)))
            if weights is not None:
                # An unused slot contributes nothing, whatever its weight is.
                expert *= tl.where(tl.load(indices + slot) >= 0, tl.load(weights + slot), 0.0)
            value += expert
    if total is not None:
        value = value.to(total.dtype.element_ty).to(tl.float32)
        tl.store(total + at, value.to(total.dtype.element_ty), mask=ok)
    if normed is not None:
        scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
        scaled = value * scale * tl.load(norm_weight + d, mask=ok, other=0.0).to(tl.float32)
        tl.store(normed + at, scaled.to(normed.dtype.element_ty), mask=ok)
        if half is not None:
            tl.store(half + at, scaled.to(half.dtype.element_ty), mask=ok)
        if inverse is not None:
            tl.store(inverse + token, scale)


@triton.jit
def norm_backward_kernel(x, weight, inverse, dy, dx, dweight, T, D, eps, rows_each, BD: tl.constexpr):
    """`rows_each` tokens: dx, and this program's share of the weight's gradient, dweight [programs, D] in fp32."""
    d = tl.arange(0, BD)
    ok = d < D
    w = tl.load(weight + d, mask=ok, other=0.0).to(tl.float32)
    share = tl.zeros((BD,), tl.float32)
    begin = tl.program_id(0) * rows_each
    for token in range(begin, tl.minimum(begin + rows_each, T)):
        at = tl.cast(token, tl.int64) * D + d
        value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        gradient = tl.load(dy + at, mask=ok, other=0.0).to(tl.float32)
        scale = tl.load(inverse + token)
        unit = value * scale
        share += gradient * unit
        gradient *= w
        # d/dx of x * r(x), with r = (mean x^2 + eps)^-1/2
        through = scale * (gradient - unit * (tl.sum(gradient * unit, 0) / D))
        tl.store(dx + at, through.to(dx.dtype.element_ty), mask=ok)
    tl.store(dweight + tl.program_id(0) * D + d, share, mask=ok)


class Normed(NamedTuple):
    """total: residual and all that was added, [T, D]. normed: its RMSNorm. half: the same in fp16, or None."""

    total: Tensor
    normed: Tensor
    half: Tensor | None


class Experts(NamedTuple):
    """What expert kernels leave: partial fp32 [S, T*K, D], indices int64 [T, K], weights fp32 [T, K]."""

    partial: Tensor
    indices: Tensor
    weights: Tensor


def _run(T: int, D: int, **arguments) -> None:
    block = triton.next_power_of_2(D)
    names = "residual delta partial weights indices total lengths norm_weight normed half inverse"
    given = dict.fromkeys(names.split()) | {"slots": 0, "eps": 0.0, "SPLITS": 1, "K": 1} | arguments
    launch(token_kernel, (T, 1, 1), D=D, BD=block, warps=max(1, min(8, block // 256)), **given)


def _parts(experts: Experts | None) -> dict:
    if experts is None:
        return {}
    partial, indices, weights = (t.contiguous() for t in experts)
    splits, slots, _ = partial.shape
    return {
        "partial": partial,
        "indices": indices,
        "weights": weights,
        "slots": slots,
        "SPLITS": splits,
        "K": indices.shape[-1],
    }


def combine(experts: Experts, dtype: torch.dtype, *, norms: bool = False) -> tuple[Tensor, Tensor | None]:
    """Weigh and add up the K experts of each token -> y [T, D] in dtype, and their lengths before it, fp32 [T, K], if asked."""
    T, K = experts.indices.shape
    D = experts.partial.shape[-1]
    y = experts.partial.new_empty(T, D, dtype=dtype)
    lengths = experts.partial.new_empty(T, K, dtype=torch.float32) if norms else None
    _run(T, D, total=y, lengths=lengths, **_parts(experts))
    return y, lengths


def sum_slots(rows: Tensor, indices: Tensor) -> Tensor:
    """rows [T*K, D] in the order of slots -> [T, D] sums over the used slots of each token, in rows' dtype."""
    T = indices.shape[0]
    y = rows.new_empty(T, rows.shape[-1])
    parts = _parts(Experts(rows.unsqueeze(0), indices, indices)) | {"weights": None}
    _run(T, rows.shape[-1], total=y, **parts)
    return y


def add_and_norm(
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    delta: Tensor | None = None,
    experts: Experts | None = None,
    half: bool = False,
) -> Normed:
    """residual [T, D] plus delta [T, D] plus weighted experts -> :class:`Normed`, in residual's dtype.

    Sums are fp32 and rounded once; the norm is of the rounded sum, as if both had been written and read back.
    """
    T, D = residual.shape
    total, normed = residual.new_empty(T, D), residual.new_empty(T, D)
    fp16 = residual.new_empty(T, D, dtype=torch.float16) if half else None
    parts = _parts(experts)
    _run(
        T,
        D,
        residual=residual.contiguous(),
        delta=None if delta is None else delta.contiguous(),
        total=total,
        norm_weight=weight,
        normed=normed,
        half=fp16,
        eps=eps,
        **parts,
    )
    return Normed(total, normed, fp16)


class RMSNormFunction(torch.autograd.Function):
    """rms_norm with a backward pass that reads x once; the weight's gradient is summed in a fixed order."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        D = x.shape[-1]
        flat = x.reshape(-1, D).contiguous()  # reshape keeps a slice of wider rows as it is
        T = flat.shape[0]
        normed = flat.new_empty(T, D)
        inverse = flat.new_empty(T, dtype=torch.float32)
        _run(T, D, residual=flat, norm_weight=weight, normed=normed, inverse=inverse, eps=eps)
        ctx.save_for_backward(flat, weight, inverse)
        ctx.eps = eps
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        T, D = x.shape
        rows_each = triton.cdiv(T, 264)  # two programs on each of an H200's 132 multiprocessors
        programs = triton.cdiv(T, max(rows_each, 1))
        dx = x.new_empty(T, D)
        dweight = x.new_empty(programs, D, dtype=torch.float32)
        block = triton.next_power_of_2(D)
        launch(
            norm_backward_kernel,
            (programs, 1, 1),
            x=x,
            weight=weight,
            inverse=inverse,
            dy=dy.reshape(T, D).contiguous(),
            dx=dx,
            dweight=dweight,
            T=T,
            D=D,
            eps=ctx.eps,
            rows_each=rows_each,
            BD=block,
            warps=max(1, min(8, block // 256)),
        )
        return dx.view(dy.shape), dweight.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / rms(x) * weight [D], in fp32, rounded once to x's type; differentiable."""
    return RMSNormFunction.apply(x, weight, eps)
