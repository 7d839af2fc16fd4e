"""The Gram form of the error against outputs recomputed outright; the greedy run against its definition; the exact one."""

from __future__ import annotations

import itertools

import pytest
import torch

from xmoe.compression.criteria import ranked
from xmoe.compression.reconstruction import (
    LayerProblem,
    along,
    curve_scores,
    errors_of,
    exact,
    expert_output,
    greedy,
    layer_problem,
    model_problems,
)
from xmoe.compression.routing import record_routing
from xmoe.errors import ConfigError, DataError


@pytest.fixture
def sampled(model, tokens):
    return record_routing(model, [tokens], sample=30).sample


def loss_outright(moe, inputs, kept) -> float:
    """Sum over tokens of ||y - y(S)||^2 with S masked in the router, by running the layer twice."""
    whole, _ = moe(inputs, None, False)
    moe.router.keep_only(kept)
    part, _ = moe(inputs, None, False)
    moe.router.keep_only(None)
    return float((whole - part).double().square().sum())


@torch.no_grad()
def test_error_of_a_subset_is_that_of_the_masked_layer(model, sampled):
    moe = model.blocks[1].moe
    problem = layer_problem(moe, sampled[1])
    for kept in ([0, 1, 2, 3, 4, 5, 6], [0, 2, 5, 6], [1, 3, 4], [3, 6], [5]):
        mask = torch.zeros(7, dtype=torch.bool)
        mask[kept] = True
        expected = loss_outright(moe, sampled[1], kept)
        assert float(errors_of(problem, mask).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_expert_output_is_what_the_kernels_compute(model, pack, sampled):
    for packed in (False, True):
        if packed:
            pack(model)
        experts = model.blocks[0].moe.experts
        x, one = sampled[0], torch.ones(30, 1)
        for e in (0, 6):
            y, _ = experts(x, torch.full((30, 1), e), one)
            torch.testing.assert_close(expert_output(experts, e, x)[1], y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_greedy_takes_the_cheapest_step_each_time(model, sampled):
    problem = layer_problem(model.blocks[2].moe, sampled[2])
    curve = greedy(problem)
    left = set(range(7))
    for step, e in enumerate(curve.order):
        costs = {}
        for candidate in left:
            mask = torch.zeros(7, dtype=torch.bool)
            mask[list(left - {candidate})] = True
            costs[candidate] = float(errors_of(problem, mask).sum())
        assert costs[e] == pytest.approx(min(costs.values()), rel=1e-9)
        assert curve.errors[6 - step] == pytest.approx(costs[e], rel=1e-9, abs=1e-9)
        left.remove(e)
    assert curve.errors[7] == 0.0
    assert along(problem, curve.order).errors == pytest.approx(curve.errors, rel=1e-9)


def test_scores_of_a_curve_keep_what_the_run_kept():
    problem = LayerProblem(torch.randn(20, 6).double(), torch.eye(6).double().expand(20, 6, 6), 2)
    for order, errors in (
        (greedy(problem).order, greedy(problem).errors),
        ([3, 5, 1, 0, 2, 4], [9.0, 7.0, 7.0, 4.0, 0.0, 0.0, 0.0]),  # errors with n = 0 .. 6 left
        ([3, 5, 1, 0, 2, 4], [9.0, 4.0, 5.0, 3.0, 4.0, 0.0, 0.0]),
    ):
        scores = curve_scores(type(greedy(problem))(order, errors))
        assert ranked(scores) == order[::-1]


@torch.no_grad()
def test_exact_is_the_best_of_all_and_never_loses_to_greedy(model, sampled):
    problem = layer_problem(model.blocks[0].moe, sampled[0])
    curve = greedy(problem)
    for keep in (2, 4, 6):
        best, error = exact(problem, keep)
        everything = []
        for subset in itertools.combinations(range(7), keep):
            mask = torch.zeros(7, dtype=torch.bool)
            mask[list(subset)] = True
            everything.append((float(errors_of(problem, mask).sum()), list(subset)))
        assert (error, best) == min(everything)
        assert error <= curve.errors[keep] * (1 + 1e-12)


def test_mistakes_are_one_clear_line(model):
    wide = LayerProblem(torch.zeros(1, 32), torch.zeros(1, 32, 32), 4)
    with pytest.raises(ConfigError, match=r"16 of 32 experts can be chosen in 601,080,390 ways"):
        exact(wide, 16)
    with pytest.raises(DataError, match="hold no token sample"):
        model_problems(model, None)
