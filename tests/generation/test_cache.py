"""KVCache against the plain truth: keep everything, and look what a query of each layer may see."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.generation.cache import KVCache
from xmoe.generation.generate import left_padded
from xmoe.model.config import preset

SHAPE = SimpleNamespace(
    layer_types=("sliding_attention", "full_attention"), sliding_window=5, num_key_value_heads=2, head_dim=3
)


def keys(batch, columns):
    """Keys [B, S, G, Dh] that tell row and column, and values that are their negatives."""
    row = torch.arange(batch).view(-1, 1, 1, 1)
    k = (1000 * row + torch.as_tensor(list(columns)).view(1, -1, 1, 1)).expand(-1, -1, 2, 3).float()
    return k, -k


def visible(k, v, k_pos, query, window):
    """What one row's query sees: {position: (key, value)}."""
    seen = {}
    for j, position in enumerate(k_pos.tolist()):
        if 0 <= position <= query and (window is None or query - position < window):
            assert position not in seen, "a position came twice"
            seen[position] = (k[j, 0, 0].item(), v[j, 1, 2].item())
    return seen


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(
        st.one_of(st.integers(1, 13), st.tuples(st.just("back"), st.integers(0, 3))), min_size=1, max_size=14
    ),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    reserve=st.integers(0, 20),
)
def test_every_query_sees_exactly_its_keys(steps, padding, reserve):
    """Any chunks, any left padding, going back up to `rollback` tokens: the visible keys are those of the definition."""
    cache = KVCache(SHAPE, reserve=reserve, rollback=3)
    furthest = 0
    for step in steps:
        if isinstance(step, tuple):
            length = max(cache.length - step[1], furthest - 3, 0)
            cache.truncate(length)
            assert cache.length == length
            continue
        start, end = cache.length, cache.length + step
        positions = torch.stack([torch.arange(start, end) - pad for pad in padding]).clamp(min=-1)
        k, v = keys(2, range(start, end))
        for layer, window in ((0, 5), (1, None)):
            got_k, got_v, got_pos = cache.update(layer, k, v, positions)
            for row, pad in enumerate(padding):
                for query in positions[row].tolist():
                    first = 0 if window is None else max(0, query - window + 1)
                    expected = {
                        p: (1000.0 * row + p + pad, -1000.0 * row - p - pad)
                        for p in range(first, query + 1)
                        if query >= 0
                    }
                    assert visible(got_k[row], got_v[row], got_pos[row], query, window) == expected
        cache.advance(step)
        furthest = max(furthest, cache.length)


def test_rings_never_hold_more_than_their_window():
    cache = KVCache(SHAPE)
    for start, count in ((0, 3), (3, 40), (43, 1), (44, 2)):
        positions = torch.arange(start, start + count)[None]
        for layer in (0, 1):
            cache.update(layer, *keys(1, range(start, start + count)), positions)
        cache.advance(count)
        assert cache._layers[0].k.shape[1] <= SHAPE.sliding_window
    assert cache._layers[1].k.shape[1] >= 46


def test_measured_bytes_are_the_planned_ones_when_the_length_is_reserved():
    for dtype, rollback, length in ((torch.float32, 0, 17), (torch.bfloat16, 2, 4), (torch.bfloat16, 2, 30)):
        cache = KVCache(SHAPE, reserve=length, rollback=rollback)
        k, v = (t.to(dtype) for t in keys(3, range(length)))
        positions = torch.arange(length).expand(3, -1)
        for layer in (0, 1):
            cache.update(layer, k, v, positions)
        cache.advance(length)
        assert cache.bytes() == KVCache.planned_bytes(SHAPE, length, batch=3, dtype=dtype, rollback=rollback)


def test_planned_bytes_of_gpt_oss_20b():
    """24 KiB a token in the twelve full layers, and 3 MiB in the sliding ones."""
    config = preset("gpt_oss_20b")
    assert KVCache.planned_bytes(config, 10_000) == 10_000 * 24 * 1024 + 3 * 1024**2


