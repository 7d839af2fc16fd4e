"""Attention of many tokens, for prefill and training: FlashAttention-2's passes with sinks, windows and positions.

Scores are never stored: the forward pass keeps one log-sum-exp a query, sink included, and the backward pass makes the
weights again from it (arXiv 2307.08691). The sink is one more term of that sum; its gradient is -weight(sink) * <dO, O>.
Without positions (S == L, 0 .. S-1) blocks that no query sees are skipped; with positions the forward pass first reads
each key block's range of positions and skips by that.
Every sum has a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from xmoe.kernels.cuda import tiles
from xmoe.kernels.cuda.launch import launch

_LOG2E = 1.4426950408889634


@triton.jit
def _seen(here, there, window, WINDOW: tl.constexpr):
    """[queries, keys] True where the key at position `there` is visible from `here`; -1 marks what is no token."""
    seen = (there[None, :] >= 0) & (there[None, :] <= here[:, None])
    if WINDOW:
        seen = seen & (here[:, None] - there[None, :] < window)
    return seen


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    sinks,
    q_pos,
    k_pos,
    oldest,
    newest,
    out,
    lse,
    S,
    L,
    H,
    group,
    Dh,
    window,
    scale,
    LOG2E: tl.constexpr,
    WINDOW: tl.constexpr,
    POSITIONS: tl.constexpr,
    BQ: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BP: tl.constexpr,
):
    """BQ queries of one head -> out [B, S, H, Dh] and lse [B, H, S], to the base 2."""
    b, head = tl.program_id(1) // H, tl.program_id(1) % H
    G = H // group
    # The last queries see the most keys: start with them, so that no long program is left alone at the end.
    s = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ + tl.arange(0, BQ)
    d = tl.arange(0, BD)
    q_at = ((b.to(tl.int64) * S + s[:, None]) * H + head) * Dh + d[None, :]
    query = tl.load(q + q_at, mask=(s < S)[:, None] & (d < Dh)[None, :], other=0.0)
    if POSITIONS:
        here = tl.load(q_pos + b.to(tl.int64) * S + s, mask=s < S, other=-1)
        # Keys lie in blocks of BT; `oldest` and `newest` are the range of positions in each.
        first, last = L, 0
        blocks = tl.cdiv(L, BT)
        latest = tl.max(here, 0)
        earliest = tl.min(tl.where(here >= 0, here, 1 << 40), 0)
        for at in range(0, blocks, BP):
            block = at + tl.arange(0, BP)
            low = tl.load(oldest + b.to(tl.int64) * blocks + block, mask=block < blocks, other=1 << 40)
            high = tl.load(newest + b.to(tl.int64) * blocks + block, mask=block < blocks, other=-1)
            useful = (high >= 0) & (low <= latest)
            if WINDOW:
                useful = useful & (earliest - high < window)
            first = tl.minimum(first, tl.min(tl.where(useful, block, blocks), 0) * BT)
            last = tl.maximum(last, tl.max(tl.where(useful, block + 1, 0), 0) * BT)
        last = tl.minimum(last, L)
    else:
        here = tl.where(s < S, s, -1)
        first = 0
        if WINDOW:
            first = tl.maximum(tl.min(s, 0) - window + 1, 0) // BT * BT
        last = tl.minimum(tl.max(s, 0) + 1, L)
    top = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    if sinks is not None:
        top = tl.zeros((BQ,), tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros((BQ, BD), tl.float32)
    base = (b.to(tl.int64) * L * G + head // group) * Dh
    for start in range(first, last, BT):
        t = start + tl.arange(0, BT)
        at = base + t[:, None].to(tl.int64) * (G * Dh) + d[None, :]
        inside = (t < L)[:, None] & (d < Dh)[None, :]
        keys = tl.load(k + at, mask=inside, other=0.0)
        if POSITIONS:
            there = tl.load(k_pos + b.to(tl.int64) * L + t, mask=t < L, other=-1)
        else:
            there = tl.where(t < L, t, -1)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(_seen(here, there, window, WINDOW), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        values = tl.load(v + at, mask=inside, other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = higher
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(out + q_at, (acc / safe[:, None]).to(out.dtype.element_ty), mask=(s < S)[:, None] & (d < Dh)[None, :])
    # A query that sees nothing, without a sink: +inf makes all its weights 0 in the backward pass.
    norm = tl.where(total == 0.0, float("inf"), top + tl.log2(safe))
    tl.store(lse + tl.program_id(1).to(tl.int64) * S + s, norm, mask=s < S)


@triton.jit
def query_gradient_kernel(
    q,
    k,
    v,
    q_pos,
    k_pos,
    dout,
    lse,
    delta,
    dq,
    S,
    L,
    H,
    group,
    Dh,
    window,
    scale,
    LOG2E: tl.constexpr,
    WINDOW: tl.constexpr,
    POSITIONS: tl.constexpr,
    BQ: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """dq of BQ queries of one head."""
    b, head = tl.program_id(1) // H, tl.program_id(1) % H
    G = H // group
    s, d = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, BD)
    q_at = ((b.to(tl.int64) * S + s[:, None]) * H + head) * Dh + d[None, :]
    q_ok = (s < S)[:, None] & (d < Dh)[None, :]
    query, gradient = tl.load(q + q_at, mask=q_ok, other=0.0), tl.load(dout + q_at, mask=q_ok, other=0.0)
    stat = tl.program_id(1).to(tl.int64) * S + s
    norm = tl.load(lse + stat, mask=s < S, other=float("inf"))
    inner = tl.load(delta + stat, mask=s < S, other=0.0)
    first, last = 0, L
    if POSITIONS:
        here = tl.load(q_pos + b.to(tl.int64) * S + s, mask=s < S, other=-1)
    else:
        here = tl.where(s < S, s, -1)
        if WINDOW:
            first = tl.maximum(tl.min(s, 0) - window + 1, 0) // BT * BT
        last = tl.minimum(tl.max(s, 0) + 1, L)
    acc = tl.zeros((BQ, BD), tl.float32)
    base = (b.to(tl.int64) * L * G + head // group) * Dh
    for start in range(first, last, BT):
        t = start + tl.arange(0, BT)
        at = base + t[:, None].to(tl.int64) * (G * Dh) + d[None, :]
        inside = (t < L)[:, None] & (d < Dh)[None, :]
        keys = tl.load(k + at, mask=inside, other=0.0)
        values = tl.load(v + at, mask=inside, other=0.0)
        if POSITIONS:
            there = tl.load(k_pos + b.to(tl.int64) * L + t, mask=t < L, other=-1)
        else:
            there = tl.where(t < L, t, -1)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        p = tl.where(_seen(here, there, window, WINDOW), tl.exp2(scores - norm[:, None]), 0.0)
        dp = tl.dot(gradient, tl.trans(values), input_precision="ieee")
        ds = p * (dp - inner[:, None])
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="ieee")
    tl.store(dq + q_at, (acc * scale).to(dq.dtype.element_ty), mask=q_ok)


@triton.jit
def key_gradient_kernel(
    q,
    k,
    v,
    q_pos,
    k_pos,
    dout,
    lse,
    delta,
    dk,
    dv,
    S,
    L,
    H,
    group,
    Dh,
    window,
    scale,
    LOG2E: tl.constexpr,
    WINDOW: tl.constexpr,
    POSITIONS: tl.constexpr,
    BQ: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """dk and dv of BT keys of one key-value head, summed over the query heads that read it."""
    G = H // group
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    k_at = ((b.to(tl.int64) * L + t[:, None]) * G + g) * Dh + d[None, :]
    k_ok = (t < L)[:, None] & (d < Dh)[None, :]
    keys, values = tl.load(k + k_at, mask=k_ok, other=0.0), tl.load(v + k_at, mask=k_ok, other=0.0)
    first, last = 0, S
    if POSITIONS:
        there = tl.load(k_pos + b.to(tl.int64) * L + t, mask=t < L, other=-1)
    else:
        there = tl.where(t < L, t, -1)
        first = tl.min(t, 0) // BQ * BQ
        if WINDOW:
            last = tl.minimum(tl.max(t, 0) + window, S)
    acc_k = tl.zeros((BT, BD), tl.float32)
    acc_v = tl.zeros((BT, BD), tl.float32)
    for head in range(g * group, (g + 1) * group):
        stat = (b.to(tl.int64) * H + head) * S
        for start in range(first, last, BQ):
            s = start + tl.arange(0, BQ)
            q_at = ((b.to(tl.int64) * S + s[:, None]) * H + head) * Dh + d[None, :]
            q_ok = (s < S)[:, None] & (d < Dh)[None, :]
            query = tl.load(q + q_at, mask=q_ok, other=0.0)
            gradient = tl.load(dout + q_at, mask=q_ok, other=0.0)
            norm = tl.load(lse + stat + s, mask=s < S, other=float("inf"))
            inner = tl.load(delta + stat + s, mask=s < S, other=0.0)
            if POSITIONS:
                here = tl.load(q_pos + b.to(tl.int64) * S + s, mask=s < S, other=-1)
            else:
                here = tl.where(s < S, s, -1)
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
            p = tl.where(_seen(here, there, window, WINDOW), tl.exp2(scores - norm[:, None]), 0.0)
            acc_v = tl.dot(tl.trans(p).to(gradient.dtype), gradient, acc_v, input_precision="ieee")
            dp = tl.dot(gradient, tl.trans(values), input_precision="ieee")
            ds = p * (dp - inner[:, None])
            acc_k = tl.dot(tl.trans(ds).to(query.dtype), query, acc_k, input_precision="ieee")
    tl.store(dk + k_at, (acc_k * scale).to(dk.dtype.element_ty), mask=k_ok)
    tl.store(dv + k_at, acc_v.to(dv.dtype.element_ty), mask=k_ok)


@triton.jit
def range_kernel(k_pos, oldest, newest, L, BT: tl.constexpr):
    """The smallest and largest position of each block of BT keys, padding (-1) left out."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    at = tl.program_id(1).to(tl.int64)
    there = tl.load(k_pos + at * L + t, mask=t < L, other=-1)
    to = at * tl.num_programs(0) + tl.program_id(0)
    tl.store(oldest + to, tl.min(tl.where(there >= 0, there, 1 << 40), 0))
    tl.store(newest + to, tl.max(there, 0))


