"""From router logits to work for the expert kernels, all on the device: the host never learns how many rows an expert got.

A *slot* is one of the T*K (token, choice) pairs, counted t*K + k; a *row* is a slot's place after a stable sort by expert.
Kernels get `order` (row -> slot), `offsets` (expert -> first row) and a tile map (program -> expert and first row), whose
length is an upper bound that depends on T*K and E alone, so a captured graph stays valid whatever the router decides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xmoe.kernels.cuda.launch import launch

_ONE_PROGRAM = 512  # slots up to here are sorted by a single program: one launch, no exchange between programs
_PROGRAMS = 128  # most programs of the larger sort; the middle step holds one counter each in registers


class TileMap(NamedTuple):
    """expert, row: int32 [count], what each program of a grouped kernel works on; expert -1 where there is nothing."""

    expert: Tensor
    row: Tensor
    count: int


class SortedRows(NamedTuple):
    """Slots in the order of their experts; see the top of this file.

    order: int32 [T*K], slot of each row (rows from offsets[E] on are not set). offsets: int32 [E+1]. top_k: K.
    tile_maps: by rows a tile, filled when asked for.
    """

    order: Tensor
    offsets: Tensor
    top_k: int
    tile_maps: dict[int, TileMap]

    @property
    def count(self) -> int:
        """T*K: rows at most."""
        return self.order.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1

    @property
    def mean_rows(self) -> int:
        """Rows an expert when all get the same, rounded up: what chooses a tile."""
        return -(-self.count // self.num_experts)


def most_tiles(count: int, num_experts: int, rows_per_tile: int) -> int:
    """How many tiles `count` rows of at most `num_experts` experts can need: one each, and one for every full tile more."""
    used = min(count, num_experts)
    return used + (count - used) // rows_per_tile


@triton.jit
def _count(indices, begin, end, EP: tl.constexpr, BS: tl.constexpr):
    """Slots of each expert among indices[begin:end] -> int32 [EP]."""
    experts = tl.arange(0, EP)
    counts = tl.zeros((EP,), tl.int32)
    for start in range(begin, end, BS):
        slot = start + tl.arange(0, BS)
        chosen = tl.load(indices + slot, mask=slot < end, other=-1).to(tl.int32)
        counts += tl.sum((chosen[:, None] == experts[None, :]).to(tl.int32), 0)
    return counts


@triton.jit
def _place(indices, order, begin, end, base, EP: tl.constexpr, BS: tl.constexpr):
    """Write the slots of indices[begin:end] to their rows; base [EP] is the row of each expert's next slot."""
    experts = tl.arange(0, EP)
    for start in range(begin, end, BS):
        slot = start + tl.arange(0, BS)
        chosen = tl.load(indices + slot, mask=slot < end, other=-1).to(tl.int32)
        hit = (chosen[:, None] == experts[None, :]).to(tl.int32)
        rank = tl.cumsum(hit, 0) - hit
        row = tl.sum(hit * (base[None, :] + rank), 1)
        tl.store(order + row, slot, mask=tl.sum(hit, 1) > 0)
        base += tl.sum(hit, 0)


@triton.jit
def _map_tiles(counts, first, tile_expert, tile_row, tiles, EP: tl.constexpr, BM: tl.constexpr):
    experts = tl.arange(0, EP)
    needed = (counts + BM - 1) // BM
    stop = tl.cumsum(needed, 0)
    begin = stop - needed
    for start in range(0, tiles, 64):
        t = start + tl.arange(0, 64)
        mine = ((t[:, None] >= begin[None, :]) & (t[:, None] < stop[None, :])).to(tl.int32)
        row = tl.sum(mine * (first[None, :] + (t[:, None] - begin[None, :]) * BM), 1)
        expert = tl.sum(mine * (experts[None, :] + 1), 1) - 1
        tl.store(tile_expert + t, expert, mask=t < tiles)
        tl.store(tile_row + t, row, mask=t < tiles)


@triton.jit
def _choose(logits, bias, indices, weights, tokens, T, E, K: tl.constexpr, EP: tl.constexpr):
    """Top K of each token's logits plus bias, softmax over those; the smaller id first among equals."""
    experts = tl.arange(0, EP)
    ok = (tokens < T)[:, None] & (experts < E)[None, :]
    score = tl.load(logits + tokens[:, None].to(tl.int64) * E + experts[None, :], mask=ok, other=float("-inf"))
    if bias is not None:
        score += tl.load(bias + experts, mask=experts < E, other=0.0).to(tl.float32)[None, :]
    # A NaN would never equal the maximum: let it win as the largest, so its row shows NaN weights and valid experts.
    score = tl.where(score == score, score, float("inf"))
    score = tl.where((tokens < T)[:, None], score, 0.0)
    top = tl.max(score, 1)
    taken = tl.broadcast_to((experts >= E)[None, :], score.shape)
    total = tl.zeros_like(top)
    for _ in tl.static_range(K):
        best, id, taken = _next_best(score, taken, experts, EP)
        total += tl.exp(best - top)
    taken = tl.broadcast_to((experts >= E)[None, :], score.shape)
    for k in tl.static_range(K):
        best, id, taken = _next_best(score, taken, experts, EP)
        at = tokens.to(tl.int64) * K + k
        tl.store(indices + at, id.to(indices.dtype.element_ty), mask=tokens < T)
        tl.store(weights + at, tl.exp(best - top) / total, mask=tokens < T)


