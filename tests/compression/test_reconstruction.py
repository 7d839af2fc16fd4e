"""The Gram form of the error against outputs recomputed outright; the greedy run against its definition; the exact one."""

from __future__ import annotations

import itertools
import math

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


def outputs_in_float64(moe, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [N, E] and every expert's output [N, E, D] by their definitions, in float64."""
    x, experts = inputs.double(), moe.experts
    hidden = torch.einsum("nd,efd->nef", x, experts.gate_up.double()) + experts.gate_up_bias.double()
    gate, up = hidden[..., 0::2].clamp(max=7.0), hidden[..., 1::2].clamp(-7.0, 7.0)
    hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    outputs = torch.einsum("nef,edf->ned", hidden, experts.down.double()) + experts.down_bias.double()
    return x @ moe.router.weight.double().t() + moe.router.bias.double(), outputs


def loss_by_hand(logits, outputs, kept, k) -> float:
    """L(S), token after token: re-route among S, weigh by a softmax over those chosen, subtract."""
    total = 0.0
    for z, f in zip(logits.tolist(), outputs):
        mixtures = []
        for allowed in (range(len(z)), kept):
            chosen = sorted(allowed, key=lambda e: (-z[e], e))[:k]
            shares = [math.exp(z[e]) for e in chosen]
            mixtures.append(sum(g / sum(shares) * f[e] for g, e in zip(shares, chosen)))
        total += float((mixtures[0] - mixtures[1]).square().sum())
    return total


@torch.no_grad()
def test_reconstruction_equals_a_float64_loop(model, sampled):
    """Errors within 1e-5, the greedy order, and the best subset of all, with nothing shared with the code under test."""
    for layer, block in enumerate(model.blocks):
        logits, outputs = outputs_in_float64(block.moe, sampled[layer])
        problem = layer_problem(block.moe, sampled[layer])
        order, left = [], list(range(7))
        while len(left) > 1:
            costs = [(loss_by_hand(logits, outputs, [e for e in left if e != gone], 3), -gone) for gone in left]
            order.append(-min(costs)[1])
            left.remove(order[-1])
        curve = greedy(problem)
        assert curve.order == [*order, *left]
        for n in (1, 3, 6):
            kept = sorted(curve.order[7 - n :])
            assert curve.errors[n] == pytest.approx(loss_by_hand(logits, outputs, kept, 3), rel=1e-5)
        subset, error = exact(problem, 5)
        every = [(loss_by_hand(logits, outputs, s, 3), list(s)) for s in itertools.combinations(range(7), 5)]
        assert (subset, error) == (min(every)[1], pytest.approx(min(every)[0], rel=1e-5))


@torch.no_grad()
def test_reconstruction_does_not_depend_on_batches_padding_order_or_merging(model, tokens):
    padded = torch.full((6, 14), 3)
    padded[:, 1:12] = tokens
    mask = torch.zeros(6, 14, dtype=torch.bool)
    mask[:, 1:12] = True
    whole = record_routing(model, [tokens], sample=66)
    ways = [
        record_routing(model, tokens.split(1), sample=66),
        record_routing(model, [(padded, mask)], sample=66),
        record_routing(model, [tokens.flip(0)], sample=66),
        record_routing(model, [tokens[:2]], sample=22) + record_routing(model, [tokens[2:]], sample=44),
    ]
    expected = [greedy(p) for p in model_problems(model, whole.sample)]
    for stats in ways:
        for curve, one in zip(expected, model_problems(model, stats.sample)):
            assert greedy(one).order == curve.order
            assert greedy(one).errors == pytest.approx(curve.errors, rel=1e-5, abs=1e-9)
