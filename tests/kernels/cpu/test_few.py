"""Products for a handful of rows without gradient, dense and of integers, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch

from xmoe.kernels import dispatch
from xmoe.kernels.cpu import backend as cpu
from xmoe.quantization.packed import PackedWeight

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.reason() or "C kernels are there")
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def compare(dtype: torch.dtype, rows: int, columns: int, inner: int, bias_dtype: torch.dtype | None) -> None:
    g = torch.Generator().manual_seed(rows * columns + inner)
    x, weight = (torch.randn(n, inner, generator=g).to(dtype) for n in (rows, columns))
    bias = None if bias_dtype is None else torch.randn(columns, generator=g).to(bias_dtype)
    expected = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    with torch.no_grad():
        found = dispatch.linear(x.unsqueeze(0), weight, bias)
        logits = dispatch.unembed(x.unsqueeze(0), weight)
    assert found.dtype == dtype and found.shape == (1, rows, columns)
    assert (found[0].double() - expected).norm() < BOUNDS[dtype] * expected.norm()
    without_bias = x.double() @ weight.double().t()
    assert (logits[0].double() - without_bias).norm() < BOUNDS[dtype] * without_bias.norm()


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 17])
@pytest.mark.parametrize(("columns", "inner"), [(4, 33), (35, 7), (70, 100), (97, 64), (3, 40)])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=["none", "fp32", "bf16"])
def test_linear_of_a_few_rows(dtype, rows, columns, inner, bias_dtype):
    compare(dtype, rows, columns, inner, bias_dtype)


FORMS = [
    ("int8", {}),
    ("int8", {"group_size": 32}),
    ("int8", {"affine": True}),
    ("int4", {}),
    ("int4", {"affine": True}),
]


def compare_integers(dtype: torch.dtype, rows: int, columns: int, inner: int, format: str, options: dict) -> None:
    """The weight as it decodes, unrounded: integers and their scales are exact, activations are all that is rounded."""
    g = torch.Generator().manual_seed(rows * columns + inner)
    x = torch.randn(rows, inner, generator=g).to(dtype)
    weight = PackedWeight.encode(torch.randn(1, columns, inner, generator=g) + 0.1, format, **options)
    bias = torch.randn(columns, generator=g)
    product = x.double() @ weight.decode(dtype=torch.float32)[0].double().t()
    with torch.no_grad():
        found = dispatch.linear(x, weight, bias), dispatch.unembed(x, weight)
    for y, expected in zip(found, (product + bias.double(), product)):
        assert y.dtype == dtype and y.shape == (rows, columns)
        assert (y.double() - expected).norm() < BOUNDS[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 17])
@pytest.mark.parametrize(("columns", "inner"), [(5, 32), (96, 64), (37, 160)])
@pytest.mark.parametrize(("format", "options"), FORMS, ids=[f"{f} {' '.join(o)}" for f, o in FORMS])
def test_integers_of_a_few_rows(dtype, rows, columns, inner, format, options):
    compare_integers(dtype, rows, columns, inner, format, options)


def test_rows_longer_than_one_sum_of_integers():
    """Products of a block alone are added up in 32 bits; with all weights and activations at their largest nothing wraps."""
    for options in ({}, {"affine": True}, {"group_size": 2080}):
        compare_integers(torch.bfloat16, 3, 6, 4160, "int8", options)
    x = torch.full((1, 8320), 250.0, dtype=torch.bfloat16)
    for affine in (False, True):
        weight = PackedWeight.encode(torch.full((1, 3, 8320), 2.0), "int8", affine=affine)
        with torch.no_grad():
            found = dispatch.linear(x, weight).float()
        torch.testing.assert_close(found, torch.full((1, 3), 8320 * 500.0), rtol=0.01, atol=0)


@pytest.mark.parametrize(("group_size", "loud"), [(32, 200.0), (32, 5000.0), (1440, 200.0), (1440, 5000.0)])
def test_one_loud_activation_leaves_the_others_heard(group_size, loud):
    """A scale is that of a block: values next to a loud one are rounded coarsely, all others as ever."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 1440, generator=g).bfloat16(), torch.randn(1, 64, 1440, generator=g)
    x[0, 3], weight[:, :, 3] = loud, weight[:, :, 3] / loud  # as much in the result as any other
    packed = PackedWeight.encode(weight, "int8", group_size=group_size)
    expected = x.double() @ packed.decode(dtype=torch.float32)[0].double().t()
    with torch.no_grad():
        found = dispatch.linear(x, packed).double()
    assert (found - expected).norm() < (5e-3 if loud < 1000 else 0.03) * expected.norm()


def test_activations_that_are_not_finite_show():
    weight = PackedWeight.encode(torch.randn(1, 9, 64), "int8", group_size=32)
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 64, dtype=torch.bfloat16)
        x[1, 5] = bad
        with torch.no_grad():
            y = dispatch.linear(x, weight)
        assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_activations_of_nothing_give_nothing():
    weight = PackedWeight.encode(torch.randn(1, 9, 64), "int8", group_size=32)
    with torch.no_grad():
        assert not dispatch.linear(torch.zeros(1, 64, dtype=torch.bfloat16), weight).any()


@pytest.mark.parametrize("rows", [1, 40])
def test_packed_weights_give_their_gradient_to_activations(rows):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 64, generator=g, requires_grad=True)
    weight = PackedWeight.encode(torch.randn(1, 33, 64, generator=g), "int8", group_size=32)
    direction = torch.randn(rows, 33, generator=g)
    dispatch.linear(x, weight, torch.zeros(33)).backward(direction)
    torch.testing.assert_close(x.grad, direction @ weight.decode(dtype=torch.float32)[0])


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_elsewhere_packed_weights_are_decoded(backend):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, 64, generator=g)
    weight = PackedWeight.encode(torch.randn(1, 33, 64, generator=g), "int8", group_size=32)
    expected = x @ weight.decode(dtype=torch.float32)[0].t()
    with dispatch.use(backend), torch.no_grad():
        torch.testing.assert_close(dispatch.linear(x, weight), expected)
        torch.testing.assert_close(dispatch.unembed(x, weight), expected)
    targets = torch.tensor([0, 32, 7])
    plain = torch.nn.functional.cross_entropy(expected, targets)
    torch.testing.assert_close(dispatch.linear_cross_entropy(x, weight, targets), plain)


def test_every_instruction_set_this_machine_has_agrees(instruction_set):
    for dtype in BOUNDS:
        for rows in (1, 2, 3, 4):
            compare(dtype, rows, 37, 101, torch.float32)
            for format, options in FORMS:
                compare_integers(dtype, rows, 37, 160, format, options)
