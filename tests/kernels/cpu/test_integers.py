"""int8 and int4 experts in C: values and gradients against the plain reference on the decoded weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.kernels import dispatch, reference
from xmoe.kernels.cpu import backend as cpu
from xmoe.kernels.portable import backend as portable
from xmoe.quantization.packed import PackedWeight

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.reason() or "C kernels are there")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.015}
WEIGHTS = 3  # where the routing weights' gradient stands among the results of `check`
FORMS = {
    "int8 a row": ("int8", {}),
    "int8 in groups": ("int8", {"group_size": 32}),
    "int8 affine": ("int8", {"affine": True}),
    "int4": ("int4", {}),
    "int4 in groups of 64": ("int4", {"group_size": 64}),
    "int4 affine": ("int4", {"affine": True}),
}


def inputs(form: str, T: int, dtype: torch.dtype, D: int = 128, F: int = 64, E: int = 5, K: int = 2):
    g = torch.Generator().manual_seed(T)
    kind, options = FORMS[form]
    gate_up = PackedWeight.encode(torch.randn(E, 2 * F, D, generator=g) * D**-0.5 + 0.02, kind, **options)
    down = PackedWeight.encode(torch.randn(E, D, F, generator=g) * F**-0.5 - 0.02, kind, **options)
    x, weights = torch.randn(T, D, generator=g).to(dtype), torch.rand(T, K, generator=g)
    indices = torch.randint(-1, E - 1, (T, K), generator=g)  # some slots unused; the last expert always empty
    biases = [torch.randn(E, n, generator=g).to(dtype) for n in (2 * F, D)]
    return x, indices, weights, gate_up, biases[0], down, biases[1]


def check(form: str, T: int, dtype: torch.dtype, **shape) -> None:
    x, indices, weights, gate_up, up_bias, down, down_bias = inputs(form, T, dtype, **shape)
    found, expected = [], []
    for module, to, results in ((dispatch, dtype, found), (reference, torch.float32, expected)):
        leaves = [
            t.detach().to(t.dtype if t is weights else to).requires_grad_() for t in (x, weights, up_bias, down_bias)
        ]
        layer = gate_up, leaves[2], down, leaves[3]
        y, lengths = module.experts(leaves[0], indices, leaves[1], *layer, norms=True)
        gradient = torch.linspace(-1, 1, y.numel()).view_as(y)
        if y.requires_grad:  # the reference's result is a constant where no expert is used
            y.backward(gradient.to(y.dtype))
        results += [y, lengths, *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]
    sizes = [b.float().norm() for b in expected]
    # A weight's gradient is one dot product, y's gradient with the expert's output. It may cancel to almost nothing,
    # but its rounding goes with its terms: the bound is relative to what such a product usually comes to.
    usual = (gradient.norm(dim=1, keepdim=True) * expected[1]).norm() * gradient.shape[1] ** -0.5
    sizes[WEIGHTS] = torch.maximum(sizes[WEIGHTS], usual)
    for i, (a, b) in enumerate(zip(found, expected)):
        assert (a.float() - b.float()).norm() <= BOUNDS[dtype] * sizes[i], f"{form}: result {i}"


@pytest.fixture(autouse=True)
def _never_portable(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an expert was decoded in PyTorch")

    monkeypatch.setattr(portable, "experts", refuse)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 7, 150])
def test_values_and_gradients(form, dtype, T):
    check(form, T, dtype)


@settings(max_examples=20, deadline=None)
@given(
    form=st.sampled_from(list(FORMS)), T=st.integers(1, 40), D=st.sampled_from([64, 320, 576]),
    F=st.sampled_from([64, 192]), E=st.integers(2, 4), K=st.integers(1, 3),
)  # fmt: skip
def test_values_of_any_shape(form, T, D, F, E, K):
    check(form, T, torch.float32, D=D, F=F, E=E, K=K)


def test_low_rank_factors_of_integers_run_as_factors():
    from xmoe.quantization.compound import PackedFactors

    g = torch.Generator().manual_seed(1)
    E, D, F, rank = 3, 96, 64, 32
    stacks = {}
    for name, (rows, width) in {"gate_up": (2 * F, D), "down": (D, F)}.items():
        left = PackedWeight.encode(torch.randn(E, rows, rank, generator=g) * rank**-0.5, "int4")
        right = PackedWeight.encode(torch.randn(E, rank, width, generator=g) * width**-0.5, "int4")
        stacks[name] = PackedFactors(left, right)
    x, indices = torch.randn(9, D, generator=g), torch.randint(0, E, (9, 2), generator=g)
    layer = stacks["gate_up"], torch.zeros(E, 2 * F), stacks["down"], torch.zeros(E, D)
    found, _ = dispatch.experts(x, indices, torch.rand(9, 2, generator=torch.Generator().manual_seed(2)), *layer)
    dense = [w.decode(dtype=torch.float32) if isinstance(w, PackedWeight) else w for w in layer]
    expected, _ = reference.experts(x, indices, torch.rand(9, 2, generator=torch.Generator().manual_seed(2)), *dense)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_every_value_is_decoded_exactly():
    """All integers under scales of every size, one weight at a time: x and the biases let just that one through."""
    E, D, F = 1, 32, 32
    for bits, top in ((8, 127), (4, 7)):
        q = torch.arange(-top, top + 1)
        down = torch.zeros(E, D, F, dtype=torch.int64)
        down.view(-1)[: len(q)] = q
        scales = torch.tensor([2.0**-9, 0.75, 3.0]).to(torch.bfloat16)
        for scale in scales:
            values = (
                down.to(torch.int8)
                if bits == 8
                else ((down + 8)[..., 0::2] | (down + 8)[..., 1::2] << 4).to(torch.uint8)
            )
            weight = PackedWeight(f"int{bits}", {"values": values, "scales": scale.expand(E, D, 1).contiguous()})
            gate_up = PackedWeight.encode(torch.zeros(E, 2 * F, D), f"int{bits}")
            for column in range(3):
                bias = torch.zeros(E, 2 * F)
                bias[0, 2 * column] = 1.0  # one activation, silu-like of 1
                layer = gate_up, bias, weight, torch.zeros(E, D)
                y, _ = dispatch.experts(
                    torch.zeros(1, D), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), *layer
                )
                expected, _ = reference.experts(
                    torch.zeros(1, D), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), *layer
                )
                assert torch.allclose(y, expected, rtol=1e-6, atol=0), (bits, scale, column)


@pytest.mark.parametrize("form", FORMS)
def test_every_instruction_set_this_machine_has(instruction_set, form):
    for dtype in BOUNDS:
        check(form, 9, dtype)
