"""Routing and what is said about it: losses, balance, a plan tried by masking."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.errors import ConfigError
from xmoe.model.router import Router, Routing, load_balancing_loss, router_health, tokens_per_expert, z_loss


def a_router(E=10, D=7, K=3, seed=0) -> Router:
    router = Router(D, E, K)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=generator))
        router.bias.copy_(torch.randn(E, generator=generator))
    return router


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_weights_are_the_full_softmax_renormalised(E, K, seed):
    K = min(K, E)
    router = a_router(E=E, K=K, seed=seed)
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(seed))
    routing = router(x)
    full = (x @ router.weight.T + router.bias).softmax(-1)
    chosen = full.gather(-1, routing.indices)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(9))
    assert (full.topk(K).values - chosen).abs().max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_balanced_routing_costs_one_for_every_E_and_K(E, K):
    K = min(K, E)
    indices = torch.stack([(torch.arange(K) + t) % E for t in range(E)])
    routing = Routing(torch.zeros(E, E), indices, torch.full((E, K), 1 / K))
    assert float(load_balancing_loss(routing)) == pytest.approx(1.0, abs=1e-6)


def test_collapse_onto_K_experts_costs_E_over_K_times_their_probability():
    E, K, T = 12, 3, 20
    logits = torch.randn(T, E)
    logits[:, :K] += 30
    routing = Routing(logits, torch.arange(K).expand(T, K), torch.full((T, K), 1 / K))
    assert float(load_balancing_loss(routing)) == pytest.approx(E / K * float(logits.softmax(-1)[:, :K].sum(-1).mean()))


def test_padding_counts_for_nothing():
    router = a_router()
    x = torch.randn(11, 7)
    mask = torch.ones(11, dtype=torch.bool)
    mask[[2, 5, 6]] = False
    padded, real = router(x), router(x[mask])
    torch.testing.assert_close(load_balancing_loss(padded, mask), load_balancing_loss(real))
    torch.testing.assert_close(z_loss(padded, mask), z_loss(real))
    assert torch.equal(tokens_per_expert(padded, mask), tokens_per_expert(real))
    assert tokens_per_expert(padded, mask).sum() == 8 * 3


def test_gradient_of_the_balancing_loss_matches_finite_differences():
    E, K, T = 5, 2, 6
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    indices = logits.detach().topk(K).indices

    def loss(values):
        return load_balancing_loss(Routing(values, indices, values.gather(-1, indices).softmax(-1)))

    assert torch.autograd.gradcheck(loss, (logits,))
    assert torch.autograd.gradcheck(lambda v: z_loss(Routing(v, indices, v)), (logits,))


def test_counts_of_the_whole_step_make_the_loss_global():
    router = a_router()
    x = torch.randn(24, 7)
    whole = router(x)
    counts = tokens_per_expert(whole)
    parts = [router(part) for part in x.split(12)]
    mean = sum(load_balancing_loss(p, counts=counts) for p in parts) / 2
    torch.testing.assert_close(mean, load_balancing_loss(whole))
    a = torch.autograd.grad(mean, router.weight, retain_graph=True)[0]
    b = torch.autograd.grad(load_balancing_loss(whole), router.weight)[0]
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_one_expert_a_token_gives_the_router_no_gradient():
    router = a_router(K=1)
    values = torch.randn(10)
    routing = router(torch.randn(8, 7))
    (routing.weights.squeeze(-1) * values[routing.indices.squeeze(-1)]).sum().backward()
    assert router.weight.grad is None or router.weight.grad.abs().max() == 0
    routing = router(torch.randn(8, 7), num_experts_per_tok=2)
    (routing.weights * values[routing.indices]).sum().backward()
    assert router.weight.grad.abs().max() > 0


def test_kept_experts_are_the_only_ones_chosen_and_equal_a_smaller_router():
    router = a_router()
    x = torch.randn(13, 7)
    ids = [1, 4, 5, 9]
    router.keep_only(ids)
    masked = router(x)
    small = Router(7, 4, 3)
    with torch.no_grad():
        small.weight.copy_(router.weight[ids])
        small.bias.copy_(router.bias[ids])
    cut = small(x)
    assert torch.equal(masked.indices, torch.tensor(ids)[cut.indices])
    torch.testing.assert_close(masked.weights, cut.weights)
    router.keep_only([2, 7])
    assert router(x).indices.shape == (13, 2)  # fewer kept than K: a token visits all that are left
    router.keep_only(None)
    assert router(x).indices.shape == (13, 3)


def test_selection_bias_chooses_but_does_not_weigh():
    router = a_router()
    x = torch.randn(13, 7)
    router.selection_bias = torch.zeros(10)
    router.selection_bias[6] = 100.0
    routing = router(x)
    assert (routing.indices == 6).any(-1).all()
    chosen = (x @ router.weight.T + router.bias).gather(-1, routing.indices)
    torch.testing.assert_close(routing.weights, chosen.softmax(-1))


def test_more_experts_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="num_experts_per_tok is 11; expected 1 to 10"):
        a_router()(torch.randn(2, 7), num_experts_per_tok=11)


def test_health_by_hand():
    even = router_health(torch.tensor([5, 5, 5, 5]))
    assert (even.max_violation, even.dead) == (0.0, 0) and even.entropy == pytest.approx(1.0)
    skewed = router_health(torch.tensor([98, 1, 1, 0]), torch.tensor(0.75))
    assert skewed.max_violation == pytest.approx(0.98 * 4 - 1)
    assert skewed.dead == 3 and skewed.top_weight == 0.75
    entropy = -(0.98 * torch.log(torch.tensor(0.98)) + 0.02 * torch.log(torch.tensor(0.01))) / torch.log(
        torch.tensor(4.0)
    )
    assert skewed.entropy == pytest.approx(float(entropy), rel=1e-5)
