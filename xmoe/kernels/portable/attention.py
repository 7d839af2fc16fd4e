"""Causal attention with sinks and a sliding window: through PyTorch's flash kernel on the CPU, else with a mask.

The gradient is written out by hand where the flash kernel runs, so that no more is kept than such a kernel keeps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xmoe.kernels.portable.autocast import compute_dtype
from xmoe.kernels.reference import visible


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
