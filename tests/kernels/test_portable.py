"""What only the portable path does: packed experts. Everything it shares with the C kernels is in cpu/test_backend.py."""

from __future__ import annotations

import pytest
import torch

from xmoe.kernels import dispatch, portable, reference
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
