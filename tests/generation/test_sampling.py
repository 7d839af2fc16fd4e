"""Sampling against a plain reference that works on Python numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.errors import ConfigError
from xmoe.generation import sampling
from xmoe.generation.sampling import Sampler, SamplingConfig, distribution, draw


def plain(logits, config, seen=()):
    """The same rule, one token at a time. Cuts keep what ties with the last one kept."""
    logits = list(logits)
    for i in seen:
        logits[i] = logits[i] / config.repetition_penalty if logits[i] > 0 else logits[i] * config.repetition_penalty
    logits = [x / config.temperature for x in logits]
    if config.top_k:
        least = sorted(logits, reverse=True)[min(config.top_k, len(logits)) - 1]
        logits = [x if x >= least else -math.inf for x in logits]
    top = max(logits)
    p = [math.exp(x - top) for x in logits]
    p = [x / math.fsum(p) for x in p]
    if config.top_p < 1:
        mass, least = 0.0, 0.0
        for x in sorted(p, reverse=True):
            if mass >= config.top_p:
                break
            mass, least = mass + x, x
        p = [x if x >= least else 0.0 for x in p]
    p = [x if x >= config.min_p * max(p) else 0.0 for x in p]
    return [x / math.fsum(p) for x in p]


# A grid keeps sums away from the rounding of fp32, where either answer to "is p reached?" would be right.
numbers = st.integers(-40, 40).map(lambda n: n / 8)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 3).flatmap(
        lambda b: st.lists(st.lists(numbers, min_size=7, max_size=7), min_size=b, max_size=b)
    ),
    temperature=st.sampled_from([0.25, 0.7, 1.0, 2.0]),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([0.1234567, 0.4567891, 0.7891234, 0.9871, 1.0]),
    min_p=st.sampled_from([0.0, 0.0371, 0.3071, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seen=st.sets(st.integers(0, 6)),
)
def test_distribution_is_the_plain_one(rows, temperature, top_k, top_p, min_p, penalty, seen):
    config = SamplingConfig(temperature, top_k, top_p, min_p, penalty)
    mask = torch.zeros(len(rows), 7, dtype=torch.bool)
    mask[:, list(seen)] = True
    got = distribution(torch.tensor(rows), config, mask)
    expected = torch.tensor([plain(row, config, seen) for row in rows])
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


def test_a_wide_nucleus_is_found_beyond_the_first_look(monkeypatch):
    logits = torch.randn(3, 50)
    config = SamplingConfig(top_p=0.95)
    whole = distribution(logits, config)
    monkeypatch.setattr(sampling, "TOP_P_FIRST_LOOK", 4)
    torch.testing.assert_close(distribution(logits, config), whole)
    assert (whole > 0).sum() > 12


@given(st.lists(numbers, min_size=2, max_size=9, unique=True), st.integers(0, 5), st.floats(0.01, 1), st.floats(0, 1))
@settings(deadline=None)
def test_temperature_zero_is_argmax_whatever_else_is_set(row, top_k, top_p, min_p):
    config = SamplingConfig(0, top_k, top_p, min_p, seed=1)
    logits = torch.tensor([row])
    assert Sampler(config, 1).choose(logits).tolist() == [row.index(max(row))]
    assert distribution(logits, config)[0].tolist() == [float(x == max(row)) for x in row]


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 draws; 5 degrees of freedom exceed 20.5 once in a thousand seeds."""
    p = torch.tensor([0.05, 0.3, 0.0, 0.2, 0.15, 0.2, 0.1])
    sampler = Sampler(SamplingConfig(seed=3), 1)
    counts = torch.zeros(7)
    for _ in range(20_000):
        counts[draw(p[None], sampler.generators)] += 1
    assert counts[2] == 0
    kept = p > 0
    assert ((counts - 20_000 * p)[kept] ** 2 / (20_000 * p[kept])).sum() < 20.5


def test_a_row_draws_what_it_would_draw_alone():
    logits = torch.randn(40, 3, 11)
    config = SamplingConfig(temperature=0.8, top_p=0.9, seed=5)
    batch = Sampler(config, 3)
    together = torch.stack([batch.choose(step) for step in logits], 1)
    for row in range(3):
        alone = Sampler(config, 1, first_row=row)
        assert together[row].tolist() == [int(alone.choose(step[row : row + 1])) for step in logits]
    assert len(set(map(tuple, together.tolist()))) == 3


def test_no_seed_draws_anew_each_time():
    logits = torch.zeros(1, 1000)
    first, second = (Sampler(SamplingConfig(), 1) for _ in range(2))
    assert [int(first.choose(logits)) for _ in range(8)] != [int(second.choose(logits)) for _ in range(8)]


def test_the_penalty_counts_what_was_noted_and_follows_its_row():
    logits = torch.tensor([[2.0, 1.9, -5.0], [2.0, 1.9, -5.0]])
    sampler = Sampler(SamplingConfig(temperature=0, repetition_penalty=1.5), 2)
    sampler.note(1, [0])
    assert sampler.choose(logits).tolist() == [0, 1]
    sampler.select([1])
    assert sampler.choose(logits[:1]).tolist() == [1]


def test_a_tiny_temperature_does_not_overflow():
    p = distribution(torch.tensor([[90.0, 89.0, -90.0]]), SamplingConfig(temperature=1e-6))
    assert p.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", "hot"), ("top_k", -1), ("top_k", 2.5),
        ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("seed", -1),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name) as error:
        SamplingConfig(**{name: value})
    assert "\n" not in str(error.value)


def test_but_refuses_unknown_settings():
    assert SamplingConfig().but(top_k=3) == SamplingConfig(top_k=3)
    with pytest.raises(ConfigError, match="temprature"):
        SamplingConfig().but(temprature=1.0)
