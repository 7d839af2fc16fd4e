"""Counts a layer: sums that must hold, the best of all ways, and limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.compression.budget import counts_by_sensitivity, counts_globally, layer_limits, uniform_counts
from xmoe.errors import ConfigError


def test_a_count_and_a_share():
    assert uniform_counts([8, 8], 3) == [3, 3]
    assert uniform_counts([8, 5], 0.5) == [4, 2]
    assert uniform_counts([8, 5], 0.01) == [1, 1]
    assert uniform_counts([4, 4], None, [(1, 3), (1, 0)]) == [4, 2]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "at least 1"),
        (-2, "at least 1"),
        (9, "more than the 8"),
        (0.0, "between 0 and 1"),
        (1.0, "between 0 and 1"),
        (1.5, "between 0 and 1"),
        (True, "expected a count"),
        (None, "nothing says how many"),
    ],
)
def test_impossible_amounts_are_refused(keep, message):
    with pytest.raises(ConfigError, match=message):
        uniform_counts([8, 9], keep)


curves = st.integers(2, 4).flatmap(
    lambda layers: st.lists(st.lists(st.floats(0, 9), min_size=5, max_size=5), min_size=layers, max_size=layers)
)


@settings(max_examples=60, deadline=None)
@given(curves, st.data())
def test_sensitivity_is_the_best_of_all_ways(errors, data):
    layers = len(errors)
    total = data.draw(st.integers(layers, 4 * layers))
    limits = layer_limits([4] * layers, total, 2, set(), set())
    counts = counts_by_sensitivity(errors, total, limits)
    ways = itertools.product(*(range(low, high + 1) for low, high in limits))
    best = min(sum(row[n] for row, n in zip(errors, way)) for way in ways if sum(way) == total)
    assert sum(counts) == total
    assert all(low <= n <= high for n, (low, high) in zip(counts, limits))
    assert sum(row[n] for row, n in zip(errors, counts)) == pytest.approx(best, abs=1e-9)
    if total % layers == 0:
        assert best <= sum(row[total // layers] for row in errors) + 1e-9


def test_global_keeps_the_largest_shares_within_limits():
    scores = [torch.tensor([8.0, 1.0, 1.0]).double(), torch.tensor([3.0, 4.0, 3.0]).double()]
    assert counts_globally(scores, 4, [(1, 3), (1, 3)]) == [1, 3]
    assert counts_globally(scores, 4, [(2, 3), (1, 3)]) == [2, 2]
    below_zero = [-s for s in scores]  # as aimer's: the least becomes 0
    assert sum(counts_globally(below_zero, 3, [(1, 3), (1, 3)])) == 3


def test_limits_hold_protected_and_removed_experts():
    assert layer_limits([6, 6], 8, 2, {(0, 1), (0, 2), (0, 3)}, {(1, 5)}) == [(3, 6), (2, 5)]
    assert layer_limits([6, 6], 2, 4, set(), set()) == [(1, 6), (1, 6)]  # a budget below K a layer: the even share
    with pytest.raises(ConfigError, match="5 experts in all cannot be kept"):
        layer_limits([6, 6], 5, 2, {(0, e) for e in range(5)}, set())
