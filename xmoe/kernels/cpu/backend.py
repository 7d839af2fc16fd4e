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

from xmoe.kernels.adapter import Adapter, parts
from xmoe.kernels.cpu.library import ELEMENTS, PIECES, AttentionArguments, available, describe, reason, run
from xmoe.quantization.packed import PackedWeight

__all__ = [
    "ELEMENTS", "attention", "available", "compute_dtype", "describe", "experts", "linear", "linear_cross_entropy",
    "reason", "rms_norm", "rope",
]  # fmt: skip


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype an operation on x works in: autocast's inside autocast, else x's own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def takes(*weights: Tensor | PackedWeight) -> bool:
    """Whether :func:`experts` has a product for these weights: dense ones and low-rank factors (MXFP4: `cpu.packed`)."""
    return all(isinstance(w, Tensor) or w.format == "low-rank" for w in weights)


class _Forgets:
    """A context that keeps nothing, for where no gradient can be asked for: autograd's own costs more than a small kernel."""

    def save_for_backward(self, *_: Tensor | None) -> None:
        pass

    mark_non_differentiable = save_for_backward


def _apply(function: type[Function], *arguments):
    """`function.apply`, or its forward pass alone where gradients are off."""
    return function.apply(*arguments) if torch.is_grad_enabled() else function.forward(_Forgets(), *arguments)


# ------------------------------------------------------------------------------------------------ matrix products


def _whole(rows: int) -> Tensor:
    """Offsets of `rows` rows that all belong to one expert: a grouped operation as a plain one."""
    return torch.tensor([0, rows])


