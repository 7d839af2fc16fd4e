"""Grouped GEMM and whole expert layers, values and all gradients, against `reference`."""

from __future__ import annotations

import pytest
import torch
from helpers import decode, poisoned, poisoned_outputs, random_packed, relative_error

from xmoe.kernels import reference
from xmoe.kernels.cuda import tiles
from xmoe.kernels.cuda.experts import ExpertLinearFunction, ExpertsFunction, experts_forward, sort_for
from xmoe.kernels.cuda.repack import repack

SMALL = {"BM": 16, "BN": 32, "BK": 32, "GROUP": 2, "warps": 4, "stages": 2}
TILES = {
    "grouped_rows": SMALL,
    "grouped_gate_up": SMALL,
    "grouped_weight": SMALL,
    "mxfp4_gate_up": {"BM": 16, "BN": 64, "KB": 1, "SPLIT": 1, "warps": 4, "stages": 2},
    "mxfp4_down": {"BM": 16, "BN": 128, "KB": 1, "SPLIT": 2, "warps": 4, "stages": 2},
    "mxfp4_linear": {"BM": 16, "BN": 64, "KB": 1, "SPLIT": 1, "warps": 4, "stages": 2},
    "mxfp4_input_gradient": {"BM": 16, "BN": 64, "warps": 4, "stages": 2},
}
E, D, F, K = 5, 72, 40, 3


def routing(T: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(T)
    if T == 0:
        return torch.zeros(0, K, dtype=torch.int64)
    chosen = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    if kind == "empty expert":
        chosen[chosen == 2] = -1
    elif kind == "one expert":
        chosen[:, 0], chosen[:, 1:] = 3, -1
    return chosen


def arguments(T: int, kind: str, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x, weights = randn(T, D).to(dtype), randn(T, K).softmax(-1)
    dense = [(randn(E, 2 * F, D) / D**0.5), randn(E, 2 * F), (randn(E, D, F) / F**0.5), randn(E, D)]
    dense[1][0, :4] += torch.tensor([9.0, -9.0, -9.0, 9.0])  # beyond the clamps, both sides
    return x, routing(T, kind), weights, [w.to(dtype) for w in dense]


@pytest.mark.parametrize("T, kind", [(1, "plain"), (21, "empty expert"), (18, "one expert"), (0, "plain")])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float16, 2e-3)])
def test_dense_values_and_gradients(T, kind, dtype, tolerance):
    x, indices, weights, dense = arguments(T, kind, dtype)
    limit, alpha = 3.0, 1.702
    mine = [poisoned(t).requires_grad_() for t in (x, weights, *dense)]
    theirs = [t.detach().float().requires_grad_() for t in (x, weights, *dense)]
    dy = torch.randn(T, D, generator=torch.Generator().manual_seed(8)).to(dtype)
    with tiles.override(TILES), poisoned_outputs():
        y, lengths = ExpertsFunction.apply(*mine, poisoned(indices), limit, alpha, True)
        got = torch.autograd.grad(y, mine, dy)
    expected, expected_lengths = reference.experts(
        theirs[0], indices, theirs[1], *theirs[2:], limit=limit, alpha=alpha, norms=True
    )
    assert y.dtype == dtype and not lengths.requires_grad
    assert relative_error(y, expected) < tolerance
    assert relative_error(lengths, expected_lengths) < tolerance
    if T == 0:
        assert all(not bool(g.any()) for g in got)
        return
    for g, e, t in zip(got, torch.autograd.grad(expected, theirs, dy.float()), mine):
        assert g.dtype == t.dtype and relative_error(g, e) < tolerance


def packed_arguments(T, kind):
    x, indices, weights, (_, up_bias, _, down_bias) = arguments(T, kind)
    up_bytes, down_bytes = random_packed(E, 2 * F, 96, seed=3), random_packed(E, 96, 64, seed=4)
    x = torch.randn(T, 96, generator=torch.Generator().manual_seed(9))
    up_bytes = random_packed(E, 128, 96, seed=3)
    up_bias, down_bias = torch.randn(E, 128), torch.randn(E, 96)
    packed = repack(*up_bytes, paired=True), up_bias, repack(*down_bytes, paired=False), down_bias
    dense = decode(*up_bytes).float(), up_bias, decode(*down_bytes).float(), down_bias
    return x, indices, weights, packed, dense


@pytest.mark.parametrize("T, kind", [(1, "plain"), (19, "empty expert"), (0, "plain")])
def test_packed_values_and_gradients(T, kind):
    x, indices, weights, packed, dense = packed_arguments(T, kind)
    mine = [poisoned(x).requires_grad_(), poisoned(weights).requires_grad_()]
    theirs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    dy = torch.randn(T, 96, generator=torch.Generator().manual_seed(8))
    with tiles.override(TILES), poisoned_outputs():
        y, lengths = ExpertsFunction.apply(mine[0], mine[1], *packed, indices, 7.0, 1.702, True)
        got = torch.autograd.grad(y, mine, dy)
        again, _, before, _ = experts_forward(x, indices, weights, *packed, limit=7.0, alpha=1.702)
    expected, expected_lengths = reference.experts(theirs[0], indices, theirs[1], *dense, norms=True)
    assert before is None and torch.equal(again, y)
    assert relative_error(y, expected) < 3e-6 and relative_error(lengths, expected_lengths) < 3e-6
    if T == 0:
        assert [g.shape for g in got] == [x.shape, weights.shape]
        return
    for g, e in zip(got, torch.autograd.grad(expected, theirs, dy)):
        assert relative_error(g, e) < 3e-6


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_expert_linear(kind):
    """The product adapters build on: rows stay sorted by expert, nothing is gathered or activated."""
    _, indices, _, packed, dense = packed_arguments(19, "empty expert")
    bias = torch.randn(E, 96)
    weight = dense[2].clone().requires_grad_() if kind == "dense" else packed[2]
    with tiles.override(TILES), poisoned_outputs():
        rows = sort_for(indices, E, weight)
        used = int((indices >= 0).sum())
        x = torch.randn(used, 64).requires_grad_()
        padded = torch.cat((x, torch.zeros(rows.count - used, 64)))
        out = ExpertLinearFunction.apply(padded, weight, bias, rows)[:used]
        dy = torch.randn(used, 96)
        grads = torch.autograd.grad(out, [x, weight] if kind == "dense" else [x], dy)
    chosen = indices.flatten()[rows.order[:used].long()]
    truth = dense[2].clone().requires_grad_()
    x_truth = x.detach().clone().requires_grad_()
    expected = torch.einsum("rk,rnk->rn", x_truth, truth[chosen]) + bias[chosen]
    wanted = torch.autograd.grad(expected, [x_truth, truth], dy)
    assert relative_error(out, expected) < 3e-6
    for g, e in zip(grads, wanted):
        assert relative_error(g, e) < 3e-6


def test_what_the_backward_pass_keeps():
    """x and the pre-activation, 2 T D + 4 T K F bytes at two bytes an element, plus routing and biases; no activation."""
    T = 64
    x, indices, weights, dense = arguments(T, "plain", torch.float16)
    kept: dict[int, int] = {}

    def pack(t):
        if t.data_ptr() not in {d.data_ptr() for d in dense}:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with tiles.override(TILES), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ExpertsFunction.apply(x.requires_grad_(), weights, *dense, indices, 7.0, 1.702, False)
    activations = 2 * T * D + 4 * T * K * F
    routing_bytes = T * K * (4 + 8 + 4) + 4 * (E + 1)
    assert activations <= sum(kept.values()) <= activations + routing_bytes
