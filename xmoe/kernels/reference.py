"""The truth: every operation in plain PyTorch, written to be checked by eye. Differentiable, any device, slow.

The other backends are tested against these functions, value for value and gradient for gradient. All weights are
[out, in]. Formulas: the GPT-OSS reference implementation; sinks as in "Efficient Streaming Language Models with
Attention Sinks" (arXiv 2309.17453) in the softmax-denominator form that GPT-OSS uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe.kernels.adapter import Adapter
from xmoe.quantization.packed import PackedWeight


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out] -> [..., out]; a packed weight is [1, out, in]."""
    if isinstance(weight, PackedWeight):
        weight = weight.decode(dtype=x.dtype)[0]
    return F.linear(x, weight, bias)


def adapter_product(x: Tensor, adapter: Adapter) -> Tensor:
    """x [..., in] through an adapter -> scale * b (a x) [..., out], in x's type."""
    return F.linear(F.linear(x, adapter.a.to(x.dtype)) * adapter.scale, adapter.b.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] divided by its root mean square, times weight [D]: computed in fp32 and rounded to x's type once."""
    t = x.float()
    t = t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps)
    return (t * weight.float()).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, S, N, Dh] by cos, sin fp32 [1 or B, S, Dh/2]; the two halves of a head form the pairs (NeoX style)."""
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def visible(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """[B, S, L] True where the key at k_pos [B, L] may be seen from the query at q_pos [B, S].

    A key is visible iff 0 <= k_pos <= q_pos and, with a window W, q_pos - k_pos < W: W keys, the query's own included.
    """
    q, k = q_pos.unsqueeze(-1), k_pos.unsqueeze(-2)
    mask = (k >= 0) & (k <= q)
    return mask if window is None else mask & (q - k < window)


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
    """Causal grouped-query attention with one learned sink a head -> [B, S, H, Dh], in q's type.

    Args:
        q: [B, S, H, Dh]; query head h reads key-value head h // (H / G).
        k, v: [B, L, G, Dh].
        sinks: [H] or None: a logit that takes part in the softmax but has no value, neither scaled nor masked.
        window: keys a query sees, itself included; None is all before it.
        q_pos, k_pos: int64 [B, S] and [B, L]; both None means L == S and positions 0 .. S-1. See :func:`visible`.
        scale: of the scores; None is 1 / sqrt(Dh).

    A query that sees nothing gives 0: the sink takes all the weight.
    """
    B, S, H, Dh = q.shape
    G = k.shape[2]
    if q_pos is None:
        q_pos = k_pos = torch.arange(S, device=q.device).unsqueeze(0)
    k, v = k.repeat_interleave(H // G, dim=2), v.repeat_interleave(H // G, dim=2)
    scores = torch.einsum("bshd,blhd->bhsl", q.float(), k.float()) * (Dh**-0.5 if scale is None else scale)
    mask = visible(q_pos, k_pos, window).unsqueeze(1)
    scores = scores.masked_fill(~mask, float("-inf"))
    sink = torch.full((H,), float("-inf"), device=q.device) if sinks is None else sinks.float()
    scores = torch.cat((scores, sink.view(1, H, 1, 1).expand(B, H, S, 1)), dim=-1)
    top = scores.amax(-1, keepdim=True).detach().clamp(min=torch.finfo(torch.float32).min)  # finite where all is -inf
    weights = (scores - top).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.einsum("bhsl,blhd->bshd", weights[..., :-1], v.float()).to(q.dtype)


def swiglu(gate_up: Tensor, limit: float = 7.0, alpha: float = 1.702) -> Tensor:
    """[..., 2F] -> [..., F]: gates on even, ups on odd places; gate clamped above, up on both sides; (up + 1) * silu-like.

    gate * sigmoid(alpha * gate) * (up + 1), the activation of GPT-OSS.
    """
    gate, up = gate_up[..., 0::2], gate_up[..., 1::2]
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


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
    """What the chosen experts make of every token, weighted and summed.

    Args:
        x: [T, D].
        indices: int64 [T, K], the experts of each token; -1 marks a slot that is not used.
        weights: fp32 [T, K], what each expert's output is multiplied with.
        gate_up, gate_up_bias: [E, 2F, D] and [E, 2F]; see :func:`swiglu` for the order of rows.
        down, down_bias: [E, D, F] and [E, D].
        norms: also return the length of each expert's output before weighting, for recording.
        gate_up_adapter, down_adapter: what is added to the two weights, which then may stay packed and frozen.

    Returns:
        y [T, D] in x's type, and norms fp32 [T, K] (0 in unused slots) or None.
    """
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    lengths = torch.zeros(indices.shape, dtype=torch.float32, device=x.device) if norms else None
    for e in indices.unique().tolist():
        if e < 0:
            continue
        token, slot = (indices == e).nonzero(as_tuple=True)
        hidden = F.linear(x[token], _expert(gate_up, e, x), gate_up_bias[e].to(x.dtype))
        if gate_up_adapter is not None:
            hidden = hidden + adapter_product(x[token], gate_up_adapter.of(e))
        active = swiglu(hidden, limit, alpha)
        out = F.linear(active, _expert(down, e, x), down_bias[e].to(x.dtype))
        if down_adapter is not None:
            out = out + adapter_product(active, down_adapter.of(e))
        out = out.float()
        if lengths is not None:
            lengths[token, slot] = out.detach().norm(dim=-1)
        y = y.index_add(0, token, out * weights[token, slot].unsqueeze(-1))
    return y.to(x.dtype), lengths


def _expert(weight: Tensor | PackedWeight, e: int, like: Tensor) -> Tensor:
    if isinstance(weight, PackedWeight):
        return weight.decode([e], dtype=like.dtype)[0]
    return weight[e].to(like.dtype)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over targets != -100 of -log softmax(hidden weight^T)[target]: hidden [T, D], weight [V, D], targets [T].

    Without any target it is 0, not 0/0: a batch of nothing but padding teaches nothing and breaks nothing.
    """
    total = F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)
