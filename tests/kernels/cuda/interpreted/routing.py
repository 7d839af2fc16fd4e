"""Choosing, sorting and tile maps against plain Python."""

from __future__ import annotations

import pytest
import torch
from helpers import poisoned, poisoned_outputs

from xmoe.kernels.cuda import routing as triton_routing
from xmoe.kernels.cuda.routing import choose, choose_and_sort, map_tiles, most_tiles, sort_rows


def check(indices: torch.Tensor, E: int, rows, height: int) -> None:
    flat = indices.flatten().tolist()
    order = sorted((slot for slot, e in enumerate(flat) if e >= 0), key=lambda slot: flat[slot])
    assert rows.order[: len(order)].tolist() == order
    counts = [flat.count(e) for e in range(E)]
    assert rows.offsets.tolist() == [sum(counts[:e]) for e in range(E + 1)]
    wanted = [(e, sum(counts[:e]) + first) for e in range(E) for first in range(0, counts[e], height)]
    for tile_map in (map_tiles(rows, height), map_tiles(rows._replace(tile_maps={}), height)):
        found = [(e, r) for e, r in zip(tile_map.expert.tolist(), tile_map.row.tolist()) if e >= 0]
        assert found == wanted and tile_map.count == len(tile_map.expert)
        assert all(e == -1 for e in tile_map.expert.tolist()[len(wanted) :])


CASES = [(1, 4, 32), (7, 3, 5), (150, 4, 24), (40, 1, 128), (3, 2, 1)]


@pytest.mark.parametrize("size", ["one program", "many programs"])
@pytest.mark.parametrize("T, K, E", CASES)
@pytest.mark.parametrize("kind", ["even", "one expert", "unused", "all unused"])
def test_sort(T, K, E, kind, size, monkeypatch):
    if size == "many programs":
        monkeypatch.setattr(triton_routing, "_ONE_PROGRAM", 0)
    generator = torch.Generator().manual_seed(T + E)
    indices = torch.randint(0, E, (T, K), generator=generator)
    if kind == "one expert":
        indices[:] = E // 2
    elif kind == "unused":
        indices[torch.rand(T, K, generator=generator) < 0.4] = -1
    elif kind == "all unused":
        indices[:] = -1
    with poisoned_outputs():
        rows = sort_rows(poisoned(indices), E, 16)
    check(indices, E, rows, 16)


@pytest.mark.parametrize("T, K, E", [(1, 4, 32), (21, 3, 24), (130, 4, 128), (5, 2, 2)])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_choose(T, K, E, fused, biased):
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(T))
    logits[0, : E // 2] = 1.25  # equals: the smaller id first
    bias = torch.linspace(-1, 1, E) if biased else None
    with poisoned_outputs():
        if fused:
            indices, weights, rows = choose_and_sort(poisoned(logits), K, 16, bias)
        else:
            indices, weights = choose(poisoned(logits), K, bias)
    score = logits if bias is None else logits + bias
    expected = torch.stack([torch.tensor(sorted(range(E), key=lambda e: (-s[e], e))[:K]) for s in score.tolist()])
    assert torch.equal(indices, expected) and indices.dtype == torch.int64
    torch.testing.assert_close(weights, score.gather(1, expected).softmax(-1))
    if fused:
        check(indices, E, rows, 16)


def test_choose_never_takes_what_is_masked_out():
    logits = torch.full((3, 8), float("-inf"))
    logits[:, 5], logits[:, 2] = 1.0, 0.0
    indices, weights = choose(logits, 2)
    assert indices.tolist() == [[5, 2]] * 3
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0]).softmax(0).expand(3, 2))


@pytest.mark.parametrize("count, E, height", [(0, 4, 16), (4, 32, 16), (100, 3, 16), (65536, 32, 128), (1, 1, 1)])
def test_most_tiles_is_enough_and_tight(count, E, height):
    """The worst case: every used expert has one row more than full tiles, as far as the rows last."""
    used = min(count, E)
    worst = [1] * used
    left = count - used
    for e in range(used):
        take = left if e == used - 1 else left // max(used, 1) // height * height
        worst[e] += take
        left -= take
    assert sum(-(-c // height) for c in worst) <= most_tiles(count, E, height)
    lone = [1 + (count - used) if e == 0 else 1 for e in range(used)]
    assert sum(-(-c // height) for c in lone) == most_tiles(count, E, height)