@triton.jit
def _next_best(score, taken, experts, EP: tl.constexpr):
    left = tl.where(taken, float("-inf"), score)
    best = tl.max(left, 1)
    id = tl.min(tl.where((left == best[:, None]) & (taken == 0), experts[None, :], EP), 1)
    return best, id, taken | (experts[None, :] == id[:, None])


@triton.jit
def choose_kernel(logits, bias, indices, weights, T, E, K: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr):
    """BT tokens a program; see :func:`choose`."""
    _choose(logits, bias, indices, weights, tl.program_id(0) * BT + tl.arange(0, BT), T, E, K, EP)


@triton.jit
def sort_kernel(
    logits,
    bias,
    weights,
    indices,
    order,
    offsets,
    tile_expert,
    tile_row,
    T,
    count,
    tiles,
    E,
    K: tl.constexpr,
    CHOOSE: tl.constexpr,
    EP: tl.constexpr,
    BS: tl.constexpr,
    BM: tl.constexpr,
):
    """The whole of choosing, counting, sorting and mapping in one program, for a decode step's few slots."""
    if CHOOSE:
        for start in range(0, T, 16):
            _choose(logits, bias, indices, weights, start + tl.arange(0, 16), T, E, K, EP)
        tl.debug_barrier()  # the choices are read back below, by other threads of this program
    experts = tl.arange(0, EP)
    counts = _count(indices, 0, count, EP, BS)
    first = tl.cumsum(counts, 0) - counts
    tl.store(offsets + experts, first, mask=experts < E)
    tl.store(offsets + E, tl.sum(counts, 0))
    _place(indices, order, 0, count, first, EP, BS)
    _map_tiles(counts, first, tile_expert, tile_row, tiles, EP, BM)


@triton.jit
def count_kernel(indices, counts, count, chunk, EP: tl.constexpr, BS: tl.constexpr):
    """counts [programs, EP]: what each program's chunk of slots holds."""
    begin = tl.program_id(0) * chunk
    here = _count(indices, begin, tl.minimum(begin + chunk, count), EP, BS)
    tl.store(counts + tl.program_id(0) * EP + tl.arange(0, EP), here)


@triton.jit
def scan_kernel(
    counts,
    base,
    offsets,
    tile_expert,
    tile_row,
    programs,
    tiles,
    E,
    EP: tl.constexpr,
    PP: tl.constexpr,
    BM: tl.constexpr,
):
    """From counts a program to the first row of each (program, expert), offsets and the tile map."""
    experts = tl.arange(0, EP)
    p = tl.arange(0, PP)[:, None]
    here = tl.load(counts + p * EP + experts[None, :], mask=p < programs, other=0)
    total = tl.sum(here, 0)
    first = tl.cumsum(total, 0) - total
    tl.store(base + p * EP + experts[None, :], first[None, :] + tl.cumsum(here, 0) - here, mask=p < programs)
    tl.store(offsets + experts, first, mask=experts < E)
    tl.store(offsets + E, tl.sum(total, 0))
    _map_tiles(total, first, tile_expert, tile_row, tiles, EP, BM)


@triton.jit
def place_kernel(indices, order, base, count, chunk, EP: tl.constexpr, BS: tl.constexpr):
    """Write this program's chunk of slots to their rows."""
    begin = tl.program_id(0) * chunk
    first = tl.load(base + tl.program_id(0) * EP + tl.arange(0, EP))
    _place(indices, order, begin, tl.minimum(begin + chunk, count), first, EP, BS)


@triton.jit
def map_kernel(offsets, tile_expert, tile_row, tiles, E, EP: tl.constexpr, BM: tl.constexpr):
    """The tile map alone, for another tile height than the sort made."""
    experts = tl.arange(0, EP)
    first = tl.load(offsets + experts, mask=experts < E, other=0)
    stop = tl.load(offsets + experts + 1, mask=experts < E, other=0)
    _map_tiles(stop - first, first, tile_expert, tile_row, tiles, EP, BM)


