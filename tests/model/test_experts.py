"""Experts in several forms as the model runs them: under autocast, recomputed, and as part of a layer."""

from __future__ import annotations

import pytest
import torch

from xmoe.model.config import ModelConfig
from xmoe.model.experts import Experts, MoE
from xmoe.quantization.compound import MixedWeight, assemble
from xmoe.quantization.packed import PackedWeight, dense_matrix, one

T, K, E, D, F = 29, 3, 6, 64, 96


def parted(experts: Experts, forms: dict[int, str]) -> Experts:
    """The same experts, those named packed in a form of their own."""
    made = []
    for e in range(E):
        own = [one(w, e) for w in (experts.gate_up, experts.down)]
        made.append([PackedWeight.encode(w, forms[e]) for w in own] if e in forms else own)
    for name, weight in zip(("gate_up", "down"), assemble(made)):
        experts.hold(name, weight)
    return experts


@pytest.fixture
def experts():
    g = torch.Generator().manual_seed(0)
    made = Experts(E, D, F, limit=2.0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 6)
    return made


@pytest.fixture
def given():
    g = torch.Generator().manual_seed(1)
    return torch.randn(T, D, generator=g), torch.randint(-1, E, (T, K), generator=g), torch.rand(T, K, generator=g)


def dense_twin(experts: Experts) -> Experts:
    twin = Experts(E, D, F, experts.limit)
    for name in ("gate_up", "down"):
        weight = getattr(experts, name)
        twin.hold(name, torch.stack([dense_matrix(weight, e) for e in range(E)]).detach())
    for name in ("gate_up_bias", "down_bias"):
        setattr(twin, name, torch.nn.Parameter(getattr(experts, name).detach().clone()))
    return twin


@pytest.mark.parametrize("autocast", [False, True])
def test_parts_add_up_to_the_dense_layer(experts, given, autocast):
    parted(experts, {1: "int8", 3: "mxfp4", 4: "int8"})
    assert isinstance(experts.down, MixedWeight) and len(experts.down.parts) == 3
    found = []
    for made in (experts, dense_twin(experts)):
        x, weights = given[0].clone().requires_grad_(), given[2].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, norms = made(x, given[1], weights, norms=True)
            assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        y.float().square().mean().backward()
        found.append([y.detach().float(), norms, x.grad, weights.grad, made.gate_up_bias.grad, made.down_bias.grad])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (0.02 if autocast else 1e-5) * b.norm()
    assert not found[0][1][given[1] < 0].any() and bool((found[0][1][given[1] >= 0] > 0).all())


@torch.no_grad()
def test_a_layer_routes_over_all_parts(given):
    config = ModelConfig(
        vocab_size=10, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=F, num_experts=E, num_experts_per_tok=K,
    )  # fmt: skip
    moe = MoE(config, 0)
    g = torch.Generator().manual_seed(2)
    for p in moe.parameters():
        p.copy_(torch.randn(p.shape, generator=g) / 6)
    parted(moe.experts, {0: "int4", 5: "mxfp4"})
    y, routing = moe(given[0].unsqueeze(0), None, True)
    moe.experts = dense_twin(moe.experts)
    expected, again = moe(given[0].unsqueeze(0), None, True)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routing.output_norm, again.output_norm, rtol=1e-4, atol=1e-5)
    moe.experts = parted(moe.experts, {2: "int8"})
    moe.router.keep_only([2, 3, 4])  # the other part's experts are never chosen but for two
    assert set(moe(given[0].unsqueeze(0), None, False)[1].indices.unique().tolist()) <= {2, 3, 4}
