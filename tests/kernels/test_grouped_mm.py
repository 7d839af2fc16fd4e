"""Experts through torch's grouped_mm: values and gradients against the reference."""

from __future__ import annotations

import pytest
import torch

from xmoe.kernels import grouped_mm, reference
from xmoe.quantization.packed import PackedWeight

E, D, F, K = 5, 48, 32, 3


@pytest.mark.parametrize("T", [1, 17])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(T, packed):
    generator = torch.Generator().manual_seed(T)
    shapes = [(T, D), (T, K), (E, 2 * F, D), (E, 2 * F), (E, D, F), (E, D)]
    x, weights, gate_up, up_bias, down, down_bias = (torch.randn(s, generator=generator) for s in shapes)
    if packed:
        gate_up = PackedWeight.encode(torch.randn(E, 2 * F, 64, generator=generator))
        x, down = (
            torch.randn(T, 64, generator=generator),
            PackedWeight.encode(torch.randn(E, 64, F, generator=generator)),
        )
        down_bias = torch.randn(E, 64, generator=generator)
    indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    indices[T // 2, 0] = -1
    indices[indices == 2] = -1
    given = [x, weights, gate_up, up_bias, down, down_bias]
    leaves = [t for t in given if isinstance(t, torch.Tensor)]
    dy = torch.randn(x.shape, generator=generator)
    results = []
    for module in (grouped_mm, reference):
        for leaf in leaves:
            leaf.requires_grad_()
        y, norms = module.experts(given[0], indices, *given[1:], limit=2.0, norms=True)
        results.append((y, norms, *torch.autograd.grad(y, leaves, dy)))
    for mine, truth in zip(*results):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4)
    assert grouped_mm.experts(given[0], indices, *given[1:])[1] is None
