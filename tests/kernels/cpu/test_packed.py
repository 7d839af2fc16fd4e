"""Packed MXFP4 experts in C: both ways (few tokens, many) against the plain reference on the decoded weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xmoe.kernels import dispatch, reference
from xmoe.kernels.cpu import backend as cpu
from xmoe.kernels.cpu import packed as cpu_packed
from xmoe.quantization.packed import PackedWeight

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.reason() or "C kernels are there")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.01}
DTYPES = pytest.mark.parametrize("dtype", list(BOUNDS), ids=["fp32", "bf16"])
SHAPES = pytest.mark.parametrize(
    "shape", [(96, 160, 5, 2), (352, 288, 3, 3), (32, 32, 2, 1)], ids=lambda s: f"{s[0]}x{s[1]}"
)


@pytest.fixture(params=["few", "many"])
def way(request, monkeypatch) -> str:
    """Make the few-token kernel, or the sorted products, take every call."""
    monkeypatch.setattr(cpu_packed, "FEW", {"few": 1 << 40, "many": -1}[request.param])
    return request.param


def packed(experts: int, rows: int, width: int, seed: int, low: int = 118, high: int = 124) -> PackedWeight:
    """Random codes of every kind under random scales."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8, generator=g)
    scales = torch.randint(low, high, blocks.shape[:3], dtype=torch.uint8, generator=g)
    return PackedWeight("mxfp4", {"blocks": blocks, "scales": scales})


def inputs(shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype) -> tuple[Tensor | PackedWeight, ...]:
    D, F, E, K = shape
    torch.manual_seed(tokens)
    indices = torch.randint(-1, E - 1, (tokens, K))  # some slots unused; the last expert always empty
    x, weights = torch.randn(tokens, D).to(dtype), torch.rand(tokens, K)
    biases = torch.randn(E, 2 * F).to(dtype), torch.randn(E, D).to(dtype)
    return x, indices, weights, packed(E, 2 * F, D, 1), biases[0], packed(E, D, F, 2), biases[1]


def in_float(arguments: tuple) -> list:
    return [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-20)).item()


@DTYPES
@SHAPES
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 40])
def test_experts_equal_the_reference_on_the_decoded_weights(way, dtype, shape, tokens, monkeypatch):
    arguments = inputs(shape, tokens, dtype)
    expected, expected_norms = reference.experts(*in_float(arguments), norms=True)

    def refuse(*_):
        raise AssertionError("an expert was decoded whole")

    monkeypatch.setattr(PackedWeight, "decode", refuse)
    with torch.no_grad():
        found, norms = dispatch.experts(*arguments, norms=True)
        without = dispatch.experts(*arguments)
    assert found.dtype == dtype and found.shape == expected.shape and norms.shape == expected_norms.shape
    assert relative_error(found, expected) < BOUNDS[dtype]
    assert relative_error(norms, expected_norms) < BOUNDS[dtype]
    assert torch.equal(found, without[0]) and without[1] is None


@DTYPES
@pytest.mark.parametrize("at", [0, 7, 30])
def test_every_code_under_every_scale_is_exact(way, dtype, at):
    """x = 0 leaves the biases; they let one activation through, so each output is one weight times that activation."""
    D, F = 4032, 32  # one row for each of 16 codes times 251 scales, and some left over
    code, scale = torch.arange(D) % 16, (2 + torch.arange(D) // 16).clamp(max=252)
    code[-1], scale[-1] = 2, 127  # 1.0: shows the activation itself
    down = packed(1, D, F, 3)
    byte = down.blocks[0, :, 0, at // 2]
    byte.copy_(byte & 15 | code << 4 if at % 2 else byte & 240 | code)
    down.scales[0, :, 0] = scale
    bias = torch.zeros(1, 2 * F)
    bias[0, 0::2], bias[0, 1::2] = 1.2, -1.0  # up + 1 = 0 silences a neuron
    bias[0, 2 * at + 1] = 0.0
    x, weights = torch.zeros(1, D, dtype=dtype), torch.ones(1, 1)
    with torch.no_grad():
        y, _ = dispatch.experts(
            x, torch.zeros(1, 1, dtype=torch.int64), weights, packed(1, 2 * F, D, 4), bias, down, torch.zeros(1, D)
        )
    activation = y[0, -1].float()
    assert 1.0 < activation < 1.1
    expected = down.decode(dtype=torch.float32)[0, :, at] * activation
    assert torch.equal(y[0], expected.to(dtype))
    assert len(y.unique()) > 1000  # two mantissas, two signs, some 250 exponents


@DTYPES
@SHAPES
def test_gradients_reach_x_the_routing_weights_and_the_biases(dtype, shape):
    arguments = list(inputs(shape, 12, dtype))
    gradient = torch.randn(12, shape[0], generator=torch.Generator().manual_seed(9))

    def run(operation, arguments: list) -> list[Tensor]:
        wanted = [0, 2, 4, 6]
        leaves = {i: arguments[i].clone().requires_grad_() for i in wanted}
        y, _ = operation(*(leaves.get(i, a) for i, a in enumerate(arguments)))
        y.backward(gradient.to(y.dtype))
        return [y.detach(), *(leaves[i].grad for i in wanted)]

    found = run(dispatch.experts, arguments)
    expected = run(reference.experts, in_float(arguments))
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, dtype, dtype]
    for a, b in zip(found, expected):
        assert relative_error(a, b) < 2 * BOUNDS[dtype]


def test_autocast_computes_in_its_dtype_and_gives_fp32_gradients():
    arguments = list(inputs((96, 64, 3, 2), 6, torch.float32))
    arguments[2].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = dispatch.experts(*arguments)
        y.float().sum().backward()
    expected, _ = reference.experts(*arguments)
    assert y.dtype == torch.bfloat16 and arguments[2].grad.dtype == torch.float32
    assert relative_error(y.detach(), expected.detach()) < BOUNDS[torch.bfloat16]


def test_a_result_does_not_depend_on_the_number_of_threads(way):
    arguments, threads, results = inputs((352, 288, 3, 3), 5, torch.bfloat16), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with torch.no_grad():
                results.append(dispatch.experts(*arguments)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_other_formats_are_left_to_the_portable_path():
    x, indices, weights, gate_up, gate_up_bias, down, down_bias = inputs((96, 64, 3, 2), 4, torch.float32)
    other = PackedWeight.encode(down.decode(dtype=torch.float32), "int8")
    assert cpu_packed.takes(gate_up, down) and not cpu_packed.takes(gate_up, other)
    arguments = (x, indices, weights, gate_up, gate_up_bias, other, down_bias)
    assert relative_error(dispatch.experts(*arguments)[0], reference.experts(*arguments)[0]) < 1e-5


def test_describe_says_how_packed_experts_are_computed():
    assert "MXFP4 experts: decoded in registers" in dispatch.describe("cpu", torch.bfloat16)


def test_every_instruction_set_this_machine_has_agrees(way, instruction_set):
    for dtype in BOUNDS:
        for at in (0, 31):
            test_every_code_under_every_scale_is_exact(way, dtype, at)
        test_gradients_reach_x_the_routing_weights_and_the_biases(dtype, (96, 160, 5, 2))
        arguments = inputs((352, 288, 3, 3), 11, dtype)
        with torch.no_grad():
            found, norms = dispatch.experts(*arguments, norms=True)
        expected, expected_norms = reference.experts(*in_float(arguments), norms=True)
        assert relative_error(found, expected) < BOUNDS[dtype]
        assert relative_error(norms, expected_norms) < BOUNDS[dtype]
