"""From rows to numbers with error bars: means, perplexities, and the paired difference of two runs.

All take plain lists of floats, one entry a row. A standard error is over rows: it says how far the value would move on
another sample of the same size, which for n = 500 and an accuracy of .35 is .021.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """value, its standard error, a 95 % interval and the number of rows behind it; None where one row gives no spread."""

    value: float
    stderr: float | None
    ci95: tuple[float, float] | None
    n: int


def mean(values: Sequence[float]) -> Estimate:
    """Arithmetic mean; stderr = s / sqrt(n) with the sample deviation s (for 0/1 values sqrt(p(1-p)/(n-1)))."""
    n = len(values)
    centre = math.fsum(values) / n
    if n < 2:
        return Estimate(centre, None, None, n)
    error = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1) / n)
    return Estimate(centre, error, (centre - NORMAL_95 * error, centre + NORMAL_95 * error), n)


def accuracy(values: Sequence[float]) -> Estimate:
    """Mean of 0/1 values with Wilson's interval, which stays inside [0, 1] and does not collapse at 0 or n of n."""
    plain = mean(values)
    n, p, z2 = plain.n, plain.value, NORMAL_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(p, plain.stderr, (max(0.0, centre - half), min(1.0, centre + half)), n)


def mean_of_groups(groups: Sequence[Sequence[float]]) -> Estimate:
    """Plain mean of the groups' means (a macro average); the errors of independent groups add in squares.

    A group of one row has no spread of its own; then no error is given rather than one that is too small.
    """
    parts = [mean(group) for group in groups]
    count = len(parts)
    value = math.fsum(p.value for p in parts) / count
    n = sum(p.n for p in parts)
    if any(p.stderr is None for p in parts):
        return Estimate(value, None, None, n)
    error = math.sqrt(math.fsum(p.stderr**2 for p in parts)) / count
    return Estimate(value, error, (value - NORMAL_95 * error, value + NORMAL_95 * error), n)


def rate(totals: Sequence[float], weights: Sequence[float]) -> Estimate:
    """sum(totals) / sum(weights): nats a word, say. stderr by the delta method for a ratio of two means."""
    n, weight = len(totals), math.fsum(weights)
    value = math.fsum(totals) / weight
    if n < 2:
        return Estimate(value, None, None, n)
    spread = math.fsum((t - value * w) ** 2 for t, w in zip(totals, weights))
    error = math.sqrt(spread * n / (n - 1)) / weight
    return Estimate(value, error, (value - NORMAL_95 * error, value + NORMAL_95 * error), n)


def exponential(nats: Estimate) -> Estimate:
    """Perplexity from nats a unit; the interval is transformed (it stays positive), the error by the delta method."""
    value = safe_exp(nats.value)
    if nats.stderr is None or nats.ci95 is None:
        return Estimate(value, None, None, nats.n)
    return Estimate(value, value * nats.stderr, (safe_exp(nats.ci95[0]), safe_exp(nats.ci95[1])), nats.n)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The same estimate in another unit."""
    ci = None if estimate.ci95 is None else (estimate.ci95[0] * factor, estimate.ci95[1] * factor)
    error = None if estimate.stderr is None else estimate.stderr * factor
    return Estimate(estimate.value * factor, error, ci, estimate.n)


def safe_exp(x: float) -> float:
    """exp(x), infinite where it overflows: a model that gives a word no chance has no finite perplexity."""
    return math.exp(x) if x < 709 else math.inf


def mcnemar(a: Sequence[float], b: Sequence[float]) -> tuple[int, int, float]:
    """Rows right only in `a`, only in `b`, and the exact two-sided p-value that both are equally likely.

    The exact binomial form of McNemar's test (1947): of the rows on which the runs differ, each side wins half by chance.
    """
    only_a = sum(x > y for x, y in zip(a, b))
    only_b = sum(y > x for x, y in zip(a, b))
    n = only_a + only_b
    if n == 0:
        return 0, 0, 1.0
    # log-space: 2 ** -n underflows for a few thousand differing rows
    terms = [_log_binomial(n, k) - n * math.log(2) for k in range(min(only_a, only_b) + 1)]
    return only_a, only_b, min(1.0, 2 * math.fsum(math.exp(t) for t in terms))


def paired_bootstrap(a: Sequence[float], b: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean of b - a over the same rows, with a 95 % percentile interval over `resamples` draws of rows."""
    return bootstrap(len(a), lambda rows: math.fsum(b[i] - a[i] for i in rows) / len(rows), resamples, seed)


def bootstrap(n: int, statistic, resamples: int = 2000, seed: int = 0) -> Estimate:
    """`statistic(row numbers)` on all n rows, with the spread of its values on rows drawn with replacement."""
    value = statistic(range(n))
    if n < 2:
        return Estimate(value, None, None, n)
    generator = random.Random(seed)
    drawn = sorted(statistic(generator.choices(range(n), k=n)) for _ in range(resamples))
    centre = math.fsum(drawn) / resamples
    error = math.sqrt(math.fsum((d - centre) ** 2 for d in drawn) / (resamples - 1))
    low, high = drawn[int(0.025 * resamples)], drawn[min(resamples - 1, int(0.975 * resamples))]
    return Estimate(value, error, (low, high), n)


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
