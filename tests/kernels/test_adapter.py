"""Adapters on experts and on plain products: every path against the truth, which adds b a to a dense weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xmoe.kernels import dispatch, reference
from xmoe.kernels.adapter import Adapter
from xmoe.kernels.cpu import backend as cpu
from xmoe.kernels.cpu import packed as cpu_packed
from xmoe.kernels.portable import backend as portable
from xmoe.quantization.packed import PackedWeight

T, K, D, N, E = 23, 3, 96, 64, 7  # N: width inside an expert; no two sizes alike
RANKS = 5, 3
PATHS = {"reference": reference, "portable": portable, "dispatch": dispatch}


def adapter(out: int, width: int, rank: int, seed: int, scale: float, experts: int = E) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(experts, *shape, generator=g) / 8 for shape in ((rank, width), (out, rank)))
    return Adapter(a, b, scale)


def layer(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"gate_up": (E, 2 * N, D), "gate_up_bias": (E, 2 * N), "down": (E, D, N), "down_bias": (E, D)}
    return {name: torch.randn(*shape, generator=g) / (shape[-1] ** 0.5) for name, shape in shapes.items()}


def routing(kind: str) -> Tensor:
    g = torch.Generator().manual_seed(3)
    chosen = torch.rand(T, E, generator=g).topk(K).indices
    if kind == "empty expert and unused slots":
        chosen[chosen == 2] = -1
    elif kind == "one expert has all":
        chosen[:, 0], chosen[:, 1:] = 4, -1
    return chosen


def run(operation, dense: dict, stacks: dict, adapters: dict, indices: Tensor, plain: bool = False):
    """Value, and gradients of x, the routing weights and the adapters; `plain`: the adapters are added to the weights."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(T, D, generator=g).requires_grad_()
    weights = torch.rand(T, K, generator=g).requires_grad_()
    leaves = {
        n: Adapter(a.a.clone().requires_grad_(), a.b.clone().requires_grad_(), a.scale) for n, a in adapters.items()
    }
    names = {"gate_up": "gate_up_adapter", "down": "down_adapter"}
    matrices = {n: stacks[n] for n in names}
    if plain:
        matrices = {
            n: w + leaves[n].scale * leaves[n].b @ leaves[n].a if n in leaves else w for n, w in matrices.items()
        }
    given_adapters = {} if plain else {names[n]: a for n, a in leaves.items()}
    y, norms = operation.experts(
        x, indices, weights, matrices["gate_up"], dense["gate_up_bias"], matrices["down"], dense["down_bias"],
        limit=1.5, norms=True, **given_adapters,
    )  # fmt: skip
    y.backward(torch.randn(T, D, generator=g))
    found = {"y": y.detach(), "norms": norms, "x": x.grad, "weights": weights.grad}
    for name, low in leaves.items():
        found |= {f"{name} a": low.a.grad, f"{name} b": low.b.grad}
    return found


ROUTINGS = ["plain", "empty expert and unused slots", "one expert has all"]


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("which", [("gate_up", "down"), ("gate_up",), ("down",)])
@pytest.mark.parametrize("form", ["dense", "mxfp4", "int8"])
@pytest.mark.parametrize("path", PATHS)
def test_values_and_gradients_are_those_of_the_sum(path, form, which, kind):
    dense = layer()
    stacks = {n: dense[n] if form == "dense" else PackedWeight.encode(dense[n], form) for n in ("gate_up", "down")}
    plain = {n: w if form == "dense" else w.decode(dtype=torch.float32) for n, w in stacks.items()}
    every = {"gate_up": adapter(2 * N, D, RANKS[0], 1, 0.5), "down": adapter(D, N, RANKS[1], 2, 3.0)}
    adapters = {name: every[name] for name in which}
    indices = routing(kind)
    expected = run(reference, dense, plain, adapters, indices, plain=True)
    found = run(PATHS[path], dense, stacks, adapters, indices)
    for name, wanted in expected.items():
        error = (found[name] - wanted).norm() / wanted.norm().clamp(min=1e-9)
        assert error < 1e-5, (name, float(error))
        assert bool(wanted.any()), name  # zeros would prove nothing


@pytest.mark.parametrize("path", ["portable", "dispatch"])
def test_no_token_at_all_gives_zeros(path):
    dense = layer()
    packed = {n: PackedWeight.encode(dense[n]) for n in ("gate_up", "down")}
    adapters = {"gate_up": adapter(2 * N, D, RANKS[0], 1, 0.5), "down": adapter(D, N, RANKS[1], 2, 3.0)}
    found = run(PATHS[path], dense, packed, adapters, torch.full((T, K), -1))
    assert all(not bool(t.any()) for t in found.values())


