"""The operations of a training step in C: products, attention with sinks, experts, norm, rotation and loss on the CPU.

The library that `xmoe.kernels.cpu.build` compiles at installation does all the work, matrix products included: they take
any number of rows an expert, read fp32 weights beside bf16 activations and write fp32 gradients. Where there is no
library, :func:`available` is False and :func:`reason` says why; the portable path serves then. Nothing is ever compiled
at run time.

All operations are differentiable. Parameters may be fp32 while the work is done in the autocast dtype: their gradients
come back in fp32.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xmoe.kernels.cpu.experts import experts, takes
from xmoe.kernels.cpu.library import ELEMENTS, PIECES, AttentionArguments, available, describe, reason, run
from xmoe.kernels.cpu.products import MANY_FEW, apply, as_weight, compute_dtype, gradient, linear, product, whole

__all__ = [
    "ELEMENTS", "MANY_FEW", "attention", "available", "compute_dtype", "describe", "experts", "linear",
    "linear_cross_entropy", "reason", "rms_norm", "rope", "takes",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ norm and rotation


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        if x.dtype not in (dtype, torch.float32):
            x = x.to(dtype)
        x, w = x.contiguous(), weight.float().contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        y = torch.empty(x.shape, dtype=dtype)
        scale = torch.empty(rows, dtype=torch.float32)
        run("rms_norm_forward", dtype, x, x.dtype == torch.float32, w, y, scale, rows, width, eps)
        ctx.save_for_backward(x, w, scale)
        ctx.dtype, ctx.weight_dtype = dtype, weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, w, scale = ctx.saved_tensors
        grad = grad.to(ctx.dtype).contiguous()
        dx, dw = torch.empty_like(x), torch.empty_like(w)
        room = torch.empty(PIECES, w.numel())
        is_float = x.dtype == torch.float32
        rows, width = scale.numel(), w.numel()
        run("rms_norm_backward", ctx.dtype, grad, x, is_float, w, scale, dx, dw, room, rows, width)
        return dx, dw.to(ctx.weight_dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`xmoe.kernels.reference.rms_norm`; inside autocast the result has its dtype, ready for a product."""
    return apply(_RMSNorm, x, weight, eps, compute_dtype(x))


def _packed_heads(x: Tensor) -> Tensor:
    """x [B, S, N, Dh] with the heads of a token side by side, copied only where they are not."""
    return x if x.stride(3) == 1 and (x.stride(2) == x.shape[3] or x.shape[2] == 1) else x.contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    x = _packed_heads(x)
    B, S, N, Dh = x.shape
    y = torch.empty(x.shape, dtype=x.dtype)
    angle_batch = 0 if cos.shape[0] == 1 else cos.stride(0)
    run("rope", x.dtype, x, x.stride(0), x.stride(1), cos, sin, angle_batch, y, B, S, N, Dh, direction)
    return y