def _tile(name: str, rows: int, like: Tensor) -> dict[str, int]:
    tile = tiles.tile(name, rows, like.device)
    if like.element_size() == 4:  # fp32 tiles take twice the shared memory and have no 16-bit matrix path
        tile |= {"BQ": min(tile["BQ"], 32), "BT": min(tile["BT"], 32), "warps": 4, "stages": 1}
    return tile


class FlashFunction(torch.autograd.Function):
    """See :func:`flash_attention`."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, window, q_pos, k_pos, scale):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        B, S, H, Dh = q.shape
        L, G = k.shape[1:3]
        shared = {"S": S, "L": L, "H": H, "group": H // G, "Dh": Dh, "window": window or 0, "LOG2E": _LOG2E}
        shared |= {"WINDOW": window is not None, "POSITIONS": q_pos is not None}
        shared["BD"] = max(16, triton.next_power_of_2(Dh))
        tile = _tile("flash_forward", S, q)
        oldest = newest = None
        if q_pos is not None:
            q_pos, k_pos = q_pos.expand(B, S).contiguous(), k_pos.expand(B, L).contiguous()
            blocks = triton.cdiv(L, tile["BT"])
            oldest, newest = k_pos.new_empty(2, B, blocks)
            launch(
                range_kernel,
                (blocks, B, 1),
                k_pos=k_pos,
                oldest=oldest,
                newest=newest,
                L=L,
                BT=tile["BT"],
                warps=1,
            )
        out, lse = q.new_empty(B, S, H, Dh), q.new_empty(B, H, S, dtype=torch.float32)
        launch(
            forward_kernel,
            (triton.cdiv(S, tile["BQ"]), B * H, 1),
            q=q,
            k=k,
            v=v,
            sinks=sinks,
            q_pos=q_pos,
            k_pos=k_pos,
            oldest=oldest,
            newest=newest,
            out=out,
            lse=lse,
            scale=scale * _LOG2E,
            BP=64,
            **shared,
            **tile,
        )
        ctx.save_for_backward(q, k, v, sinks, q_pos, k_pos, out, lse)
        ctx.scale, ctx.shared = scale, shared
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, sinks, q_pos, k_pos, out, lse = ctx.saved_tensors
        B, S, H, _ = q.shape
        L, G = k.shape[1:3]
        dout = dout.to(q.dtype).contiguous()
        delta = (dout.float() * out.float()).sum(-1).transpose(1, 2).contiguous()  # [B, H, S]
        shared = {"q": q, "k": k, "v": v, "q_pos": q_pos, "k_pos": k_pos, "dout": dout, "lse": lse, "delta": delta}
        shared |= ctx.shared | {"scale": ctx.scale}
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        tile = _tile("flash_query_gradient", S, q)
        launch(query_gradient_kernel, (triton.cdiv(S, tile["BQ"]), B * H, 1), dq=dq, **shared, **tile)
        tile = _tile("flash_key_gradient", L, q)
        launch(key_gradient_kernel, (triton.cdiv(L, tile["BT"]), B * G, 1), dk=dk, dv=dv, **shared, **tile)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            weight = torch.exp2(sinks.float().view(1, H, 1) * _LOG2E - lse)
            dsinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None, None, None


def flash_attention(
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
    """As :func:`xmoe.kernels.reference.attention`; differentiable in q, k, v and sinks."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return FlashFunction.apply(q, k, v, sinks, window, q_pos, k_pos, scale)
