"""The same operations vectorised in PyTorch: any device, differentiable, no compiler. Formulas: see `reference`.

Written for speed where eager PyTorch allows it. Gradients are written out by hand where autograd would keep or fill
large tensors: the experts keep x and the pre-activation only, attention keeps what a flash kernel keeps, and the loss
never holds [T, V] in fp32.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xmoe.kernels import portable_inference as inference
from xmoe.kernels.adapter import Adapter, parts
from xmoe.kernels.decoded import DecodedExperts, Keep
from xmoe.kernels.reference import visible
from xmoe.quantization.packed import PackedWeight


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype an operation on x works in: autocast's inside autocast, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear`."""
    return F.linear(x, weight, bias)


# ------------------------------------------------------------------------------------------------ norm and rotation


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        t = x.float()
        scale = torch.rsqrt(t.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (t * scale).mul_(weight.float()).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        dw = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight.float()
        dx = grad.sub_(normed * (grad * normed).mean(-1, keepdim=True)).mul_(scale)
        return dx.to(x.dtype), dw, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`xmoe.kernels.reference.rms_norm`; inside autocast the result has its dtype, ready for a product."""
    return _RMSNorm.apply(x, weight, eps, compute_dtype(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class _Rope(Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.rope`."""
    return _Rope.apply(x, cos, sin)


# ------------------------------------------------------------------------------------------------ attention


class _FlashWithSinks(Function):
    """PyTorch's CPU flash attention with exact sinks: q [B, H, S, Dh], k and v [B, H, L, Dh], sinks [H].

    With lse' = log(exp(lse) + exp(sink)) the answer is out * exp(lse - lse'). The stock backward pass, handed that
    answer and lse', is exact, since it uses them only as the normaliser and in rowsum(dout * out).
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, causal: bool, mask: Tensor | None, scale: float) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        total = torch.logaddexp(lse, sinks.float().view(1, -1, 1))
        out = (out * torch.exp(lse - total).unsqueeze(-1)).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, mask, out, total)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, sinks, mask, out, total = ctx.saved_tensors
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = flash(grad, q, k, v, out, total.contiguous(), 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
        share = torch.exp(sinks.float().view(1, -1, 1) - total)
        dsinks = -(share * (grad.float() * out.float()).sum(-1)).sum((0, 2))
        return dq, dk, dv, dsinks.to(sinks.dtype), None, None, None


def _blocks_of_window(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int, scale: float) -> Tensor:
    """Sliding attention as many small full ones: W queries against the 2 W keys that some of them may see."""
    B, H, S, Dh = q.shape
    n = -(-S // window)
    q, k, v = (F.pad(x, (0, 0, 0, n * window - S)) for x in (q, k, v))

    def with_previous(x: Tensor) -> Tensor:
        x = x.reshape(B, H, n, window, Dh)
        before = F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0))
        return torch.cat((before, x), dim=3).transpose(1, 2).reshape(B * n, H, 2 * window, Dh)

    distance = torch.arange(window).unsqueeze(1) + window - torch.arange(2 * window)
    hidden = ((distance < 0) | (distance >= window)).repeat(n, 1, 1)
    hidden[0, :, :window] = True  # nothing stands before the first block
    mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf")).repeat(B, 1, 1).unsqueeze(1)
    own = q.reshape(B, H, n, window, Dh).transpose(1, 2).reshape(B * n, H, window, Dh)
    out = _FlashWithSinks.apply(own, with_previous(k), with_previous(v), sinks, False, mask, scale)
    return out.view(B, n, H, window, Dh).transpose(1, 2).reshape(B, H, n * window, Dh)[:, :, :S]


def _in_order(q_pos: Tensor, k_pos: Tensor) -> bool:
    """Whether the keys are those of the queries, one position after the other, as in a prompt without padding."""
    return q_pos.shape == k_pos.shape and bool(
        (q_pos == k_pos).all() & (q_pos[:, 0] >= 0).all() & (q_pos.diff() == 1).all()
    )


def _flash(
    q, k, v, sinks, window: int | None, q_pos: Tensor | None, k_pos: Tensor | None, scale: float
) -> Tensor | None:
    """Attention [B, H, S, Dh] through the flash kernel; None where a query sees no key, as those of padding do."""
    S = q.shape[2]
    if q_pos is None or _in_order(q_pos, k_pos):
        if window is None or window >= S:
            return _FlashWithSinks.apply(q, k, v, sinks, True, None, scale)
        return _blocks_of_window(q, k, v, sinks, window, scale)
    seen = visible(q_pos, k_pos, window).unsqueeze(1)
    if not bool(seen.any(-1).all()):
        return None
    mask = None if bool(seen.all()) else torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
    return _FlashWithSinks.apply(q, k, v, sinks, False, mask, scale)


def _masked_attention(q, k, v, sinks, window: int | None, q_pos: Tensor, k_pos: Tensor, scale: float) -> Tensor:
    """Any positions: one key and value of zeros stand for the sink, whose logit enters as that column's bias."""
    B, H, S, _ = q.shape
    hidden = ~visible(q_pos, k_pos, window).unsqueeze(1)
    hidden = hidden.expand(B, H, *hidden.shape[2:])
    logits = torch.full((H,), float("-inf"), device=q.device) if sinks is None else sinks.float()
    bias = torch.zeros(hidden.shape, device=q.device).masked_fill(hidden, float("-inf"))
    bias = torch.cat((bias, logits.view(1, H, 1, 1).expand(B, H, S, 1)), dim=-1).to(q.dtype)
    out = F.scaled_dot_product_attention(q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), attn_mask=bias, scale=scale)
    return out if sinks is not None else out.masked_fill(hidden.all(-1, keepdim=True), 0.0)


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
    """See :func:`xmoe.kernels.reference.attention`."""
    S, R = q.shape[1], q.shape[2] // k.shape[2]
    dtype = compute_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = q.to(dtype).transpose(1, 2)
    k, v = (x.to(dtype).repeat_interleave(R, dim=2).transpose(1, 2) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        if q.device.type == "cpu" and S > 0 and dtype in (torch.bfloat16, torch.float32):
            logits = torch.full((q.shape[1],), float("-inf")) if sinks is None else sinks
            out = _flash(q, k, v, logits, window, q_pos, k_pos, scale)
        else:
            out = None
        if out is None:
            if q_pos is None:
                q_pos = k_pos = torch.arange(S, device=q.device).unsqueeze(0)
            out = _masked_attention(q, k, v, sinks, window, q_pos, k_pos, scale)
    return out.transpose(1, 2)


# ------------------------------------------------------------------------------------------------ experts


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
        order, counts = inference.by_expert(indices, E)
        hidden = torch.empty(len(order), F2, dtype=dtype, device=x.device)
        out = torch.zeros(T * K, D, dtype=dtype, device=x.device)
        lengths = torch.zeros(T * K, dtype=torch.float32, device=x.device) if norms else None
        for e, place, s in inference.stretches(counts, order):
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
        for e, place, s in inference.stretches(ctx.counts, order):
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
    are kept for the tokens to come (:mod:`xmoe.kernels.decoded`).
    """
    dtype = compute_dtype(x)
    scales, adapters = parts(gate_up_adapter, down_adapter)
    layer = gate_up, gate_up_bias, down, down_bias
    keep: Keep = "never" if torch.is_grad_enabled() else "always" if len(x) <= _FEW else "room"
    with torch.autocast(x.device.type, enabled=False):
        if keep != "never" and x.device.type == "cpu":
            up, low = (functools.partial(_decoded.matrices, w, dtype=dtype, keep=keep) for w in (gate_up, down))
            given = x.to(dtype), indices, weights, up, gate_up_bias, low, down_bias
            return inference.experts(*given, limit, alpha, norms, gate_up_adapter, down_adapter)
        return _Experts.apply(x, indices, weights, *layer, limit, alpha, norms, dtype, scales, keep, *adapters)


# ------------------------------------------------------------------------------------------------ loss

_LOGIT_BYTES = 128 << 20  # most memory for logits at a time
_LOGIT_ROWS = 256  # rows whose softmax is taken at a time


class _LinearCrossEntropy(Function):
    """The gradient of the logits is known as soon as they are, so both products follow at once and logits are dropped."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, needs_grad: bool, needs_weight_grad: bool) -> Tensor:
        (T, D), V = hidden.shape, weight.shape[0]
        h, w = hidden.to(dtype), weight.to(dtype)
        real = targets >= 0
        scale = 1.0 / real.sum().clamp(min=1)
        losses = torch.zeros((), dtype=torch.float32, device=h.device)
        dh = torch.empty(T, D, dtype=dtype, device=h.device) if needs_grad else None
        dw = None
        block = max(_LOGIT_ROWS, _LOGIT_BYTES // (V * h.element_size()) // _LOGIT_ROWS * _LOGIT_ROWS)
        for start in range(0, T, block):
            count = min(block, T - start)
            dlogits = torch.empty(count if needs_grad else 0, V, dtype=dtype, device=h.device)
            for first in range(start, start + count, _LOGIT_ROWS):
                s = slice(first, min(first + _LOGIT_ROWS, start + count))
                logits = torch.mm(h[s], w.t()).float()
                at = targets[s].clamp(min=0).unsqueeze(1)
                logits = torch.log_softmax(logits, -1)
                losses -= logits.gather(1, at).squeeze(1).mul(real[s]).sum()
                if dh is None:
                    continue
                probability = logits.exp_()
                probability.scatter_add_(1, at, torch.full_like(at, -1, dtype=torch.float32))
                part = dlogits[first - start : first - start + s.stop - s.start]
                part.copy_(probability.mul_((scale * real[s]).unsqueeze(1)))
                torch.mm(part, w, out=dh[s])
            if needs_weight_grad:
                product = torch.mm(dlogits.t(), h[start : start + count])
                dw = product.float() if dw is None else dw.add_(product)
        ctx.save_for_backward(dh, dw)
        ctx.types = (hidden.dtype, weight.dtype)
        return losses * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dh, dw = ctx.saved_tensors
        if grad.device.type != "cpu" or float(grad) != 1.0:  # elsewhere looking at the value would stop the queue
            dh, dw = dh * grad.to(dh.dtype), None if dw is None else dw * grad
        return dh.to(ctx.types[0]), None if dw is None else dw.to(ctx.types[1]), None, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear_cross_entropy`; logits exist for a bounded number of rows at a time."""
    needs_weight_grad = torch.is_grad_enabled() and weight.requires_grad
    needs_grad = needs_weight_grad or (torch.is_grad_enabled() and hidden.requires_grad)
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets, dtype, needs_grad, needs_weight_grad)
