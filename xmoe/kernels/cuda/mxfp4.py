"""Products with MXFP4 experts that are decoded in registers, on the way to the tensor cores.

Three products over rows sorted by expert (see `routing`), all with repacked weights (see `repack`):
`packed_rows` is x W^T with the gather, bias and SwiGLU of gate_up, or with the bias and scatter of down;
`packed_input_gradient` is dy W, the gradient that flows back through frozen weights.

The weight tile is the left operand: decoded by inline assembly straight into the register fragment that `wgmma` takes,
at about three instructions a weight, scales included. An H200 can issue 4.1 a weight while its memory delivers.
Arithmetic is fp16 with fp32 sums where the weights are exact in fp16 (activations after a norm or after the clamped SwiGLU
are far inside its range, and it has three more bits than bf16); other weights go through fp32 and bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmoe.kernels.cuda import tiles
from xmoe.kernels.cuda.launch import DTYPES, INTERPRETED, launch
from xmoe.kernels.cuda.repack import Repacked
from xmoe.kernels.cuda.routing import SortedRows, map_tiles


@triton.jit
def split_codes(joined, PLAIN: tl.constexpr):
    """Bytes of two codes -> two fp16 tensors, the codes' values times 2^-14 (see `repack` for the bits)."""
    if PLAIN:
        word = joined.to(tl.int32)
        first = ((word & 0x80) | (word & 0x0E)) << 8
        second = ((word & 0x40) << 9) | ((word & 0x30) << 6) | ((word & 0x01) << 9)
        return first.to(tl.int16).to(tl.float16, bitcast=True), second.to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c;
            and.b32 a, $4, 0x8E8E8E8E;
            shl.b32 b, $4, 1;
            and.b32 b, b, 0x82828282;
            shr.u32 c, $4, 2;
            and.b32 c, c, 0x0C0C0C0C;
            or.b32 b, b, c;
            prmt.b32 $0, a, 0, 0x1404;
            prmt.b32 $1, a, 0, 0x3424;
            prmt.b32 $2, b, 0, 0x1404;
            prmt.b32 $3, b, 0, 0x3424;
            }""",
            "=r,=r,=r,=r,r",
            [joined],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def spread_scales(words, PLAIN: tl.constexpr):
    """int32 words of four upper bytes of fp16 scales -> four int32 tensors, each scale twice in its word."""
    if PLAIN:
        return (
            (words & 0xFF) * 0x01000100,
            (words >> 8 & 0xFF) * 0x01000100,
            (words >> 16 & 0xFF) * 0x01000100,
            (words >> 24 & 0xFF) * 0x01000100,
        )
    else:
        return tl.inline_asm_elementwise(
            """
            prmt.b32 $0, $4, 0, 0x0404;
            prmt.b32 $1, $4, 0, 0x1414;
            prmt.b32 $2, $4, 0, 0x2424;
            prmt.b32 $3, $4, 0, 0x3434;
            """,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def scale_pairs(values, scales, PLAIN: tl.constexpr):
    """fp16 values times scales from :func:`spread_scales`, two at a time."""
    if PLAIN:
        return values * (scales & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "mul.f16x2 $0, $1, $2;  // $3", "=r,r,r,r", [values, scales], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def power_of_two(exponent):
    """2^(exponent - 127) as fp32 bits, for exponents 0 to 254; 2^-127 is a subnormal."""
    return tl.where(exponent == 0, 0x00400000, exponent << 23)


@triton.jit
def decode_tile(codes, scales, ROWS: tl.constexpr, EXACT: tl.constexpr, DT: tl.constexpr, PLAIN: tl.constexpr):
    """codes [ROWS, 8, 8] (step, inputs 0-7 and 8-15 joined), scales int32 [ROWS] -> weights [ROWS, 128] in DT."""
    first, second = split_codes(codes, PLAIN)
    values = tl.reshape(tl.permute(tl.join(first, second), (0, 1, 3, 2)), (ROWS, 128))
    if EXACT:
        s_0, s_1, s_2, s_3 = spread_scales(scales, PLAIN)
    else:
        s_0, s_1 = power_of_two(scales & 0xFF), power_of_two(scales >> 8 & 0xFF)
        s_2, s_3 = power_of_two(scales >> 16 & 0xFF), power_of_two(scales >> 24 & 0xFF)
    four = tl.reshape(tl.permute(tl.join(tl.join(s_0, s_1), tl.join(s_2, s_3)), (0, 2, 1)), (ROWS, 4))
    spread = tl.reshape(tl.broadcast_to(four[:, :, None], (ROWS, 4, 32)), (ROWS, 128))
    if EXACT:
        return scale_pairs(values, spread, PLAIN).to(DT)
    else:
        return (values.to(tl.float32) * 16384.0 * spread.to(tl.float32, bitcast=True)).to(DT)


@triton.jit
def packed_rows_kernel(
    x,
    codes,
    scales,
    bias,
    out,
    before,
    order,
    offsets,
    tile_expert,
    tile_row,
    K,
    N,
    row_tiles,
    k_tiles,
    slots,
    limit,
    alpha,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    PAIRED: tl.constexpr,
    SWIGLU: tl.constexpr,
    SCATTER: tl.constexpr,
    KEEP: tl.constexpr,
    EXACT: tl.constexpr,
    DT: tl.constexpr,
    PLAIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KB: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A tile of BM sorted rows by BN weight rows; see :func:`packed_gate_up` and :func:`packed_down`.

    KB tiles of 128 inputs a step; SPLIT programs share the inputs and write partial sums side by side.
    """
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert < 0:
        return
    R: tl.constexpr = BN // 64
    split = tl.program_id(2)
    rows = tl.load(tile_row + tl.program_id(1)) + tl.arange(0, BM)
    row_ok = rows < tl.load(offsets + expert + 1)
    slot = tl.load(order + rows, mask=row_ok, other=0)
    source = (slot // TOP_K if GATHER else rows).to(tl.int64)

    n_tile = tl.program_id(0) * R
    tile_base = expert.to(tl.int64) * row_tiles * k_tiles
    in_block = tl.arange(0, BN)
    # A last block may reach past the weight rows: it reads the last rows again and its results are not stored.
    tile = tile_base + (tl.minimum(n_tile + in_block // 64, row_tiles - 1) * k_tiles).to(tl.int64)
    code_at = codes + tile[:, None] * 4096 + (in_block % 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    scale_at = scales + tile * 64 + in_block % 64
    inputs = tl.arange(0, 128)
    x_at = x + source[None, :] * K + inputs[:, None]

    per_split = tl.cdiv(k_tiles, SPLIT)
    start = split * per_split
    stop = tl.minimum(start + per_split, k_tiles)
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(start, stop, KB):
        for j in tl.static_range(KB):
            step = k + j
            if KB == 1:
                packed = tl.load(code_at + step * 4096)
                scale = tl.load(scale_at + step * 64)
                inside = inputs < K - step * 128
            else:
                present = in_block < tl.where(step < stop, BN, 0)  # the last step may have fewer than KB tiles
                packed = tl.load(code_at + step * 4096, mask=present[:, None], other=0)
                scale = tl.load(scale_at + step * 64, mask=present, other=0)
                inside = inputs < tl.where(step < stop, K - step * 128, 0)
            columns = tl.load(x_at + step * 128, mask=inside[:, None] & row_ok[None, :], other=0.0)
            # From the order of bytes to the order of the fragment: only names of registers change.
            packed = tl.permute(tl.reshape(packed, (R, 2, 4, 8, 4, 4, 2, 2)), (0, 2, 6, 3, 1, 5, 4, 7))
            scale = tl.permute(tl.reshape(scale, (R, 4, 8, 2)), (0, 1, 3, 2))
            weight = decode_tile(tl.reshape(packed, (BN, 8, 8)), tl.reshape(scale, (BN,)), BN, EXACT, DT, PLAIN)
            acc = tl.dot(weight, columns, acc, input_precision="ieee")

    # Row (warp, half, lane) of a fragment is this row of the weight matrix:
    warp, half, lane = in_block % 64 // 16, in_block // 8 % 2, in_block % 8
    if PAIRED:
        n = (n_tile + in_block // 64) * 64 + (warp * 8 + lane) * 2 + half
    else:
        n = (n_tile + in_block // 64) * 64 + warp * 16 + half * 8 + lane
    biased = tl.where(split == 0, N, 0)  # one of the programs that share the inputs adds the bias
    added = tl.load(bias + expert.to(tl.int64) * N + n, mask=n < biased, other=0.0).to(tl.float32)
    acc += added[:, None]
    if KEEP:
        kept = before + rows[None, :].to(tl.int64) * N + n[:, None]
        tl.store(kept, acc.to(before.dtype.element_ty), mask=(n < N)[:, None] & row_ok[None, :])
    if SWIGLU:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1)))
        gate = tl.minimum(tl.reshape(gate, (BN // 2, BM)), limit)
        up = tl.minimum(tl.maximum(tl.reshape(up, (BN // 2, BM)), -limit), limit)
        active = gate * tl.sigmoid(alpha * gate) * (up + 1.0)
        f = n_tile * 32 + tl.arange(0, BN // 2)
        at = out + rows[None, :].to(tl.int64) * (N // 2) + f[:, None]
        tl.store(at, active.to(out.dtype.element_ty), mask=(f < N // 2)[:, None] & row_ok[None, :])
    else:
        target = (slot + split * slots if SCATTER else rows).to(tl.int64)
        at = out + target[None, :] * N + n[:, None]
        tl.store(at, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & row_ok[None, :])


@triton.jit
def packed_input_gradient_kernel(
    dy,
    codes,
    scales,
    out,
    order,
    offsets,
    tile_expert,
    tile_row,
    K,
    N,
    row_tiles,
    k_tiles,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    PAIRED: tl.constexpr,
    SCATTER: tl.constexpr,
    EXACT: tl.constexpr,
    DT: tl.constexpr,
    PLAIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dx[r, k] = sum over n of dy[r, n] W[n, k] for a tile of BM rows and the 128 inputs k of one column of tiles."""
    expert = tl.load(tile_expert + tl.program_id(1))
    if expert < 0:
        return
    R: tl.constexpr = BN // 64
    k_tile = tl.program_id(0)
    rows = tl.load(tile_row + tl.program_id(1)) + tl.arange(0, BM)
    row_ok = rows < tl.load(offsets + expert + 1)
    slot = tl.load(order + rows, mask=row_ok, other=0)
    source = (slot // TOP_K if GATHER else rows).to(tl.int64)
    tile_base = expert.to(tl.int64) * row_tiles * k_tiles + k_tile
    in_block = tl.arange(0, BN)
    dy_at = dy + source[:, None] * N + in_block[None, :]
    acc = tl.zeros((BM, 128), tl.float32)
    for n_tile in range(0, row_tiles, R):
        tile = tile_base + (tl.minimum(n_tile + in_block // 64, row_tiles - 1) * k_tiles).to(tl.int64)
        packed = tl.load(codes + tile[:, None] * 4096 + (in_block % 64)[:, None] * 64 + tl.arange(0, 64)[None, :])
        scale = tl.load(scales + tile * 64 + in_block % 64)
        inside = (in_block < N - n_tile * 64)[None, :] & row_ok[:, None]
        gradient = tl.load(dy_at + n_tile * 64, mask=inside, other=0.0)
        # Here the weight is the right operand and passes through shared memory, so its rows go back to their own order.
        packed = tl.reshape(packed, (R, 2, 4, 8, 4, 4, 2, 2))
        scale = tl.reshape(scale, (R, 4, 8, 2))
        if PAIRED:
            packed = tl.permute(packed, (0, 2, 3, 6, 1, 5, 4, 7))
        else:
            packed = tl.permute(packed, (0, 2, 6, 3, 1, 5, 4, 7))
            scale = tl.permute(scale, (0, 1, 3, 2))
        weight = decode_tile(tl.reshape(packed, (BN, 8, 8)), tl.reshape(scale, (BN,)), BN, EXACT, DT, PLAIN)
        acc = tl.dot(gradient, weight, acc, input_precision="ieee")
    target = (slot if SCATTER else rows).to(tl.int64)
    k = k_tile * 128 + tl.arange(0, 128)
    at = out + target[:, None] * K + k[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & (k < K)[None, :])


class Hidden(NamedTuple):
    """active: [R, F] after SwiGLU, rows sorted by expert. before: [R, 2F] before it, or None when not kept."""

    active: Tensor
    before: Tensor | None


def compute_dtype(packed: Repacked, x: Tensor) -> torch.dtype:
    """fp16 where these weights are exact in it, else bf16; fp32 input stays fp32 (exact, and slow: for checking)."""
    if x.dtype == torch.float32:
        return torch.float32
    return torch.float16 if packed.exact else torch.bfloat16


def packed_gate_up(
    x: Tensor,
    rows: SortedRows,
    packed: Repacked,
    bias: Tensor,
    *,
    limit: float,
    alpha: float,
    keep: bool = False,
) -> Hidden:
    """x [T, D] gathered by expert, times gate_up, plus bias, through the clamped SwiGLU -> :class:`Hidden`.

    packed: [E, 2F, D], `paired`. bias: [E, 2F]. keep: also return what came before SwiGLU, in x's dtype, for a backward pass.
    """
    _E, N, _K = packed.shape
    dtype = compute_dtype(packed, x)
    active = x.new_empty(rows.count, N // 2, dtype=dtype)
    before = x.new_empty(rows.count, N) if keep else None
    _packed_rows("mxfp4_gate_up", x.to(dtype), rows, packed, bias, active, before, limit, alpha, gather=True)
    return Hidden(active, before)


def packed_down(active: Tensor, rows: SortedRows, packed: Repacked, bias: Tensor) -> Tensor:
    """active [R, F] sorted by expert, times down, plus bias -> fp32 partial sums [S, T*K, D] in the order of slots.

    Sum over S (programs that shared the inputs), weigh and add up the K slots of each token: `norm.combine`.
    Slots that are not used are left unwritten.
    """
    _E, N, _K = packed.shape
    split = tiles.tile("mxfp4_down", rows.mean_rows, active.device)["SPLIT"]
    out = active.new_empty(split, rows.count, N, dtype=torch.float32)
    _packed_rows("mxfp4_down", active, rows, packed, bias, out, None, 0.0, 0.0, scatter=True)
    return out


def packed_linear(x: Tensor, rows: SortedRows, packed: Repacked, bias: Tensor) -> Tensor:
    """x [R, K] sorted by expert, times W^T, plus bias [E, N] -> [R, N] in the dtype products run in, sorted alike."""
    _E, N, _K = packed.shape
    dtype = compute_dtype(packed, x)
    out = x.new_empty(x.shape[0], N, dtype=dtype)
    _packed_rows("mxfp4_linear", x.to(dtype), rows, packed, bias, out, None, 0.0, 0.0)
    return out


def _packed_rows(name, x, rows, packed, bias, out, before, limit, alpha, *, gather=False, scatter=False) -> None:
    _E, N, K = packed.shape
    row_tiles, k_tiles = packed.codes.shape[1:3]
    tile = tiles.tile(name, rows.mean_rows, x.device)
    if name != "mxfp4_down":
        tile["SPLIT"] = 1  # SwiGLU and rounding need whole sums
    tile_map = map_tiles(rows, tile["BM"])
    launch(
        packed_rows_kernel,
        (triton.cdiv(row_tiles, tile["BN"] // 64), tile_map.count, tile["SPLIT"]),
        x=x.contiguous(),
        codes=packed.codes,
        scales=packed.scales.view(torch.int32),
        bias=bias,
        out=out,
        before=before,
        order=rows.order,
        offsets=rows.offsets,
        tile_expert=tile_map.expert,
        tile_row=tile_map.row,
        K=K,
        N=N,
        row_tiles=row_tiles,
        k_tiles=k_tiles,
        slots=rows.count,
        limit=limit,
        alpha=alpha,
        TOP_K=rows.top_k,
        GATHER=gather,
        PAIRED=packed.paired,
        SWIGLU=name == "mxfp4_gate_up",
        SCATTER=scatter,
        KEEP=before is not None,
        EXACT=packed.exact,
        DT=DTYPES[x.dtype],
        PLAIN=INTERPRETED,
        **tile,
    )


def packed_input_gradient(
    dy: Tensor, rows: SortedRows, packed: Repacked, *, gather: bool = False, scatter: bool = False
) -> Tensor:
    """dy W through frozen weights -> [R, K] in dy's dtype.

    dy: [R, N] sorted by expert, or [T, N] by token with `gather`. `scatter` returns rows in the order of slots instead,
    unused ones unwritten.
    """
    _E, N, K = packed.shape
    row_tiles, k_tiles = packed.codes.shape[1:3]
    out = dy.new_empty(rows.count, K)
    tile = tiles.tile("mxfp4_input_gradient", rows.mean_rows, dy.device)
    tile_map = map_tiles(rows, tile["BM"])
    launch(
        packed_input_gradient_kernel,
        (k_tiles, tile_map.count, 1),
        dy=dy.contiguous(),
        codes=packed.codes,
        scales=packed.scales.view(torch.int32),
        out=out,
        order=rows.order,
        offsets=rows.offsets,
        tile_expert=tile_map.expert,
        tile_row=tile_map.row,
        K=K,
        N=N,
        row_tiles=row_tiles,
        k_tiles=k_tiles,
        TOP_K=rows.top_k,
        GATHER=gather,
        PAIRED=packed.paired,
        SCATTER=scatter,
        EXACT=packed.exact,
        DT=DTYPES[dy.dtype],
        PLAIN=INTERPRETED,
        **tile,
    )
    return out
