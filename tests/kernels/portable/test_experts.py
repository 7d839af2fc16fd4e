"""What only the portable experts do: packed weights, products without gradient. The rest is in cpu/test_backend.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.kernels import dispatch, reference
from xmoe.kernels.adapter import Adapter
from xmoe.kernels.portable import backend as portable
from xmoe.quantization.packed import PackedWeight


@pytest.mark.parametrize("format", ["mxfp4", "int8", "int4"])
def test_packed_experts_give_what_their_decoded_weights_give(format):
    torch.manual_seed(0)
    T, K, D, F, E = 19, 2, 64, 32, 5
    x, indices, weights = torch.randn(T, D), torch.randint(-1, E, (T, K)), torch.rand(T, K)
    gate_up = PackedWeight.encode(torch.randn(E, 2 * F, D), format)
    down = PackedWeight.encode(torch.randn(E, D, F), format)
    biases = torch.randn(E, 2 * F), torch.randn(E, D)

    def gradients(first, second, module):
        a, b = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y, norms = module.experts(a, indices, b, first, biases[0], second, biases[1], norms=True)
        y.sum().backward()
        return y.detach(), norms, a.grad, b.grad

    dense = [w.decode(dtype=torch.float32) for w in (gate_up, down)]
    expected = gradients(*dense, reference)
    for found in (gradients(gate_up, down, portable), gradients(gate_up, down, dispatch)):
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_only_the_chosen_experts_are_decoded(monkeypatch):
    decoded = []
    packed = PackedWeight.encode(torch.randn(6, 64, 32), "mxfp4"), PackedWeight.encode(torch.randn(6, 32, 32), "mxfp4")
    original = PackedWeight.decode
    monkeypatch.setattr(PackedWeight, "decode", lambda self, *a, **k: decoded.append(a[0]) or original(self, *a, **k))
    with torch.no_grad():
        portable.experts(
            torch.randn(1, 32), torch.tensor([[4, 1]]), torch.ones(1, 2), packed[0], torch.zeros(6, 64), packed[1],
            torch.zeros(6, 32),
        )  # fmt: skip
    assert decoded == [[1], [1], [4], [4]]


def test_mixed_packed_and_dense():
    """Either of the two stacks may be packed; the dense one gets its gradient."""
    torch.manual_seed(0)
    x, indices, weights = torch.randn(7, 32), torch.randint(0, 3, (7, 2)), torch.rand(7, 2)
    gate_up, down = torch.randn(3, 64, 32), torch.randn(3, 32, 32)
    b1, b2 = torch.randn(3, 64), torch.randn(3, 32)
    for packs in ((True, False), (False, True)):
        stacks = [PackedWeight.encode(w, "int8") if p else w for w, p in zip((gate_up, down), packs)]
        plain = [w.decode(dtype=torch.float32) if isinstance(w, PackedWeight) else w for w in stacks]
        dense = packs.index(False)
        results = []
        for module, pair in ((portable, stacks), (reference, plain)):
            pair = [w.clone().requires_grad_() if i == dense else w for i, w in enumerate(pair)]
            module.experts(x, indices, weights, pair[0], b1, pair[1], b2)[0].sum().backward()
            results.append(pair[dense].grad)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(0, 20), K=st.integers(1, 3), format=st.sampled_from(["dense", "mxfp4", "low-rank"]),
    adapted=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_experts_without_gradient(T, K, format, adapted, seed):
    """Weights as left factors, unused slots, lengths of the outputs, adapters and factors against the plain loop."""
    g = torch.Generator().manual_seed(seed)
    D, F, E, r = 64, 32, 5, 3
    x, weights = torch.randn(T, D, generator=g), torch.rand(T, K, generator=g)
    indices = torch.randint(-1, E, (T, K), generator=g)
    up, down = torch.randn(E, 2 * F, D, generator=g) / 8, torch.randn(E, D, F, generator=g) / 6
    biases = torch.randn(E, 2 * F, generator=g), torch.randn(E, D, generator=g)
    if format != "dense":
        up, down = (PackedWeight.encode(w, format, **({"rank": 4} if format == "low-rank" else {})) for w in (up, down))
    adapters = {}
    if adapted:
        sizes = {"gate_up_adapter": (D, 2 * F), "down_adapter": (F, D)}
        pair = {
            n: (torch.randn(E, r, i, generator=g), torch.randn(E, o, r, generator=g)) for n, (i, o) in sizes.items()
        }
        adapters = {n: Adapter(a, b, 0.1) for n, (a, b) in pair.items()}
    given = x, indices, weights, up, biases[0], down, biases[1]
    (y, norms), (y_expected, norms_expected) = (
        m.experts(*given, norms=True, **adapters) for m in (portable, reference)
    )
    torch.testing.assert_close(y, y_expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norms, norms_expected, rtol=1e-4, atol=1e-4)
    assert portable.experts(*given, **adapters)[1] is None
