"""The experts of a layer in C, differentiable: rows sorted by expert, per expert two products, adapters beside them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xmoe.kernels.adapter import Adapter, parts
from xmoe.kernels.cpu.library import run
from xmoe.kernels.cpu.products import apply, as_weight, column_sums, compute_dtype, gradient, product, takes_packed
from xmoe.quantization.packed import PackedWeight


def takes(*weights: Tensor | PackedWeight) -> bool:
    """Whether :func:`experts` has a product for these weights: dense, packed, or low-rank with factors of either kind."""
    return all(isinstance(w, Tensor) or (takes(*w.factors) if w.factors else takes_packed(w)) for w in weights)


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
        w1, w2 = as_weight(gate_up, dtype), as_weight(down, dtype)
        b1, b2 = gate_up_bias.float().contiguous(), down_bias.float().contiguous()
        up_a, up_b, low_a, low_b = low = [None if t is None else as_weight(t, dtype) for t in adapters]
        offsets = torch.empty(E + 1, dtype=torch.int64)
        place, token = torch.empty(T, K, dtype=torch.int64), torch.empty(T * K, dtype=torch.int64)
        row_weight = torch.empty(T * K, dtype=torch.float32)
        run("sort_by_expert", dtype, indices, weights, T * K, K, E, offsets, token, row_weight, place)
        rows = int(offsets[-1])
        sorted_x = _gather(x, token, rows)
        hidden = product(sorted_x, w1, offsets, torch.empty(rows, 2 * F, dtype=dtype))
        if up_a is not None:
            _add_adapter(hidden, sorted_x, up_a, up_b, scales[0], offsets)
        act = torch.empty(rows, F, dtype=dtype)
        run("swiglu_forward", dtype, hidden, b1, offsets, rows, F, limit, alpha, act)
        out = product(act, w2, offsets, sorted_x)  # sorted_x has served; its room is as large as the answer
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
        dact = product(dout, w2, offsets, torch.empty(rows, F, dtype=dtype), transposed=True)
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
            dlow_a = gradient(dout_inside, weighted, offsets, torch.empty_like(low_a))
            dlow_b = gradient(
                dout, _into_rank(weighted, low_a, ctx.scales[1], offsets), offsets, torch.empty_like(low_b)
            )
        if needs[5]:
            dw2 = gradient(dout, weighted, offsets, torch.empty_like(w2))
        if up_a is not None:
            dhidden_inside = _into_rank(dhidden, up_b, ctx.scales[0], offsets, transposed=True)
        if needs[3] or up_a is not None:
            sorted_x = _gather(x, token, rows)
            if needs[3]:
                dw1 = gradient(dhidden, sorted_x, offsets, torch.empty_like(w1))
            if up_a is not None:
                dup_a = gradient(dhidden_inside, sorted_x, offsets, torch.empty_like(up_a))
                inside = _into_rank(sorted_x, up_a, ctx.scales[0], offsets)
                dup_b = gradient(dhidden, inside, offsets, torch.empty_like(up_b))
        if needs[4]:
            db1 = column_sums(dhidden, offsets)
        if needs[6]:
            db2 = column_sums(dout, offsets, row_weight)
        if needs[0]:
            dx_rows = product(dhidden, w1, offsets, dout, transposed=True)  # into dout's room
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
    to += product(rows, weight, offsets, torch.empty_like(to), transposed=transposed)


def _into_rank(rows: Tensor, weight: Tensor, scale: float, offsets: Tensor, transposed: bool = False) -> Tensor:
    """scale times rows times a, [R, r]; or, `transposed`, times b: the way back into the r dimensions of an adapter."""
    rank = weight.shape[2 if transposed else 1]
    return product(rows, weight, offsets, rows.new_empty(len(rows), rank), transposed=transposed).mul_(scale)


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
    return apply(_Experts, x, indices, weights, *layer, limit, alpha, norms, dtype, scales, *adapters)
