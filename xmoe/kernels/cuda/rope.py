"""Rotary embedding: for training and prefill, and fused with the cache write for a decode step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from xmoe.kernels.cuda.launch import launch


@triton.jit
def rope_kernel(x, cos, sin, out, S, N, H2, x_b, x_s, x_n, table_b, sign, NP: tl.constexpr, HP: tl.constexpr):
    """All N heads of one token. Pairs are (i, i + Dh/2); `sign` -1 rotates back, which is the gradient."""
    token = tl.program_id(0)
    b, s = token // S, token % S
    n, i = tl.arange(0, NP)[:, None], tl.arange(0, HP)[None, :]
    ok = (n < N) & (i < H2)
    angle = b.to(tl.int64) * table_b + s * H2 + i
    c = tl.load(cos + angle, mask=i < H2, other=0.0)
    z = tl.load(sin + angle, mask=i < H2, other=0.0) * sign
    at = x + b.to(tl.int64) * x_b + s.to(tl.int64) * x_s + n * x_n + i
    x1 = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    x2 = tl.load(at + H2, mask=ok, other=0.0).to(tl.float32)
    to = out + (token.to(tl.int64) * N + n) * (2 * H2) + i
    tl.store(to, (x1 * c - x2 * z).to(out.dtype.element_ty), mask=ok)
    tl.store(to + H2, (x2 * c + x1 * z).to(out.dtype.element_ty), mask=ok)


@triton.jit
def rope_cache_kernel(
    qkv,
    cos,
    sin,
    positions,
    q,
    k_cache,
    v_cache,
    H,
    G,
    H2,
    L,
    NP: tl.constexpr,
    HP: tl.constexpr,
):
    """One new token of one sequence: rotate q and k, put k and v into the cache at position modulo L."""
    b = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + b)
    n, i = tl.arange(0, NP)[:, None], tl.arange(0, HP)[None, :]
    ok = (n < H + 2 * G) & (i < H2)
    c = tl.load(cos + position * H2 + i, mask=i < H2, other=0.0)
    z = tl.load(sin + position * H2 + i, mask=i < H2, other=0.0)
    at = qkv + (b * (H + 2 * G) + n) * (2 * H2) + i
    x1 = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    x2 = tl.load(at + H2, mask=ok, other=0.0).to(tl.float32)
    y1 = tl.where(n < H + G, x1 * c - x2 * z, x1)
    y2 = tl.where(n < H + G, x2 * c + x1 * z, x2)
    to_q = q + (b * H + n) * (2 * H2) + i
    is_q = ok & (n < H)
    tl.store(to_q, y1.to(q.dtype.element_ty), mask=is_q)
    tl.store(to_q + H2, y2.to(q.dtype.element_ty), mask=is_q)
    place = (b * L + position % L) * G
    to_k = k_cache + (place + n - H) * (2 * H2) + i
    is_k = ok & (n >= H) & (n < H + G)
    tl.store(to_k, y1.to(k_cache.dtype.element_ty), mask=is_k)
    tl.store(to_k + H2, y2.to(k_cache.dtype.element_ty), mask=is_k)
    to_v = v_cache + (place + n - H - G) * (2 * H2) + i
    is_v = ok & (n >= H + G)
    tl.store(to_v, y1.to(v_cache.dtype.element_ty), mask=is_v)
    tl.store(to_v + H2, y2.to(v_cache.dtype.element_ty), mask=is_v)


class RopeFunction(torch.autograd.Function):
    """The rotation is orthogonal up to the tables' own scale, so its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(dy, *ctx.saved_tensors, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    B, S, N, Dh = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = x.new_empty(B, S, N, Dh)
    half = Dh // 2
    launch(
        rope_kernel,
        (B * S, 1, 1),
        x=x,
        cos=cos.contiguous(),
        sin=sin.contiguous(),
        out=out,
        S=S,
        N=N,
        H2=half,
        x_b=x.stride(0),
        x_s=x.stride(1),
        x_n=x.stride(2),
        table_b=S * half if cos.shape[0] > 1 else 0,
        sign=sign,
        NP=triton.next_power_of_2(N),
        HP=triton.next_power_of_2(half),
        warps=4,
    )
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, S, N, Dh] by cos, sin fp32 [1 or B, S, Dh/2]; halves of a head form the pairs. Differentiable in x."""
    return RopeFunction.apply(x, cos, sin)


def rope_into_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, heads: int, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Rotate one new token a sequence and store its key and value -> q [B, H, Dh].

    qkv: [B, (H + 2G) * Dh]. cos, sin: fp32 [P, Dh/2], a row a position. positions: int64 [B], on the device, so that a
    captured graph can go on. k_cache, v_cache: [B, L, G, Dh]; a ring where L is smaller than the positions.
    """
    B, L, G, Dh = k_cache.shape
    q = qkv.new_empty(B, heads, Dh)
    launch(
        rope_cache_kernel,
        (B, 1, 1),
        qkv=qkv.contiguous(),
        cos=cos,
        sin=sin,
        positions=positions,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        H=heads,
        G=G,
        H2=Dh // 2,
        L=L,
        NP=triton.next_power_of_2(heads + 2 * G),
        HP=triton.next_power_of_2(Dh // 2),
        warps=4,
    )
    return q
