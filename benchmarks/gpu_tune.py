"""`gpu.py tune`: try tiles for each kernel and number of rows on this GPU, write the fastest into a table for this
architecture and Triton version. Candidates that do not compile, or need too much shared memory, drop out by themselves."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from gpu_speed import graph_seconds
from gpu_weights import DEVICE, Layer, random_routing, routing_over

from xmoe.kernels.cuda import tiles
from xmoe.kernels.cuda.decode_attention import decode_attention
from xmoe.kernels.cuda.experts import sort_for
from xmoe.kernels.cuda.gemm import grouped_gate_up, grouped_rows, grouped_weight
from xmoe.kernels.cuda.mxfp4 import packed_input_gradient, packed_linear
from xmoe.outputs import new_file

Tile = dict[str, int]
TIME_LIMIT = 280.0  # seconds; kernels whose turn comes later keep their tiles
E, D, F, K = 32, 2880, 2880, 4


def _packed(split: tuple[int, ...], heights: tuple[int, ...]) -> Iterator[Tile]:
    for BM, BN, KB, SPLIT, stages in itertools.product(heights, (64, 128), (1, 2), split, (3, 4, 5)):
        if KB == 2 and (BN == 128 or BM > 32 or stages == 5):
            continue  # two tiles a step pay where a step is short
        yield {"BM": BM, "BN": BN, "KB": KB, "SPLIT": SPLIT, "warps": 8 if BM >= 128 else 4, "stages": stages}


def _dense() -> Iterator[Tile]:
    for (BM, BN), BK, stages in itertools.product(((64, 128), (128, 128), (128, 256), (256, 128)), (32, 64), (3, 4)):
        yield {"BM": BM, "BN": BN, "BK": BK, "GROUP": 8, "warps": 8 if BM * BN > 8192 else 4, "stages": stages}


def _cases() -> Iterator[tuple[str, int | None, Iterator[Tile], Callable[[], tuple[Callable[[], Any], int]]]]:
    """(kernel, limit of rows, candidates, what makes (a run, how many calls it holds)); most wanted first."""
    layer = Layer(E)
    heights = {8: (16,), 24: (16, 32), 96: (32, 64), None: (64, 128)}
    tokens = {8: 1, 24: 128, 96: 512, None: 4096}
    for limit, T in tokens.items():
        sets = routing_over(E, T)
        x = torch.randn(T, D, device=DEVICE).half()
        active = [torch.randn(T * K, F, device=DEVICE).half() for _ in sets]

        def up(sets=sets, x=x):
            rows = [sort_for(i, E, layer.gate_up) for i in sets]
            return lambda: [layer.first(x, r) for r in rows], len(sets)

        def down(sets=sets, active=active):
            rows = [sort_for(i, E, layer.gate_up) for i in sets]
            return lambda: [layer.second(a, r) for a, r in zip(active, rows)], len(sets)

        yield "mxfp4_gate_up", limit, _packed((1,), heights[limit]), up
        yield "mxfp4_down", limit, _packed((1, 2, 3, 4) if limit == 8 else (1,), heights[limit]), down
    T = 16384
    indices = random_routing(E, T)
    x, dy = (torch.randn(T, D, device=DEVICE).bfloat16() for _ in range(2))
    weight, bias = torch.randn(E, 2 * F, D, device=DEVICE).bfloat16(), torch.zeros(E, 2 * F, device=DEVICE)
    wide = torch.randn(T * K, 2 * F, device=DEVICE).bfloat16()

    def forward():
        rows = sort_for(indices, E, weight)
        return lambda: grouped_gate_up(x, rows, weight, bias, limit=7.0, alpha=1.702, keep=True), 1

    def through():
        rows = sort_for(indices, E, weight)
        return lambda: grouped_rows(wide, rows, weight, transposed=True, scatter=True), 1

    def gradient():
        rows = sort_for(indices, E, weight)
        return lambda: grouped_weight(wide, x, rows, torch.bfloat16, gather_right=True), 1

    yield "grouped_gate_up", None, _dense(), forward
    yield "grouped_rows", None, _dense(), through
    yield "grouped_weight", None, _dense(), gradient

    def packed_back():
        rows = sort_for(indices, E, layer.gate_up)
        return lambda: packed_input_gradient(dy, rows, layer.down, gather=True), 1

    shapes = itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4))
    candidates = ({"BM": m, "BN": n, "warps": w, "stages": s} for m, n, w, s in shapes)
    yield "mxfp4_input_gradient", None, candidates, packed_back

    def linear():
        rows = sort_for(indices, E, layer.gate_up)
        taken = x[rows.order.long() // K]
        return lambda: packed_linear(taken, rows, layer.gate_up, layer.gate_up_bias), 1

    yield "mxfp4_linear", None, _packed((1,), (64, 128)), linear
    for limit, B, L in ((256, 16, 128), (4096, 4, 1024), (None, 1, 32768)):
        q = torch.randn(B, 1, 64, 64, device=DEVICE).bfloat16()
        keys, values = torch.randn(2, B, L, 8, 64, device=DEVICE).bfloat16()
        lengths = torch.full((B,), L - 1, device=DEVICE)

        def attend(q=q, keys=keys, values=values, lengths=lengths):
            return lambda: decode_attention(q, keys, values, None, lengths=lengths), 1

        shapes = itertools.product((2, 4, 8, 16, 32, 64), (32, 64, 128), (2, 3))
        candidates = ({"SPLITS": n, "BT": t, "warps": 4, "stages": s} for n, t, s in shapes)
        yield "decode_attention", limit, candidates, attend


def fastest(kernel: str, candidates: Iterator[Tile], make: Callable[[], tuple[Callable[[], Any], int]]) -> Tile | None:
    """The candidate with the shortest time; None when none of them runs."""
    best: tuple[float, Tile] | None = None
    for tile in candidates:
        with tiles.override({kernel: tile}):
            try:
                run, calls = make()
                seconds = graph_seconds(run, calls, repeats=3)
            except Exception as error:  # too much shared memory, or a shape the compiler refuses: not a candidate
                if "CUDA error" in str(error):
                    raise  # the device itself is in trouble; later times would mean nothing
                continue
        if best is None or seconds < best[0]:
            best = seconds, tile
    return best[1] if best else None


def replaced(entries: list[dict[str, int | None]], new: dict[str, int | None]) -> list[dict[str, int | None]]:
    """The entries of a kernel with `new` in the place of the one for the same limit of rows, or between its neighbours."""
    kept = [entry for entry in entries if entry["rows"] != new["rows"]]
    return sorted([*kept, new], key=lambda entry: float("inf") if entry["rows"] is None else entry["rows"])


def tune() -> Path:
    """Measure, and write tiles/sm_XX-tritonY.json; kernels that time did not suffice for keep the entries they had."""
    arch, version = tiles.table_name(DEVICE)
    table = {kernel: [dict(entry) for entry in found] for kernel, found in tiles.entries(arch, version).items()}
    began = time.monotonic()
    for kernel, limit, candidates, make in _cases():
        if time.monotonic() - began > TIME_LIMIT:
            print(f"{kernel}: keeps its tile, time is over")
            continue
        tile = fastest(kernel, candidates, make)
        if tile is not None:
            table[kernel] = replaced(table[kernel], {"rows": limit, **tile})
        print(f"{kernel} rows {limit}: {tile}", flush=True)
    path = tiles.FOLDER / f"{arch}-triton{version}.json"
    with new_file(path, overwrite=True) as partial:
        partial.write_text(
            tiles.written(arch, version, f"{datetime.now(timezone.utc):%Y-%m-%d}", table), encoding="utf-8"
        )
    return path