@pytest.mark.skipif(not cpu.available(), reason="the C kernels are not built")
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("few", [True, False])
def test_both_packed_paths_without_gradients(few, dtype, bound, monkeypatch):
    monkeypatch.setattr(cpu_packed, "FEW", 1 << 40 if few else -1)
    dense, indices = layer(), routing("empty expert and unused slots")
    packed = {n: PackedWeight.encode(dense[n]) for n in ("gate_up", "down")}
    low = {"gate_up_adapter": adapter(2 * N, D, 5, 1, 0.5), "down_adapter": adapter(D, N, 3, 2, 3.0)}
    x, weights = torch.randn(T, D, generator=torch.Generator().manual_seed(0)), torch.rand(T, K)
    biases = dense["gate_up_bias"], dense["down_bias"]
    expected, norms = reference.experts(
        x, indices, weights, packed["gate_up"], biases[0], packed["down"], biases[1], norms=True, **low
    )
    with torch.no_grad():
        found = dispatch.experts(
            x.to(dtype), indices, weights, packed["gate_up"], biases[0].to(dtype), packed["down"], biases[1].to(dtype),
            norms=True, **low,
        )  # fmt: skip
    for a, b in zip(found, (expected, norms)):
        assert (a.float() - b).norm() / b.norm() < bound


@pytest.mark.skipif(not cpu.available(), reason="the C kernels are not built")
def test_every_instruction_set_this_machine_has_agrees(instruction_set, monkeypatch):
    """They bring activations into different orders, which the adapter of `down` has to undo."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        test_both_packed_paths_without_gradients(True, dtype, bound, monkeypatch)


@pytest.mark.parametrize("form", ["dense", "mxfp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["portable", "dispatch"])
@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(1, 300), trains=st.booleans())
def test_b_of_zeros_changes_no_bit(path, form, dtype, tokens, trains):
    """However many tokens, in and out of training: what an adapter starts from is the model as it was."""
    dense = {n: t.to(dtype) for n, t in layer().items()}
    stacks = {n: dense[n] if form == "dense" else PackedWeight.encode(dense[n], form) for n in ("gate_up", "down")}
    low = {"gate_up_adapter": adapter(2 * N, D, 4, 1, 0.5), "down_adapter": adapter(D, N, 6, 2, 3.0)}
    low = {n: Adapter(a.a, torch.zeros_like(a.b), a.scale) for n, a in low.items()}
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, D, generator=g).to(dtype).requires_grad_(trains)
    indices, weights = torch.rand(tokens, E, generator=g).topk(K).indices, torch.rand(tokens, K, generator=g)
    arguments = x, indices, weights, stacks["gate_up"], dense["gate_up_bias"], stacks["down"], dense["down_bias"]
    with torch.set_grad_enabled(trains):
        base, base_norms = PATHS[path].experts(*arguments, norms=True)
        found, norms = PATHS[path].experts(*arguments, norms=True, **low)
    assert torch.equal(found, base) and torch.equal(norms, base_norms)


def test_an_adapter_beside_a_plain_product():
    g = torch.Generator().manual_seed(0)
    x, a, b = torch.randn(2, 9, 40, generator=g), torch.randn(3, 40, generator=g), torch.randn(24, 3, generator=g)
    results = []
    for compute in (
        lambda x, a, b: dispatch.adapter_product(x, Adapter(a, b, 0.25)),
        lambda x, a, b: reference.adapter_product(x, Adapter(a, b, 0.25)),
        lambda x, a, b: F.linear(x, 0.25 * b @ a),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = compute(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves)])
    for found in results[:2]:
        for mine, truth in zip(found, results[2]):
            assert (mine - truth).norm() / truth.norm() < 1e-5


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_stay_fp32_beside_a_bf16_model(autocast):
    """Their gradients too, so that small updates are not lost."""
    dense = {n: t.bfloat16() for n, t in layer().items()}
    low = [adapter(2 * N, D, 4, 1, 0.5), adapter(D, N, 6, 2, 3.0)]
    leaves = [t.requires_grad_() for a in low for t in (a.a, a.b)]
    x = torch.randn(T, D).to(torch.float32 if autocast else torch.bfloat16)
    for operation in (dispatch, portable):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, _ = operation.experts(
                x, routing("plain"), torch.rand(T, K), dense["gate_up"], dense["gate_up_bias"], dense["down"],
                dense["down_bias"], gate_up_adapter=low[0], down_adapter=low[1],
            )  # fmt: skip
            plain = dispatch.adapter_product(x, low[0].of(2))
        grads = torch.autograd.grad(y.float().sum() + plain.float().sum(), leaves)
        assert y.dtype == plain.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("path", ["portable", "dispatch"])
def test_the_loss_of_a_frozen_unembedding_has_no_gradient_for_it(path):
    """And the one for the hidden states is what it is with one."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(21, 24, generator=g), torch.randn(50, 24, generator=g)
    targets = torch.randint(0, 50, (21,), generator=g)
    grads = []
    for trains in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        PATHS[path].linear_cross_entropy(h, w, targets).backward()
        assert (w.grad is not None) == trains
        grads.append(h.grad)
    assert torch.equal(*grads)