def test_full_layers_grow_by_doubling():
    cache, capacities = KVCache(SHAPE), set()
    for column in range(200):
        positions = torch.tensor([[column]])
        for layer in (0, 1):
            cache.update(layer, *keys(1, [column]), positions)
        cache.advance(1)
        capacities.add(cache._layers[1].k.shape[1])
    assert len(capacities) <= 9


def test_truncate_says_what_rollback_it_would_have_needed():
    cache = KVCache(SHAPE, rollback=2)
    for layer in (0, 1):
        cache.update(layer, *keys(1, range(20)), torch.arange(20)[None])
    cache.advance(20)
    with pytest.raises(ValueError, match="rollback=7"):
        cache.truncate(13)
    with pytest.raises(ValueError, match="holds 20"):
        cache.truncate(21)
    cache.truncate(18)
    cache.truncate(0)
    assert cache.length == 0


def test_a_copy_leaves_the_original_alone(tiny):
    """One prefix, three continuations: each scores as it would alone, and the prefix can be used again."""
    prefix = torch.arange(40)[None] % 300
    tails = [[7, 8, 9, 10, 11], [3], [250, 1, 2]]
    cache = KVCache(tiny.config)
    with torch.inference_mode():
        tiny.features(prefix, cache)
        for _ in range(2):
            tokens, positions = left_padded(tails)
            positions = torch.where(positions >= 0, positions + 40, -1)
            logits = tiny(tokens, cache.expand(3), positions=positions).logits
            for row, tail in enumerate(tails):
                alone = tiny(torch.cat([prefix, torch.tensor([tail])], 1)).logits[0, -len(tail) :]
                torch.testing.assert_close(logits[row, -len(tail) :], alone, atol=1e-4, rtol=0)
    assert cache.length == 40


def test_select_reorders_and_drops_rows(tiny):
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [1, 2, 3], [9, 8, 7, 6]]
    tokens, positions = left_padded(rows)
    cache = KVCache(tiny.config)
    with torch.inference_mode():
        tiny.features(tokens, cache, positions=positions)
        chosen = cache.select([2, 0])
        assert chosen.batch == 2
        logits = tiny(torch.tensor([[40], [41]]), chosen, positions=torch.tensor([[4], [10]])).logits[:, 0]
        for got, row in zip(logits, ([*rows[2], 40], [*rows[0], 41])):
            torch.testing.assert_close(got, tiny(torch.tensor([row])).logits[0, -1], atol=1e-4, rtol=0)


def test_expand_wants_one_row(tiny):
    cache = KVCache(tiny.config)
    with torch.inference_mode():
        tiny.features(torch.zeros(2, 3, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="holds 2"):
        cache.expand(4)


def test_keys_written_into_the_rooms_are_those_that_updates_leave():
    """A kernel that writes for itself, beside `update`: same keys, same positions, and no room where a ring would lose some."""
    ours, plain = KVCache(SHAPE, rollback=1), KVCache(SHAPE, rollback=1)
    refused = []
    for start, count in ((0, 2), (2, 1), (3, 1), (4, 2), (6, 3), (9, 1), (10, 2)):
        positions = torch.stack([torch.arange(start, start + count) - pad for pad in (0, 3)]).clamp(min=-1)
        k, v = keys(2, range(start, start + count))
        rooms = ours.room(positions, (2, 3), torch.float32)
        refused.append(rooms is None)
        for layer in (0, 1):
            expected = plain.update(layer, k, v, positions)
            if rooms is None:
                ours.update(layer, k, v, positions)
                continue
            room = rooms[layer]
            room.keys[:, room.slots], room.values[:, room.slots] = k, v
            for found, wanted in zip((room.keys, room.values), expected[:2]):
                assert torch.equal(found[:, : room.count], wanted)
            assert torch.equal(room.key_positions, expected[2]) and room.key_positions.is_contiguous()
        ours.advance(count)
        plain.advance(count)
    assert refused == [False, False, False, False, True, False, False]
    assert ours.room(positions, (2, 3), torch.bfloat16) is None  # the keys that are held have another type
