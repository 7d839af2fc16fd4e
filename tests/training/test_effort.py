"""The effort sampler draws what the weights say, and the same again for the same step."""

from __future__ import annotations

from collections import Counter

import pytest

from xmoe.training.effort import EffortSampler


@pytest.mark.parametrize("per_layer", [False, True])
def test_effort_is_drawn_as_often_as_asked_and_again_the_same(per_layer):
    table = {"low": 1, "medium": 2, "high": 4}
    sampler = EffortSampler(table, {"low": 1.0, "medium": 2.0, "high": 1.0}, per_layer, layers=3, seed=9)
    draws = [sampler.draw(step) for step in range(2000)]
    flat = [k for draw in draws for k in (draw if per_layer else [draw])]
    counts = Counter(flat)
    assert set(counts) == {1, 2, 4}
    assert abs(counts[2] / len(flat) - 0.5) < 0.05 and abs(counts[1] / len(flat) - 0.25) < 0.05
    if per_layer:
        assert all(len(draw) == 3 for draw in draws) and any(len(set(draw)) == 3 for draw in draws)
    assert draws[700:] == [sampler.draw(step) for step in range(700, 2000)]
    other = EffortSampler(table, {"low": 1.0, "medium": 2.0, "high": 1.0}, per_layer, layers=3, seed=10)
    assert draws != [other.draw(step) for step in range(2000)]
