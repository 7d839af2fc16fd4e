"""Grouped GEMM over rows sorted by expert, in 16-bit or fp32: one product forward, two backward, gathers fused.

`grouped_rows` is x W^T or dy W (the same kernel, other strides) with the gather of tokens, the bias, the scatter back to
slots and, for gate_up, SwiGLU beside what went into it. `grouped_weight` is dy^T x, expert by expert. Each expert's rows
are a range that only the device knows (see `routing`); programs without rows end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xmoe.kernels.cuda import tiles
from xmoe.kernels.cuda.launch import launch
from xmoe.kernels.cuda.routing import SortedRows, map_tiles


@triton.jit
def grouped_rows_kernel(
    x,
    weight,
    bias,
    out,
    active,
    order,
    offsets,
    tile_expert,
    tile_row,
    tiles_m,
    N,
    K,
    weight_e,
    weight_n,
    weight_k,
    limit,
    alpha,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[row, n] = sum over k of x[source(row), k] weight[expert, n, k] + bias; active = SwiGLU(out) where asked for."""
    # Programs that run at the same time form blocks of GROUP row tiles, so their tiles meet in the cache.
    tiles_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + pid % (GROUP * tiles_n) % height
    tile_n = pid % (GROUP * tiles_n) // height
    expert = tl.load(tile_expert + tile_m)
    if expert < 0:
        return
    rows = tl.load(tile_row + tile_m) + tl.arange(0, BM)
    row_ok = rows < tl.load(offsets + expert + 1)
    slot = tl.load(order + rows, mask=row_ok, other=0)
    source = (slot // TOP_K if GATHER else rows).to(tl.int64)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x + source[:, None] * K + k[None, :]
    weight_at = weight + expert.to(tl.int64) * weight_e + n[None, :].to(tl.int64) * weight_n + k[:, None] * weight_k
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if EVEN_K:
            left = tl.load(x_at, mask=row_ok[:, None], other=0.0)
            right = tl.load(weight_at, mask=(n < N)[None, :], other=0.0)
        else:
            inside = k < K - start
            left = tl.load(x_at, mask=row_ok[:, None] & inside[None, :], other=0.0)
            right = tl.load(weight_at, mask=(n < N)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x_at += BK
        weight_at += BK * weight_k
    if bias is not None:
        acc += tl.load(bias + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    target = (slot if SCATTER else rows).to(tl.int64)
    if out is not None:
        at = out + target[:, None] * N + n[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & (n < N)[None, :])
    if active is not None:
        gate, up = tl.split(tl.reshape(acc, (BM, BN // 2, 2)))
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        f = tile_n * (BN // 2) + tl.arange(0, BN // 2)
        at = active + target[:, None] * (N // 2) + f[None, :]
        value = gate * tl.sigmoid(alpha * gate) * (up + 1.0)
        tl.store(at, value.to(active.dtype.element_ty), mask=row_ok[:, None] & (f < N // 2)[None, :])


@triton.jit
def grouped_weight_kernel(
    left,
    right,
    out,
    order,
    offsets,
    M,
    N,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[expert, m, n] = sum over the expert's rows of left[row, m] right[row, n]; zeros for an expert without rows."""
    expert = tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    m = (first + pid % (GROUP * tiles_n) % height) * BM + tl.arange(0, BM)
    n = pid % (GROUP * tiles_n) // height * BN + tl.arange(0, BN)
    begin = tl.load(offsets + expert)
    stop = tl.load(offsets + expert + 1)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(begin, stop, BK):
        rows = start + tl.arange(0, BK)
        row_ok = rows < stop
        token = tl.load(order + rows, mask=row_ok, other=0) // TOP_K
        from_left = (token if GATHER_LEFT else rows).to(tl.int64)
        from_right = (token if GATHER_RIGHT else rows).to(tl.int64)
        a = tl.load(left + from_left[:, None] * M + m[None, :], mask=row_ok[:, None] & (m < M)[None, :], other=0.0)
        b = tl.load(right + from_right[:, None] * N + n[None, :], mask=row_ok[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    at = out + expert.to(tl.int64) * M * N + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def grouped_sum_kernel(
    x, weights, out, order, offsets, N, TOP_K: tl.constexpr, GATHER: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr
):
    """out[expert, n] = sum over the expert's rows of weight(slot) x[source(row), n]: the gradient of a bias."""
    expert = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    begin = tl.load(offsets + expert)
    stop = tl.load(offsets + expert + 1)
    acc = tl.zeros((BN,), tl.float32)
    for start in range(begin, stop, BR):
        rows = start + tl.arange(0, BR)
        row_ok = rows < stop
        slot = tl.load(order + rows, mask=row_ok, other=0)
        source = (slot // TOP_K if GATHER else rows).to(tl.int64)
        at = x + source[:, None] * N + n[None, :]
        value = tl.load(at, mask=row_ok[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + slot, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(value, 0)
    tl.store(out + expert.to(tl.int64) * N + n, acc.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def swiglu_backward_kernel(
    d_active,
    before,
    weights,
    d_before,
    scaled,
    d_weights,
    order,
    offsets,
    E,
    F,
    limit,
    alpha,
    BF: tl.constexpr,
):
    """One row: through the weighting and SwiGLU at once; the activation itself is made again, not read.

    d_active is the gradient before weighting, so its product with the activation is the gradient of the weight.
    """
    row = tl.program_id(0)
    if row >= tl.load(offsets + E):
        return
    slot = tl.load(order + row)
    weight = tl.load(weights + slot).to(tl.float32)
    base = tl.cast(row, tl.int64)
    total = tl.zeros((BF,), tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        pair = start * 2 + tl.arange(0, BF * 2)
        both = tl.load(before + base * 2 * F + pair, mask=pair < 2 * F, other=0.0).to(tl.float32)
        raw_gate, raw_up = tl.split(tl.reshape(both, (BF, 2)))
        incoming = tl.load(d_active + base * F + f, mask=f < F, other=0.0).to(tl.float32)
        gate = tl.minimum(raw_gate, limit)
        up = tl.minimum(tl.maximum(raw_up, -limit), limit)
        sigma = tl.sigmoid(alpha * gate)
        total += incoming * gate * sigma * (up + 1.0)
        tl.store(scaled + base * F + f, (weight * gate * sigma * (up + 1.0)).to(scaled.dtype.element_ty), mask=f < F)
        incoming *= weight
        d_gate = incoming * (up + 1.0) * sigma * (1.0 + alpha * gate * (1.0 - sigma))
        d_up = incoming * gate * sigma
        d_gate = tl.where(raw_gate <= limit, d_gate, 0.0)
        d_up = tl.where((raw_up >= -limit) & (raw_up <= limit), d_up, 0.0)
        joined = tl.reshape(tl.join(d_gate, d_up), (BF * 2,))
        tl.store(d_before + base * 2 * F + pair, joined.to(d_before.dtype.element_ty), mask=pair < 2 * F)
    tl.store(d_weights + slot, tl.sum(total, 0))


def grouped_rows(
    x: Tensor,
    rows: SortedRows,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    gather: bool = False,
    scatter: bool = False,
) -> Tensor:
    """x [R, K] by row, or [T, K] by token with `gather`, times weight [E, N, K]^T (+ bias [E, N]) -> [R, N] in x's dtype.

    `transposed`: weight is [E, K, N], as in the gradient of the input. `scatter`: results in the order of slots, those of
    unused slots unwritten.
    """
    N = weight.shape[2 if transposed else 1]
    out = x.new_empty(rows.count, N)
    _grouped_rows("grouped_rows", x, rows, weight, bias, out, None, 0.0, 0.0, transposed, gather, scatter)
    return out


def grouped_gate_up(
    x: Tensor, rows: SortedRows, weight: Tensor, bias: Tensor, *, limit: float, alpha: float, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """x [T, D] gathered, times weight [E, 2F, D]^T + bias -> (active [R, F] after SwiGLU, [R, 2F] before it if `keep`)."""
    N = weight.shape[1]
    before = x.new_empty(rows.count, N) if keep else None
    active = x.new_empty(rows.count, N // 2)
    _grouped_rows("grouped_gate_up", x, rows, weight, bias, before, active, limit, alpha, False, True, False)
    return active, before


def _grouped_rows(name, x, rows, weight, bias, out, active, limit, alpha, transposed, gather, scatter) -> None:
    weight = weight.contiguous()
    _E, N, K = weight.shape
    strides = {"weight_e": N * K, "weight_n": K, "weight_k": 1}
    if transposed:
        N, K = K, N
        strides = {"weight_e": N * K, "weight_n": 1, "weight_k": N}
    tile = tiles.tile(name, rows.mean_rows, x.device)
    if x.element_size() == 4:
        tile = _narrow(tile)
    tile_map = map_tiles(rows, tile["BM"])
    launch(
        grouped_rows_kernel,
        (tile_map.count * triton.cdiv(N, tile["BN"]), 1, 1),
        x=x.contiguous(),
        weight=weight.to(x.dtype),
        bias=bias,
        out=out,
        active=active,
        order=rows.order,
        offsets=rows.offsets,
        tile_expert=tile_map.expert,
        tile_row=tile_map.row,
        tiles_m=tile_map.count,
        N=N,
        K=K,
        limit=limit,
        alpha=alpha,
        TOP_K=rows.top_k,
        GATHER=gather,
        SCATTER=scatter,
        EVEN_K=K % tile["BK"] == 0,
        **strides,
        **tile,
    )


def _narrow(tile: dict[str, int]) -> dict[str, int]:
    """A tile for fp32 operands, which take twice the shared memory and have no 16-bit matrix path: small and plain."""
    return tile | {
        "BM": min(tile["BM"], 64),
        "BN": min(tile["BN"], 64),
        "BK": min(tile["BK"], 32),
        "warps": 4,
        "stages": 2,
    }


def grouped_weight(
    left: Tensor, right: Tensor, rows: SortedRows, dtype, *, gather_left: bool = False, gather_right: bool = False
) -> Tensor:
    """left^T right over each expert's rows -> [E, M, N] in dtype; left [R, M], right [R, N], or by token where gathered."""
    M, N = left.shape[1], right.shape[1]
    out = left.new_empty(rows.num_experts, M, N, dtype=dtype)
    tile = tiles.tile("grouped_weight", rows.mean_rows, left.device)
    if left.element_size() == 4:
        tile = _narrow(tile)
    launch(
        grouped_weight_kernel,
        (triton.cdiv(M, tile["BM"]) * triton.cdiv(N, tile["BN"]), rows.num_experts, 1),
        left=left.contiguous(),
        right=right.contiguous(),
        out=out,
        order=rows.order,
        offsets=rows.offsets,
        M=M,
        N=N,
        TOP_K=rows.top_k,
        GATHER_LEFT=gather_left,
        GATHER_RIGHT=gather_right,
        **tile,
    )
    return out


def grouped_sum(x: Tensor, rows: SortedRows, dtype, *, weights: Tensor | None = None, gather: bool = False) -> Tensor:
    """Sum of each expert's rows -> [E, N]; x [R, N], or [T, N] by token with `gather`; weights [T, K] scale the rows."""
    N = x.shape[1]
    out = x.new_empty(rows.num_experts, N, dtype=dtype)
    launch(
        grouped_sum_kernel,
        (triton.cdiv(N, 128), rows.num_experts, 1),
        x=x.contiguous(),
        weights=None if weights is None else weights.contiguous(),
        out=out,
        order=rows.order,
        offsets=rows.offsets,
        N=N,
        TOP_K=rows.top_k,
        GATHER=gather,
        BR=32,
        BN=128,
        warps=4,
    )
    return out


def swiglu_backward(
    d_active: Tensor, before: Tensor, weights: Tensor, rows: SortedRows, *, limit: float, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the unweighted output's activation, [R, F], and what SwiGLU was given, [R, 2F] ->

    (gradient before SwiGLU [R, 2F], activation times its weight [R, F], gradient of the weights fp32 [T, K], 0 in unused
    slots; what the down bias adds to it is the caller's).
    """
    R, F = d_active.shape
    d_before, scaled = before.new_empty(before.shape), d_active.new_empty(R, F)
    d_weights = weights.new_empty(weights.shape, dtype=weights.dtype).zero_()
    launch(
        swiglu_backward_kernel,
        (R, 1, 1),
        d_active=d_active,
        before=before.contiguous(),
        weights=weights.contiguous(),
        d_before=d_before,
        scaled=scaled,
        d_weights=d_weights,
        order=rows.order,
        offsets=rows.offsets,
        E=rows.num_experts,
        F=F,
        limit=limit,
        alpha=alpha,
        BF=min(1024, triton.next_power_of_2(F)),
        warps=4,
    )
    return d_before, scaled, d_weights
