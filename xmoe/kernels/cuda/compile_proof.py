"""What can be proved of a Triton kernel without a GPU: that it compiles, and what the machine code is made of.

`launch.record()` writes a wrapper's launches down; :func:`prove` builds one of them for an architecture, with the
same specialisation the just-in-time compiler would choose (arguments equal to 1, multiples of 16, aligned pointers), and
reads the machine code with the disassembler that comes in Triton's package. No driver is needed. It catches type and
layout errors, spilled registers, lost matrix instructions and instruction bloat; not races, wrong masks or speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xmoe.kernels.cuda.launch import Launch

# Shared memory one program may use, bytes: CUDA C++ programming guide, table of technical specifications.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Proof(NamedTuple):
    """registers: a thread. stack: bytes a thread (0: nothing spilled). shared: bytes a program. loop: instructions in the
    longest loop, a warp. opcodes: instructions of the whole kernel by name. ptx: the intermediate code."""

    registers: int
    stack: int
    shared: int
    loop: int
    loop_opcodes: Counter[str]
    opcodes: Counter[str]
    ptx: str

    def instructions_per_weight(self, warps: int, weights: int) -> float:
        """Lane instructions the main loop spends on each of the `weights` weights a program decodes in one turn."""
        return self.loop * 32 * warps / weights


def prove(launch: Launch, arch: int = 90) -> Proof:
    """Compile one recorded launch for sm_<arch> and read its machine code."""
    function = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for position, parameter in enumerate(function.params):
        name = parameter.name
        value = launch.arguments.get(name, parameter.default)
        kind, aligned = _specialise(parameter, value)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return _read(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


def _specialise(parameter, value) -> tuple[str, bool]:
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if value == 1:
        return "constexpr", False
    return ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0


def _read(compiled) -> Proof:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = _run(tools / "nvdisasm", "-c", file.name)
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions, loop = _longest_loop(listing)
    return Proof(
        registers, stack, compiled.metadata.shared, len(loop), _count(loop), _count(instructions), compiled.asm["ptx"]
    )


def _run(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _longest_loop(listing: str) -> tuple[list[str], list[str]]:
    """All instructions, and those between the farthest pair of a label and a jump back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction.group(1))
    best = (0, 0)
    for end, text in enumerate(instructions):
        jump = re.search(r"BRA.*?(\.L_x_\d+)", text)
        # ptxas ends every kernel with a jump to itself; and a jump back counts only if its label is above.
        if jump and labels.get(jump.group(1), end) < end and end - labels[jump.group(1)] > best[1] - best[0]:
            best = (labels[jump.group(1)], end)
    return instructions, instructions[best[0] : best[1] + 1] if best[1] else []


def _count(instructions: list[str]) -> Counter[str]:
    """Opcodes without predicate and modifiers: `@!P0 LDGSTS.E.BYPASS.128 ...` counts as LDGSTS."""
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in instructions)
