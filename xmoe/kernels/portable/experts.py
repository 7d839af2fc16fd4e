"""The experts in PyTorch, expert by expert over rows sorted by expert, with a gradient written out by hand.

Autograd would keep or fill large tensors; this keeps x and the pre-activation only. Where no gradient is wanted, the CPU
goes another way (`experts_inference`), with the matrices that were decoded before (`decoded`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xmoe.kernels.adapter import Adapter, parts
from xmoe.kernels.portable import experts_inference
from xmoe.kernels.portable.autocast import compute_dtype
from xmoe.kernels.portable.decoded import DecodedExperts, Keep
from xmoe.quantization.packed import PackedWeight

_FEW = 4  # tokens up to which a step counts as decoding, of which many follow each other
_decoded = DecodedExperts()


def describe() -> str:
    """What the portable path keeps of packed experts; a clause."""
    return _decoded.describe()


def _ahead(rows: Tensor, weight: Tensor | PackedWeight, e: int, keep: Keep) -> tuple[Tensor, Tensor]:
    """Rows and a matrix whose product rows matrix^T is that of `rows` with expert e: a low-rank one's inner factor is done."""
    matrix, *inner = _decoded.matrices(weight, e, rows.dtype, keep)
    return (torch.mm(rows, inner[0].t()), matrix) if inner else (rows, matrix)


def _back(rows: Tensor, weight: Tensor | PackedWeight, e: int) -> Tensor:
    """rows [n, out] times the matrix of expert e -> [n, in], factor by factor."""
    for matrix in _decoded.matrices(weight, e, rows.dtype):
        rows = torch.mm(rows, matrix)
    return rows


def _act(hidden: Tensor, limit: float, alpha: float) -> Tensor:
    """[..., 2F] -> [..., F] in hidden's type; fp32 inside."""
    gate, up = hidden[..., 0::2].float().clamp(max=limit), hidden[..., 1::2].float().clamp(-limit, limit)
    return (torch.sigmoid(gate * alpha).mul_(gate).mul_(up.add_(1))).to(hidden.dtype)


def _act_backward(hidden: Tensor, dact: Tensor, weight: Tensor, limit: float, alpha: float):
    """(weight * act, gradient of hidden, <act, dact> a row); dact is the gradient before the routing weight [rows]."""
    gate_in, up_in, d = hidden[..., 0::2].float(), hidden[..., 1::2].float(), dact.float()
    gate, up = gate_in.clamp(max=limit), up_in.clamp(-limit, limit).add_(1)
    sigmoid = torch.sigmoid(gate * alpha)
    silu = gate * sigmoid
    act = silu * up
    dot = (act * d).sum(-1)
    weight = weight.unsqueeze(-1)
    d *= weight
    dgate = d * up * torch.addcmul(sigmoid, silu, 1 - sigmoid, value=alpha)
    dhidden = torch.empty_like(hidden)
    dhidden[..., 0::2] = dgate.masked_fill_(gate_in > limit, 0.0)  # where a clamp holds, nothing flows
    dhidden[..., 1::2] = d.mul_(silu).masked_fill_(up_in.abs() > limit, 0.0)
    return act.mul_(weight).to(hidden.dtype), dhidden, dot