def _product(
    x: Tensor,
    weight: Tensor | PackedWeight,
    offsets: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """out [R, N] = x [R, I] times the weight [E, N, I] of each row's expert, or [E, I, N] where `transposed`.

    The weight may be fp32 beside rows in bf16, or MXFP4: it is rounded or decoded on the way, and no converted copy of
    it exists. A low-rank one is two thin products. bias is fp32 [E, N], and None where the weight is not dense.
    """
    E, inner, columns = offsets.numel() - 1, x.shape[1], out.shape[1]
    if isinstance(weight, PackedWeight) and weight.format == "low-rank":
        first, second = (weight.left, weight.right) if transposed else (weight.right, weight.left)
        between = torch.empty(len(x), weight.left.shape[2], dtype=x.dtype)
        _product(x, _weight(first, x.dtype), offsets, between, transposed=transposed)
        return _product(between, _weight(second, x.dtype), offsets, out, transposed=transposed)
    if isinstance(weight, PackedWeight):
        blocks, scales = weight.blocks, weight.scales
        run("packed_product", x.dtype, x, blocks, scales, transposed, offsets, E, inner, columns, out)
        return out
    is_float = weight.dtype == torch.float32
    run("grouped_product", x.dtype, x, weight, is_float, transposed, bias, offsets, E, inner, columns, out)
    return out


def _gradient(left: Tensor, right: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    """out [E, N, I] = left [R, N]^T right [R, I] over the rows of each expert, in out's type; 0 where there are none."""
    E, height, width = offsets.numel() - 1, left.shape[1], right.shape[1]
    is_float = out.dtype == torch.float32
    run("grouped_gradient", left.dtype, left, right, offsets, E, height, width, out, is_float)
    return out


def _column_sums(rows: Tensor, offsets: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sums of [R, N] over the rows of each expert, each times its scale: [E, N] in fp32."""
    out = torch.empty(offsets.numel() - 1, rows.shape[1], dtype=torch.float32)
    run("column_sums", rows.dtype, rows, scale, offsets, out.shape[0], out.shape[1], out)
    return out


def _weight(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor | PackedWeight:
    """A weight as the kernels take it: contiguous, in fp32 or in the dtype of the work; or packed, as it is."""
    if isinstance(weight, PackedWeight):
        return weight
    return (weight if weight.dtype in (dtype, torch.float32) else weight.to(dtype)).contiguous()


class _Linear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        rows, w = x.reshape(-1, x.shape[-1]).to(dtype).contiguous(), _weight(weight, dtype)
        b = None if bias is None else bias.float().contiguous()
        y = _product(rows, w, _whole(len(rows)), torch.empty(len(rows), len(w), dtype=dtype), b)
        ctx.save_for_backward(rows, w)
        ctx.shape, ctx.types = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y.view(*x.shape[:-1], len(w))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, w = ctx.saved_tensors
        all_rows = _whole(len(rows))
        dx = dw = db = None
        grad = grad.reshape(-1, len(w)).to(rows.dtype).contiguous()
        if ctx.needs_input_grad[0]:
            dx = _product(grad, w, all_rows, torch.empty_like(rows), transposed=True).view(ctx.shape).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            dw = _gradient(grad, rows, all_rows, torch.empty_like(w)).to(ctx.types[1])
        if ctx.needs_input_grad[2]:
            db = _column_sums(grad, all_rows)[0].to(ctx.types[2])
        return dx, dw, db, None


FEW_ROWS = 4
"""Rows up to which a product that needs no gradient reads its weight straight from where it lies, as decoding wants it.

Up to 16 rows that is the faster way (`MANY_FEW`), but it rounds differently, and what is recorded of a text should not
depend on how many of its tokens came together: so only those who ask get it, the decode step and the unembedding.
"""
MANY_FEW = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, few: int = FEW_ROWS) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear`; up to `few` rows without gradient go the way of decoding."""
    dtype, rows = compute_dtype(x), x.numel() // max(x.shape[-1], 1)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if not trains and 0 < rows <= few and weight.dtype == dtype and weight.is_contiguous():
        return _few_rows(x.to(dtype).contiguous(), weight, bias, rows)
    return _apply(_Linear, x, weight, bias, dtype)


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """x [..., I] of a handful of rows times weight [N, I] of the same dtype, which streams past once; no gradient."""
    if bias is not None:
        bias = (bias if bias.dtype in (torch.bfloat16, torch.float32) else bias.float()).contiguous()
    y = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype)
    is_float = bias is not None and bias.dtype == torch.float32
    run("few_rows", x.dtype, x, weight, bias, is_float, rows, x.shape[-1], len(weight), y)
    return y


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
    return _apply(_RMSNorm, x, weight, eps, compute_dtype(x))


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
    return _apply(_Rope, x, cos.float().contiguous(), sin.float().contiguous())


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
    return _apply(_Attention, q, k, v, sinks, window, q_pos, k_pos, scale, keep)


# ------------------------------------------------------------------------------------------------ experts


class _Experts(Function):
    """Rows sorted by expert; per expert two products. Only x's and the pre-activation's rows are kept.

    The gradient of a routing weight is <f_e(x), dy> = <act, W2^T dy> + <b2, dy>, so the output of `down` is never
    stored, and act itself is recomputed from the pre-activation (SonicMoE, arXiv 2512.14080).
    """

    @staticmethod
    def forward(
        ctx, x, indices, weights, gate_up, gate_up_bias, down, down_bias, limit, alpha, norms, dtype, scales, *adapters
    ):
        (T, D), K, E, F = x.shape, indices.shape[1], gate_up.shape[0], down.shape[2]
        x, indices, weights = x.to(dtype).contiguous(), indices.contiguous(), weights.float().contiguous()
        w1, w2 = _weight(gate_up, dtype), _weight(down, dtype)
        b1, b2 = gate_up_bias.float().contiguous(), down_bias.float().contiguous()
        up_a, up_b, low_a, low_b = low = [None if t is None else _weight(t, dtype) for t in adapters]
        offsets = torch.empty(E + 1, dtype=torch.int64)
        place, token = torch.empty(T, K, dtype=torch.int64), torch.empty(T * K, dtype=torch.int64)
        row_weight = torch.empty(T * K, dtype=torch.float32)
        run("sort_by_expert", dtype, indices, weights, T * K, K, E, offsets, token, row_weight, place)
        rows = int(offsets[-1])
        sorted_x = _gather(x, token, rows)
        hidden = _product(sorted_x, w1, offsets, torch.empty(rows, 2 * F, dtype=dtype))
        if up_a is not None:
            _add_adapter(hidden, sorted_x, up_a, up_b, scales[0], offsets)
        act = torch.empty(rows, F, dtype=dtype)
        run("swiglu_forward", dtype, hidden, b1, offsets, rows, F, limit, alpha, act)
        out = _product(act, w2, offsets, sorted_x)  # sorted_x has served; its room is as large as the answer
        if low_a is not None:
            _add_adapter(out, act, low_a, low_b, scales[1], offsets)
        y = torch.empty(T, D, dtype=dtype)
        lengths = torch.empty(T, K, dtype=torch.float32) if norms else None
        run("combine", dtype, out, place, indices, weights, b2, y, lengths, T, K, D)
        dense = (w if isinstance(w, Tensor) else None for w in (w1, w2))
        ctx.save_for_backward(x, hidden, b1, b2, offsets, place, token, row_weight, *dense, *low)
        ctx.packed = [w if isinstance(w, PackedWeight) else None for w in (w1, w2)]
        ctx.limit, ctx.alpha, ctx.scales = limit, alpha, scales
        ctx.types = [getattr(t, "dtype", None) for t in (weights, gate_up, gate_up_bias, down, down_bias)]
        ctx.adapter_types = [getattr(t, "dtype", None) for t in adapters]
        if lengths is not None:
            ctx.mark_non_differentiable(lengths)
        return y, lengths

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        x, hidden, b1, b2, offsets, place, token, row_weight, *dense, up_a, up_b, low_a, low_b = ctx.saved_tensors
        w1, w2 = (packed if saved is None else saved for packed, saved in zip(ctx.packed, dense))
        dtype, (T, D), K, (rows, F) = x.dtype, x.shape, place.shape[1], (len(hidden), w2.shape[2])
        needs = ctx.needs_input_grad
        dweight = torch.zeros(rows)
        dout = _gather(grad.to(dtype).contiguous(), token, rows, b2, offsets, dweight)
        dact = _product(dout, w2, offsets, torch.empty(rows, F, dtype=dtype), transposed=True)
        if low_a is not None:
            dout_inside = _into_rank(dout, low_b, ctx.scales[1], offsets, transposed=True)
            _add_product(dact, dout_inside, low_a, offsets, transposed=True)
        weighted, dhidden = torch.empty_like(dact), torch.empty_like(hidden)
        run(
            "swiglu_backward", dtype, hidden, b1, offsets, rows, F, ctx.limit, ctx.alpha,
            row_weight, dact, weighted, dhidden, dweight,
        )  # fmt: skip
        dw1 = dw2 = dx = db1 = db2 = dup_a = dup_b = dlow_a = dlow_b = None
        if low_a is not None:
            dlow_a = _gradient(dout_inside, weighted, offsets, torch.empty_like(low_a))
            dlow_b = _gradient(
                dout, _into_rank(weighted, low_a, ctx.scales[1], offsets), offsets, torch.empty_like(low_b)
            )
        if needs[5]:
            dw2 = _gradient(dout, weighted, offsets, torch.empty_like(w2))
        if up_a is not None:
            dhidden_inside = _into_rank(dhidden, up_b, ctx.scales[0], offsets, transposed=True)
        if needs[3] or up_a is not None:
            sorted_x = _gather(x, token, rows)
            if needs[3]:
                dw1 = _gradient(dhidden, sorted_x, offsets, torch.empty_like(w1))
            if up_a is not None:
                dup_a = _gradient(dhidden_inside, sorted_x, offsets, torch.empty_like(up_a))
                inside = _into_rank(sorted_x, up_a, ctx.scales[0], offsets)
                dup_b = _gradient(dhidden, inside, offsets, torch.empty_like(up_b))
        if needs[4]:
            db1 = _column_sums(dhidden, offsets)
        if needs[6]:
            db2 = _column_sums(dout, offsets, row_weight)
        if needs[0]:
            dx_rows = _product(dhidden, w1, offsets, dout, transposed=True)  # into dout's room
            if up_a is not None:
                _add_product(dx_rows, dhidden_inside, up_a, offsets, transposed=True)
            dx = torch.empty_like(x)
            run("combine", dtype, dx_rows, place, None, None, None, dx, None, T, K, D)
        dweights = torch.where(place < 0, 0.0, dweight[place.clamp(min=0)] if rows else 0.0)
        gradients = [None if g is None else g.to(t) for g, t in zip((dweights, dw1, db1, dw2, db2), ctx.types)]
        of_adapters = [
            None if g is None else g.to(t) for g, t in zip((dup_a, dup_b, dlow_a, dlow_b), ctx.adapter_types)
        ]
        return dx, None, *gradients, None, None, None, None, None, *of_adapters


def _add_product(to: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, transposed: bool = False) -> None:
    """to += rows times the weight of each row's expert."""
    to += _product(rows, weight, offsets, torch.empty_like(to), transposed=transposed)


def _into_rank(rows: Tensor, weight: Tensor, scale: float, offsets: Tensor, transposed: bool = False) -> Tensor:
    """scale times rows times a, [R, r]; or, `transposed`, times b: the way back into the r dimensions of an adapter."""
    rank = weight.shape[2 if transposed else 1]
    return _product(rows, weight, offsets, rows.new_empty(len(rows), rank), transposed=transposed).mul_(scale)


def _add_adapter(to: Tensor, rows: Tensor, a: Tensor, b: Tensor, scale: float, offsets: Tensor) -> None:
    """to += scale * b a rows, expert by expert."""
    _add_product(to, _into_rank(rows, a, scale, offsets), b, offsets)


def _gather(
    x: Tensor, token: Tensor, rows: int, bias: Tensor | None = None, offsets: Tensor | None = None, dot=None
) -> Tensor:
    """x[token[:rows]]; with a bias [E, D], dot[r] becomes the product of row r with its expert's bias."""
    out = torch.empty(rows, x.shape[1], dtype=x.dtype)
    run("gather_rows", x.dtype, x, token, out, rows, x.shape[1], bias, offsets, dot)
    return out


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor | PackedWeight,
    gate_up_bias: Tensor,
    down: Tensor | PackedWeight,
    down_bias: Tensor,
    *,
    limit: float = 7.0,
    alpha: float = 1.702,
    norms: bool = False,
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`xmoe.kernels.reference.experts`; the weights must be such as `takes` or `cpu_packed.takes` allows."""
    dtype = compute_dtype(x)
    scales, adapters = parts(gate_up_adapter, down_adapter)
    layer = gate_up, gate_up_bias, down, down_bias
    return _apply(_Experts, x, indices, weights, *layer, limit, alpha, norms, dtype, scales, *adapters)


# ------------------------------------------------------------------------------------------------ loss

_LOGIT_BYTES = 128 << 20  # most memory for logits at a time
_LOGIT_ROWS = 512  # rows of one product: enough to repay packing the weight


class _LinearCrossEntropy(Function):
    """The gradient of the logits is known as soon as they are, so it replaces them and both products follow at once."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, needs_grad: bool, needs_weight_grad: bool) -> Tensor:
        (T, D), V = hidden.shape, weight.shape[0]
        h, w = hidden.to(dtype).contiguous(), _weight(weight, dtype)
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
                rows = _whole(s.stop - s.start)
                part = logits[first - start : s.stop - start] if needs_grad else logits[: s.stop - first]
                _product(h[s], w, rows, part)
                run("cross_entropy", dtype, part, targets[s], len(part), V, scale, losses[s])
                if dh is not None:
                    _product(part, w, rows, dh[s], transposed=True)
            if needs_weight_grad:
                piece = torch.empty(V, D, dtype=torch.float32)
                _gradient(logits[:count], h[start : start + count], _whole(count), piece)
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
