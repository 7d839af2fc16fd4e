"""Attention of a few new tokens over a cache: keys are split among programs, a second kernel joins the parts.

One program holds all query heads that read one key-value head (8 in GPT-OSS, padded to a 16-row tile) and walks along its
share of the keys, so the cache is read once. The sink takes part where the parts are joined: a logit without a value.
Which keys a query sees comes either from positions (any order, as in a ring) or from one count a sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmoe.kernels.cuda import tiles
from xmoe.kernels.cuda.launch import launch

_LOG2E = 1.4426950408889634


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    q_pos,
    k_pos,
    lengths,
    parts,
    tops,
    sums,
    S,
    L,
    G,
    group,
    Dh,
    window,
    scale,
    q_b,
    q_s,
    k_b,
    k_l,
    k_g,
    v_b,
    v_l,
    v_g,
    WINDOW: tl.constexpr,
    POSITIONS: tl.constexpr,
    SPLITS: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """One (sequence, key-value head) and one share of the keys -> unnormalised sum, largest score, sum of exponentials."""
    b, g, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    row, d = tl.arange(0, BR), tl.arange(0, BD)
    s, head = row // group, g * group + row % group
    row_ok = row < S * group
    q_at = q + b.to(tl.int64) * q_b + s[:, None].to(tl.int64) * q_s + head[:, None] * Dh + d[None, :]
    query = tl.load(q_at, mask=row_ok[:, None] & (d < Dh)[None, :], other=0.0)
    if POSITIONS:
        here = tl.load(q_pos + b.to(tl.int64) * S + s, mask=row_ok, other=-1)
        count = L
    else:
        count = tl.minimum(tl.load(lengths + b) + 1, L).to(tl.int32)
    share = tl.cdiv(tl.cdiv(count, BT), SPLITS) * BT
    begin = split * share
    stop = tl.minimum(begin + share, count)
    top = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    acc = tl.zeros((BR, BD), tl.float32)
    k_base = k + b.to(tl.int64) * k_b + g * k_g
    v_base = v + b.to(tl.int64) * v_b + g * v_g
    for start in range(begin, stop, BT):
        t = start + tl.arange(0, BT)
        inside = (t < stop)[:, None] & (d < Dh)[None, :]
        keys = tl.load(k_base + t[:, None].to(tl.int64) * k_l + d[None, :], mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if POSITIONS:
            there = tl.load(k_pos + b.to(tl.int64) * L + t, mask=t < stop, other=-1)
            seen = (there[None, :] >= 0) & (there[None, :] <= here[:, None])
            if WINDOW:
                seen = seen & (here[:, None] - there[None, :] < window)
        else:
            seen = (t < stop)[None, :] & row_ok[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        values = tl.load(v_base + t[:, None].to(tl.int64) * v_l + d[None, :], mask=inside, other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = higher
    at = (tl.program_id(0).to(tl.int64) * SPLITS + split) * BR + row
    tl.store(parts + at[:, None] * BD + d[None, :], acc)
    tl.store(tops + at, top)
    tl.store(sums + at, total)


@triton.jit
def join_kernel(
    parts,
    tops,
    sums,
    sinks,
    out,
    S,
    G,
    group,
    Dh,
    LOG2E: tl.constexpr,
    SPLITS: tl.constexpr,
    SP: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """One query row: the parts of its sum, weighed by their largest scores, and the sink -> out [B, S, H, Dh]."""
    row = tl.program_id(1)
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    head = g * group + row % group
    split, d = tl.arange(0, SP), tl.arange(0, BD)
    at = (tl.program_id(0).to(tl.int64) * SPLITS + split) * BR + row
    top = tl.load(tops + at, mask=split < SPLITS, other=float("-inf"))
    highest = tl.max(top, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sink)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(top - safe)
    total = tl.sum(tl.load(sums + at, mask=split < SPLITS, other=0.0) * weight, 0)
    if sinks is not None:
        total += tl.exp2(sink - safe)
    part = tl.load(parts + at[:, None] * BD + d[None, :], mask=(split < SPLITS)[:, None], other=0.0)
    mixed = tl.sum(part * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    to = ((b.to(tl.int64) * S + row // group) * G * group + head) * Dh + d
    tl.store(out + to, mixed.to(out.dtype.element_ty), mask=d < Dh)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *,
    window: int | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """As :func:`xmoe.kernels.reference.attention` for few queries: S * H / G at most 64; no gradients.

    Instead of q_pos and k_pos, `lengths` int64 [B] may give each sequence's tokens before the newest (S is 1): it sees the
    first min(length + 1, L) keys, in whatever order they lie, which is right for a full cache and for a ring of L keys
    that is no longer than the window. The newest token's key must be in the cache already.
    """
    B, S, H, Dh = q.shape
    L, G = k.shape[1:3]
    group = H // G
    scale = Dh**-0.5 if scale is None else scale
    block_rows = max(16, triton.next_power_of_2(S * group))
    tile = tiles.tile("decode_attention", L, q.device)
    # Enough programs to fill the device, none with less than one block of keys.
    splits = max(1, min(tile.pop("SPLITS"), triton.cdiv(L, tile["BT"])))
    width = max(16, triton.next_power_of_2(Dh))
    parts = q.new_empty(B * G, splits, block_rows, width, dtype=torch.float32)
    tops, sums = q.new_empty(2, B * G, splits, block_rows, dtype=torch.float32)
    if q.stride(-1) != 1 or q.stride(2) != Dh:
        q = q.contiguous()
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    launch(
        decode_kernel,
        (B * G, splits, 1),
        q=q,
        k=k,
        v=v,
        q_pos=None if q_pos is None else q_pos.expand(B, S).contiguous(),
        k_pos=None if k_pos is None else k_pos.expand(B, L).contiguous(),
        lengths=lengths,
        parts=parts,
        tops=tops,
        sums=sums,
        S=S,
        L=L,
        G=G,
        group=group,
        Dh=Dh,
        window=window or 0,
        scale=scale * _LOG2E,
        q_b=q.stride(0),
        q_s=q.stride(1),
        k_b=k.stride(0),
        k_l=k.stride(1),
        k_g=k.stride(2),
        v_b=v.stride(0),
        v_l=v.stride(1),
        v_g=v.stride(2),
        WINDOW=window is not None,
        POSITIONS=lengths is None,
        SPLITS=splits,
        BR=block_rows,
        BD=width,
        **tile,
    )
    out = q.new_empty(B, S, H, Dh)
    launch(
        join_kernel,
        (B * G, S * group, 1),
        parts=parts,
        tops=tops,
        sums=sums,
        sinks=sinks,
        out=out,
        S=S,
        G=G,
        group=group,
        Dh=Dh,
        LOG2E=_LOG2E,
        SPLITS=splits,
        SP=triton.next_power_of_2(splits),
        BR=block_rows,
        BD=width,
        warps=2,
    )
    return out