def choose(logits: Tensor, k: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits fp32 [T, E] (+ bias [E]) -> indices int64 [T, k], best first, and weights fp32 [T, k], rows sum to 1."""
    T, E = logits.shape
    indices = logits.new_empty(T, k, dtype=torch.int64)
    weights = logits.new_empty(T, k, dtype=torch.float32)
    block = triton.next_power_of_2(E)
    launch(
        choose_kernel,
        (triton.cdiv(T, 4), 1, 1),
        logits=logits.contiguous(),
        bias=bias,
        indices=indices,
        weights=weights,
        T=T,
        E=E,
        K=k,
        EP=block,
        BT=4,
        warps=2,
    )
    return indices, weights


def sort_rows(indices: Tensor, num_experts: int, rows_per_tile: int) -> SortedRows:
    """indices [T, K] (-1: slot not used) -> :class:`SortedRows`, with the tile map for `rows_per_tile` made alongside."""
    if indices.numel() <= _ONE_PROGRAM:
        return _sort_small(None, None, None, indices.contiguous(), num_experts, rows_per_tile)
    return _sort_large(indices.contiguous(), num_experts, rows_per_tile)


def choose_and_sort(
    logits: Tensor, k: int, rows_per_tile: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, SortedRows]:
    """:func:`choose` and :func:`sort_rows` -> indices, weights, rows; a single launch for a decode step."""
    T, E = logits.shape
    if T * k > _ONE_PROGRAM:
        indices, weights = choose(logits, k, bias)
        return indices, weights, _sort_large(indices, E, rows_per_tile)
    indices = logits.new_empty(T, k, dtype=torch.int64)
    weights = logits.new_empty(T, k, dtype=torch.float32)
    return indices, weights, _sort_small(logits.contiguous(), bias, weights, indices, E, rows_per_tile)


def map_tiles(rows: SortedRows, rows_per_tile: int) -> TileMap:
    """The tile map for tiles of this height; remembered in `rows`."""
    if rows_per_tile not in rows.tile_maps:
        E = rows.num_experts
        tile_map = _empty_map(rows.order, rows.count, E, rows_per_tile)
        launch(
            map_kernel,
            (1, 1, 1),
            offsets=rows.offsets,
            tile_expert=tile_map.expert,
            tile_row=tile_map.row,
            tiles=tile_map.count,
            E=E,
            EP=triton.next_power_of_2(E),
            BM=rows_per_tile,
            warps=4,
        )
        rows.tile_maps[rows_per_tile] = tile_map
    return rows.tile_maps[rows_per_tile]


def _empty_map(like: Tensor, count: int, num_experts: int, rows_per_tile: int) -> TileMap:
    tiles = most_tiles(count, num_experts, rows_per_tile)
    both = like.new_empty(2, tiles, dtype=torch.int32)
    return TileMap(both[0], both[1], tiles)


def _sort_small(logits, bias, weights, indices, E: int, rows_per_tile: int) -> SortedRows:
    T, K = indices.shape
    order = indices.new_empty(T * K, dtype=torch.int32)
    offsets = indices.new_empty(E + 1, dtype=torch.int32)
    tile_map = _empty_map(order, T * K, E, rows_per_tile)
    launch(
        sort_kernel,
        (1, 1, 1),
        logits=logits,
        bias=bias,
        weights=weights,
        indices=indices,
        order=order,
        offsets=offsets,
        tile_expert=tile_map.expert,
        tile_row=tile_map.row,
        T=T,
        count=T * K,
        tiles=tile_map.count,
        E=E,
        K=K,
        CHOOSE=logits is not None,
        EP=triton.next_power_of_2(E),
        BS=32,
        BM=rows_per_tile,
        warps=4,
    )
    return SortedRows(order, offsets, K, {rows_per_tile: tile_map})


def _sort_large(indices: Tensor, E: int, rows_per_tile: int) -> SortedRows:
    count, block = indices.numel(), triton.next_power_of_2(E)
    step = min(64, 4096 // block)  # slots compared with all experts at once; more would spill registers
    chunk = triton.cdiv(triton.cdiv(count, _PROGRAMS), step) * step
    programs = triton.cdiv(count, chunk)
    order = indices.new_empty(count, dtype=torch.int32)
    offsets = indices.new_empty(E + 1, dtype=torch.int32)
    counts, base = indices.new_empty(2, programs, block, dtype=torch.int32)
    tile_map = _empty_map(order, count, E, rows_per_tile)
    shared = {"EP": block, "BS": step, "warps": 4}
    launch(count_kernel, (programs, 1, 1), indices=indices, counts=counts, count=count, chunk=chunk, **shared)
    launch(
        scan_kernel,
        (1, 1, 1),
        counts=counts,
        base=base,
        offsets=offsets,
        tile_expert=tile_map.expert,
        tile_row=tile_map.row,
        programs=programs,
        tiles=tile_map.count,
        E=E,
        EP=block,
        PP=_PROGRAMS,
        BM=rows_per_tile,
        warps=8,
    )
    launch(place_kernel, (programs, 1, 1), indices=indices, order=order, base=base, count=count, chunk=chunk, **shared)
    return SortedRows(order, offsets, indices.shape[-1], {rows_per_tile: tile_map})
