"""Dense products for a handful of rows without gradient, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch

from xmoe.kernels import dispatch
from xmoe.kernels.cpu import backend as cpu

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


def test_every_instruction_set_this_machine_has_agrees(instruction_set):
    for dtype in BOUNDS:
        for rows in (1, 2, 3, 4):
            compare(dtype, rows, 37, 101, torch.float32)