class _Experts(Function):
    """Expert by expert over rows sorted by expert, so that an expert's rows stay in the cache from product to product.

    Keeps x and the pre-activation. The gradient of a routing weight is <act, W2^T dy> + <b2, dy>, so the output of
    `down` is never stored (SonicMoE, arXiv 2512.14080).
    """

    @staticmethod
    def forward(ctx, x, indices, weights, gate_up, gate_up_bias, down, down_bias, *settings):
        limit, alpha, norms, dtype, scales, keep, *adapters = settings
        (T, D), (_, K), (E, F2, _) = x.shape, indices.shape, gate_up.shape
        x = x.to(dtype)
        order, counts = experts_inference.by_expert(indices, E)
        hidden = torch.empty(len(order), F2, dtype=dtype, device=x.device)
        out = torch.zeros(T * K, D, dtype=dtype, device=x.device)
        lengths = torch.zeros(T * K, dtype=torch.float32, device=x.device) if norms else None
        for e, place, s in experts_inference.stretches(counts, order):
            given = x.index_select(0, place // K)
            rows_in, matrix = _ahead(given, gate_up, e, keep)
            h = torch.mm(rows_in, matrix.t(), out=hidden[s])
            if adapters[0] is not None:
                h += _adapter_product(given, *adapters[:2], scales[0], e)
            h += gate_up_bias[e].to(dtype)
            act = _act(h, limit, alpha)
            active, matrix = _ahead(act, down, e, keep)
            f = torch.addmm(down_bias[e].to(dtype), active, matrix.t())
            if adapters[2] is not None:
                f += _adapter_product(act, *adapters[2:], scales[1], e)
            out.index_copy_(0, place, f)
            if lengths is not None:
                lengths.index_copy_(0, place, f.float().norm(dim=-1))
        y = torch.bmm(weights.to(dtype).unsqueeze(1), out.view(T, K, D)).squeeze(1)
        dense = [w for w in (gate_up, down) if isinstance(w, Tensor)]
        ctx.save_for_backward(x, weights, hidden, order, down_bias, *adapters, *dense)
        ctx.packed = [w for w in (gate_up, down) if not isinstance(w, Tensor)]
        ctx.gate_up_is_dense, ctx.counts, ctx.limit, ctx.alpha = isinstance(gate_up, Tensor), counts, limit, alpha
        ctx.bias_dtype, ctx.scales = gate_up_bias.dtype, scales
        if lengths is not None:
            lengths = lengths.view(T, K)
            ctx.mark_non_differentiable(lengths)
        return y, lengths

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        x, weights, hidden, order, down_bias, up_a, up_b, low_a, low_b, *dense = ctx.saved_tensors
        sources = {True: list(dense), False: list(ctx.packed)}
        gate_up = sources[ctx.gate_up_is_dense].pop(0)
        down = (sources[True] or sources[False]).pop(0)
        (T, D), K, dtype, E = x.shape, weights.shape[1], x.dtype, len(ctx.counts)
        grad, row_weights = grad.to(dtype), weights.flatten().float()
        dx = torch.zeros(T * K, D, dtype=dtype, device=x.device)
        dweights = torch.zeros(T * K, dtype=torch.float32, device=x.device)
        dw1 = torch.zeros_like(gate_up) if isinstance(gate_up, Tensor) and ctx.needs_input_grad[3] else None
        dw2 = torch.zeros_like(down) if isinstance(down, Tensor) and ctx.needs_input_grad[5] else None
        db1 = torch.zeros(E, hidden.shape[1], dtype=torch.float32, device=x.device)
        db2 = torch.zeros(E, D, dtype=torch.float32, device=x.device)
        of_adapters = [None if t is None else torch.zeros_like(t) for t in (up_a, up_b, low_a, low_b)]
        for e, place, s in experts_inference.stretches(ctx.counts, order):
            token, weight = place // K, row_weights.index_select(0, place)
            dy = grad.index_select(0, token)
            dact = _back(dy, down, e)
            if low_a is not None:
                dact += _adapter_back(dy, low_a, low_b, ctx.scales[1], e)
            weighted, dhidden, dot = _act_backward(hidden[s], dact, weight, ctx.limit, ctx.alpha)
            dgiven = _back(dhidden, gate_up, e)
            if low_a is not None:
                _adapter_gradients(weighted, dy, low_a, low_b, ctx.scales[1], e, of_adapters[2:])
            if up_a is not None:
                dgiven += _adapter_back(dhidden, up_a, up_b, ctx.scales[0], e)
                given = x.index_select(0, token)
                _adapter_gradients(given, dhidden, up_a, up_b, ctx.scales[0], e, of_adapters[:2])
            dx.index_copy_(0, place, dgiven)
            if dw1 is not None:
                dw1[e].copy_(torch.mm(dhidden.t(), x.index_select(0, token)))
            if dw2 is not None:
                dw2[e].copy_(torch.mm(dy.t(), weighted))
            wide = dy.float()
            db1[e] = dhidden.sum(0, dtype=torch.float32)
            db2[e] = torch.mv(wide.t(), weight)
            dweights.index_copy_(0, place, dot.add_(torch.mv(wide, down_bias[e].float())))
        db1, db2 = db1.to(ctx.bias_dtype), db2.to(down_bias.dtype)
        dx = dx.view(T, K, D).sum(1)
        first = dx, None, dweights.view(T, K).to(weights.dtype), dw1, db1, dw2, db2
        return *first, None, None, None, None, None, None, *of_adapters


def _adapter_product(rows: Tensor, a: Tensor, b: Tensor, scale: float, e: int) -> Tensor:
    """scale * b (a rows) of expert e's adapter, in the type of the rows."""
    return torch.mm(torch.mm(rows, a[e].to(rows.dtype).t()).mul_(scale), b[e].to(rows.dtype).t())


def _adapter_back(dy: Tensor, a: Tensor, b: Tensor, scale: float, e: int) -> Tensor:
    """The gradient that the adapter's rows get from that of its product."""
    return torch.mm(torch.mm(dy, b[e].to(dy.dtype)).mul_(scale), a[e].to(dy.dtype))


def _adapter_gradients(
    rows: Tensor, dy: Tensor, a: Tensor, b: Tensor, scale: float, e: int, into: list[Tensor]
) -> None:
    """Gradients of expert e's a and b, into its rows of those two stacks."""
    inside, dinside = torch.mm(rows, a[e].to(rows.dtype).t()), torch.mm(dy, b[e].to(dy.dtype))
    into[0][e].copy_(torch.mm(dinside.mul_(scale).t(), rows))
    into[1][e].copy_(torch.mm(dy.t(), inside.mul_(scale)))


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
    """See :func:`xmoe.kernels.reference.experts`.

    Packed weights are decoded expert by expert, factors never multiplied. On the CPU, experts decoded without gradient
    are kept for the tokens to come (:mod:`xmoe.kernels.portable.decoded`).
    """
    dtype = compute_dtype(x)
    scales, adapters = parts(gate_up_adapter, down_adapter)
    layer = gate_up, gate_up_bias, down, down_bias
    keep: Keep = "never" if torch.is_grad_enabled() else "always" if len(x) <= _FEW else "room"
    with torch.autocast(x.device.type, enabled=False):
        if keep != "never" and x.device.type == "cpu":
            up, low = (functools.partial(_decoded.matrices, w, dtype=dtype, keep=keep) for w in (gate_up, down))
            given = x.to(dtype), indices, weights, up, gate_up_bias, low, down_bias
            return experts_inference.experts(*given, limit, alpha, norms, gate_up_adapter, down_adapter)
        return _Experts.apply(x, indices, weights, *layer, limit, alpha, norms, dtype, scales, keep, *adapters)