class _Rope(Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _rotate(grad, *ctx.saved_tensors, -1.0), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.rope`."""
    return apply(_Rope, x, cos.float().contiguous(), sin.float().contiguous())


# ------------------------------------------------------------------------------------------------ attention


class _Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, window, q_pos, k_pos, scale, keep: bool) -> Tensor:
        B, S, H, Dh = q.shape
        L, G = k.shape[1:3]
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(B, S, H, Dh, dtype=q.dtype)
        lse = torch.empty(B, G, S * (H // G), dtype=torch.float32) if keep else None
        logits = None if sinks is None else sinks.float().contiguous()
        arguments = AttentionArguments(
            batch=B, queries=S, keys=L, groups=G, heads_per_group=H // G, head_dim=Dh, window=window or 0, scale=scale
        )
        _place(arguments, q=q, k=k, v=v, out=out)
        _point(arguments, lse=lse, sinks=logits, q_pos=q_pos, k_pos=k_pos)
        run("attention_forward", q.dtype, ctypes.addressof(arguments))
        if keep:
            ctx.save_for_backward(q, k, v, logits, q_pos, k_pos, out, lse)
            ctx.arguments, ctx.sinks_dtype = arguments, None if sinks is None else sinks.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, sinks, q_pos, k_pos, out, lse = ctx.saved_tensors
        arguments, H = ctx.arguments, q.shape[2]
        grad = grad.to(q.dtype)
        grad = grad if grad.stride(3) == 1 else grad.contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        dsinks = torch.zeros(q.shape[0], H)
        _place(arguments, q=q, k=k, v=v, out=out, dout=grad, dq=dq, dk=dk, dv=dv)
        _point(arguments, lse=lse, sinks=sinks, q_pos=q_pos, k_pos=k_pos, dsinks=dsinks)
        run("attention_backward", q.dtype, ctypes.addressof(arguments))
        dsinks = None if sinks is None else dsinks.sum(0).to(ctx.sinks_dtype)
        return dq, dk, dv, dsinks, None, None, None, None, None


def _point(arguments: AttentionArguments, **tensors: Tensor | None) -> None:
    """Enter addresses."""
    for name, x in tensors.items():
        setattr(arguments, name, None if x is None else x.data_ptr())


def _place(arguments: AttentionArguments, **tensors: Tensor) -> None:
    """Enter addresses and strides of [batch, token, head, head_dim] tensors."""
    _point(arguments, **tensors)
    for name, x in tensors.items():
        setattr(arguments, f"{name}_stride", (ctypes.c_int64 * 3)(*x.stride()[:3]))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *,
    window: int | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See :func:`xmoe.kernels.reference.attention`. q, k and v may be slices of one tensor: nothing is copied."""
    dtype = compute_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if q_pos is not None:
        q_pos, k_pos = (p.expand(q.shape[0], -1).contiguous() for p in (q_pos, k_pos))
    keep = torch.is_grad_enabled()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return apply(_Attention, q, k, v, sinks, window, q_pos, k_pos, scale, keep)


# ------------------------------------------------------------------------------------------------ loss

_LOGIT_BYTES = 128 << 20  # most memory for logits at a time
_LOGIT_ROWS = 512  # rows of one product: enough to repay packing the weight


class _LinearCrossEntropy(Function):
    """The gradient of the logits is known as soon as they are, so it replaces them and both products follow at once."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, needs_grad: bool, needs_weight_grad: bool) -> Tensor:
        (T, D), V = hidden.shape, weight.shape[0]
        h, w = hidden.to(dtype).contiguous(), as_weight(weight, dtype)
        scale = 1.0 / max(int((targets >= 0).sum()), 1)
        losses = torch.empty(T, dtype=torch.float32)
        dh = torch.empty(T, D, dtype=dtype) if needs_grad else None
        dw = None
        block = max(32, _LOGIT_BYTES // (V * h.element_size()))  # rows whose logits exist together
        step = min(_LOGIT_ROWS, block)
        logits = torch.empty(min(block if needs_grad else step, T), V, dtype=dtype)
        for start in range(0, T, block):
            count = min(block, T - start)
            for first in range(start, start + count, step):
                s = slice(first, min(first + step, start + count))
                rows = whole(s.stop - s.start)
                part = logits[first - start : s.stop - start] if needs_grad else logits[: s.stop - first]
                product(h[s], w, rows, part)
                run("cross_entropy", dtype, part, targets[s], len(part), V, scale, losses[s])
                if dh is not None:
                    product(part, w, rows, dh[s], transposed=True)
            if needs_weight_grad:
                piece = torch.empty(V, D, dtype=torch.float32)
                gradient(logits[:count], h[start : start + count], whole(count), piece)
                dw = piece if dw is None else dw.add_(piece)
        ctx.save_for_backward(dh, dw)
        ctx.types = (hidden.dtype, weight.dtype)
        return losses.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dh, dw = ctx.saved_tensors
        by = float(grad)
        if by != 1.0:
            dh, dw = dh * by, None if dw is None else dw * by
        return dh.to(ctx.types[0]), None if dw is None else dw.to(ctx.types[1]), None, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear_cross_entropy`; logits exist for a bounded number of rows at a time."""
    needs_weight_grad = torch.is_grad_enabled() and weight.requires_grad
    needs_grad = needs_weight_grad or (torch.is_grad_enabled() and hidden.requires_grad)
    dtype = compute_dtype(hidden)
    return _LinearCrossEntropy.apply(hidden, weight, targets.contiguous(), dtype, needs_grad, needs_weight_grad)
