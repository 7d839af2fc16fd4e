"""Low-rank experts on every path: what the product of their factors gives, and the product is never formed."""

from __future__ import annotations

import pytest
import torch

from xmoe.kernels import dispatch, grouped_mm, reference
from xmoe.kernels.adapter import Adapter
from xmoe.kernels.cpu import backend as cpu
from xmoe.kernels.cuda import backend as triton_backend
from xmoe.kernels.portable import backend as portable
from xmoe.quantization.packed import PackedWeight

T, K, D, F, E = 23, 2, 48, 40, 5


def factors(out: int, width: int, rank: int, seed: int) -> PackedWeight:
    g = torch.Generator().manual_seed(seed)
    left, right = torch.randn(E, out, rank, generator=g), torch.randn(E, rank, width, generator=g)
    return PackedWeight("low-rank", {"left": left / rank, "right": right})


def forbidden(*_, **__):
    raise AssertionError("factors were multiplied out")


@pytest.fixture
def given():
    g = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, E, (T, K), generator=g)
    indices[indices == 2] = -1  # an expert without tokens
    biases = torch.randn(E, 2 * F, generator=g), torch.randn(E, D, generator=g)
    dense = torch.randn(E, 2 * F, D, generator=g) / 4, torch.randn(E, D, F, generator=g) / 4
    return torch.randn(T, D, generator=g), indices, torch.rand(T, K, generator=g), biases, dense


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("name", ["portable", "cpu", "dispatch", "grouped_mm"])
def test_values_and_gradients_are_those_of_the_product(given, name, which, monkeypatch):
    module = {"portable": portable, "cpu": cpu, "dispatch": dispatch, "grouped_mm": grouped_mm}[name]
    if name == "cpu" and not cpu.available():
        pytest.skip(cpu.reason())
    x, indices, weights, biases, dense = given
    ranks = (8, 12) if name == "grouped_mm" else (7, 11)  # torch's product wants rows of whole 16 bytes
    low = factors(2 * F, D, ranks[0], 1), factors(D, F, ranks[1], 2)
    product = [w.decode(dtype=torch.float32) if chosen else d for w, d, chosen in zip(low, dense, which)]
    held = [w if chosen else d for w, d, chosen in zip(low, dense, which)]

    def gradients(pair, experts):
        leaves = [t.clone().requires_grad_() for t in (x, weights, *biases)]
        pair = [w if isinstance(w, PackedWeight) else w.clone().requires_grad_(not c) for w, c in zip(pair, which)]
        y, norms = experts(leaves[0], indices, leaves[1], pair[0], leaves[2], pair[1], leaves[3], limit=2.0, norms=True)
        (y * y).sum().backward()
        more = [w.grad for w, chosen in zip(pair, which) if not chosen]
        return [y.detach(), norms, *(t.grad for t in leaves), *more]

    expected = gradients(product, reference.experts)
    monkeypatch.setattr(PackedWeight, "decode", forbidden)
    for a, b in zip(gradients(held, module.experts), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_in_bfloat16_and_under_autocast(given, stored):
    x, indices, weights, biases, _ = given
    low = [w.to(stored) for w in (factors(2 * F, D, 7, 1), factors(D, F, 11, 2))]
    whole = [w.decode(dtype=torch.float32) for w in low]
    expected = reference.experts(x, indices, weights, whole[0], biases[0], whole[1], biases[1])[0]
    with torch.no_grad():
        y = dispatch.experts(x.bfloat16(), indices, weights, low[0], biases[0], low[1], biases[1])[0]
        with torch.autocast("cpu", torch.bfloat16):
            z = dispatch.experts(x, indices, weights, low[0], biases[0], low[1], biases[1])[0]
    for found in (y, z):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("module", [portable, cpu], ids=["portable", "cpu"])
def test_an_adapter_beside_factors(given, module, monkeypatch):
    if module is cpu and not cpu.available():
        pytest.skip(cpu.reason())
    x, indices, weights, biases, _ = given
    low = factors(2 * F, D, 7, 1), factors(D, F, 11, 2)
    g = torch.Generator().manual_seed(9)
    shapes = ((E, 3, D), (E, 2 * F, 3), (E, 3, F), (E, D, 3))
    a, b, c, d = (torch.randn(shape, generator=g) / 4 for shape in shapes)
    adapters = {"gate_up_adapter": Adapter(a, b, 0.5), "down_adapter": Adapter(c, d, 2.0)}
    whole = low[0].decode(dtype=torch.float32) + 0.5 * b @ a, low[1].decode(dtype=torch.float32) + 2.0 * d @ c
    expected = reference.experts(x, indices, weights, whole[0], biases[0], whole[1], biases[1])[0]
    monkeypatch.setattr(PackedWeight, "decode", forbidden)
    found = module.experts(x, indices, weights, low[0], biases[0], low[1], biases[1], **adapters)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_who_takes_them(given):
    low = factors(D, F, 3, 0)
    assert cpu.takes(low, given[4][1]) and not cpu.takes(low, PackedWeight.encode(given[4][1], "int8"))
    assert not triton_backend.takes(low)
