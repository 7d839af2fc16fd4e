"""Means, ratios, perplexities and paired tests, against closed forms and scipy-free counts by hand."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import averages


def test_mean_and_accuracy_by_hand():
    estimate = averages.mean([1.0, 2.0, 6.0])
    assert estimate.value == 3.0 and estimate.n == 3
    assert estimate.stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    p = averages.accuracy([1.0, 0.0, 0.0, 1.0, 0.0])
    assert p.value == 0.4 and p.stderr == pytest.approx(math.sqrt(0.4 * 0.6 / 4))
    assert p.ci95 == pytest.approx((0.11762, 0.76928), abs=1e-4)  # Wilson's interval for 2 of 5
    assert averages.accuracy([0.0] * 10).ci95[1] == pytest.approx(0.27753, abs=1e-4)
    assert averages.mean([2.0]).stderr is None


def test_macro_average_weighs_groups_equally():
    estimate = averages.mean_of_groups([[1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    assert estimate.value == pytest.approx((1 + 0.25) / 2) and estimate.n == 6
    second = averages.mean([0.0, 0.0, 0.0, 1.0]).stderr
    assert estimate.stderr == pytest.approx(second / 2)
    assert averages.mean_of_groups([[1.0], [0.0, 1.0]]).stderr is None


def test_rate_and_perplexity():
    estimate = averages.rate([2.0, 6.0], [1.0, 3.0])
    assert estimate.value == 2.0 and estimate.stderr == pytest.approx(0.0)
    nats = averages.rate([3.0, 6.0], [1.0, 3.0])
    spread = (3 - 2.25) ** 2 + (6 - 6.75) ** 2
    assert nats.value == 2.25 and nats.stderr == pytest.approx(math.sqrt(spread * 2) / 4)
    perplexity = averages.exponential(nats)
    assert perplexity.value == pytest.approx(math.exp(2.25))
    assert perplexity.ci95[0] == pytest.approx(math.exp(nats.ci95[0])) and perplexity.ci95[0] > 0
    assert averages.exponential(averages.mean([1000.0, 1000.0])).value == math.inf


def test_mcnemar_counts_and_exact_p():
    a = [1, 1, 1, 0, 0, 1, 1]
    b = [0, 0, 0, 0, 1, 1, 0]
    only_a, only_b, p = averages.mcnemar(a, b)
    assert (only_a, only_b) == (4, 1)
    assert p == pytest.approx(2 * (1 + 5) / 2**5)
    assert averages.mcnemar([1, 0], [1, 0]) == (0, 0, 1.0)
    assert 0 < averages.mcnemar([1] * 3000 + [0] * 2000, [0] * 3000 + [1] * 2000)[2] < 1e-40


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_equals_counting_all_outcomes(only_a, only_b):
    p = averages.mcnemar([1.0] * only_a + [0.0] * only_b, [0.0] * only_a + [1.0] * only_b)[2]
    n, least = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    assert p == pytest.approx(min(1.0, 2 * tail))


def test_bootstrap_over_two_rows_has_the_exact_spread():
    """Rows 0 and 1 drawn twice: the mean is 0, 1/2 or 1 with odds 1:2:1, so its deviation is sqrt(1/8)."""
    outcomes = [sum(draw) / 2 for draw in itertools.product([0, 1], repeat=2)]
    assert sorted(outcomes) == [0, 0.5, 0.5, 1]
    estimate = averages.paired_bootstrap([0.0, 0.0], [0.0, 1.0], resamples=4000, seed=3)
    assert estimate.value == 0.5 and estimate.stderr == pytest.approx(math.sqrt(1 / 8), abs=0.01)
    assert estimate.ci95 == (0.0, 1.0)


def test_pairing_narrows_the_interval():
    base = [float(i % 2) for i in range(200)]
    other = [1.0 if i < 4 else x for i, x in enumerate(base)]
    change = averages.paired_bootstrap(base, other, resamples=500)
    assert change.value == pytest.approx(0.01)
    assert change.stderr < averages.mean(base).stderr / 3
