"""The PTX written by hand, run by a small model of its few instructions: the interpreter takes another branch there.

Each instruction follows the PTX ISA's text; the expected bits are those of the plain branch, which the interpreted tests
hold to the OCP table.
"""

from __future__ import annotations

import inspect
import re

import numpy
import pytest

pytest.importorskip("triton", reason="triton is not installed; its kernels are used on CUDA machines only")

from xmoe.kernels.cuda import mxfp4


def written_in(function) -> list[list[str]]:
    """The instructions of the function's inline assembly: [opcode, operand, ...]."""
    source = inspect.getsource(function.fn)
    text = re.search(r'inline_asm_elementwise\(\s*"""(.*?)"""', source, re.S).group(1)
    lines = [line.strip(" {}\n") for line in text.split(";")]
    return [re.split(r"[,\s]+", line) for line in lines if line and not line.startswith(".reg")]


def execute(instructions: list[list[str]], registers: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """Run them on uint32 registers (arrays: one lane an entry); immediates are numbers."""
    registers = dict(registers)

    def value(name: str) -> numpy.ndarray:
        return registers[name] if name in registers else numpy.uint32(int(name, 0))

    for opcode, target, *operands in instructions:
        a, b, *rest = map(value, operands)
        if opcode == "and.b32":
            result = a & b
        elif opcode == "or.b32":
            result = a | b
        elif opcode == "shl.b32":
            result = a << b
        elif opcode == "shr.u32":
            result = a >> b
        elif opcode == "prmt.b32":
            pool = [(word >> numpy.uint32(8 * i)) & numpy.uint32(0xFF) for word in (a, b) for i in range(4)]
            chosen = [int(rest[0]) >> 4 * i & 0xF for i in range(4)]
            assert max(chosen) < 8, "a selector above 7 repeats a sign, which is not modelled"
            result = sum((pool[c] | numpy.zeros_like(a)) << numpy.uint32(8 * i) for i, c in enumerate(chosen))
        else:
            raise AssertionError(f"{opcode} is not modelled")
        registers[target] = numpy.asarray(result, dtype=numpy.uint32)
    return registers


def halves(*words: numpy.ndarray) -> numpy.ndarray:
    """b32 registers of two 16-bit values each -> uint16 [lanes, 2 * registers], low half first."""
    return numpy.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], axis=-1).astype(numpy.uint16)


def test_split_codes_gives_the_bits_of_the_plain_branch():
    generator = numpy.random.default_rng(0)
    packed = numpy.concatenate(
        [numpy.repeat(numpy.arange(256)[:, None], 4, 1), generator.integers(0, 256, (4096, 4))]
    ).astype(numpy.uint32)
    word = packed[:, 0] | packed[:, 1] << 8 | packed[:, 2] << 16 | packed[:, 3] << 24
    registers = execute(written_in(mxfp4.split_codes), {"$4": word})
    first = ((packed & 0x80) | (packed & 0x0E)) << 8
    second = ((packed & 0x40) << 9) | ((packed & 0x30) << 6) | ((packed & 0x01) << 9)
    numpy.testing.assert_array_equal(halves(registers["$0"], registers["$1"]), first.astype(numpy.uint16))
    numpy.testing.assert_array_equal(halves(registers["$2"], registers["$3"]), second.astype(numpy.uint16))


def test_spread_scales_puts_each_byte_on_top_of_both_halves():
    words = numpy.random.default_rng(0).integers(0, 2**32, 4096, dtype=numpy.uint32)
    registers = execute(written_in(mxfp4.spread_scales), {"$4": words})
    for i in range(4):
        expected = (words >> numpy.uint32(8 * i) & numpy.uint32(0xFF)) * numpy.uint32(0x01000100)
        numpy.testing.assert_array_equal(registers[f"${i}"], expected)
