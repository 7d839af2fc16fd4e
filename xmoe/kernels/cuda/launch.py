"""How every Triton kernel here is started, and how its launches can be written down instead of run.

All wrappers go through :func:`launch`. Under :func:`record` nothing runs: each launch is kept with its kernel, arguments
and tile, so that `compile_proof` can build the very same specialisation to machine code on a machine without a GPU, at
full size, from tensors on the `meta` device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

# Under TRITON_INTERPRET=1 kernels run in Python on CPU tensors. Inline assembly cannot run there, so kernels that have
# some take this flag as a constexpr and use a plain twin of the same function.
INTERPRETED = bool(triton.knobs.runtime.interpret)

DTYPES = {
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
    torch.float32: triton.language.float32,
}


class Launch(NamedTuple):
    """One start of a kernel: all arguments by name, the grid, and how many warps and pipeline stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int


_recorders: list[list[Launch]] = []


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Write launches into the list this yields, and run none of them."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()


def launch(kernel: Any, grid: tuple[int, ...], *, warps: int, stages: int = 2, **arguments: Any) -> None:
    """Start `kernel` on the device of its first tensor; arguments and constexprs by name. An empty grid starts nothing."""
    if 0 in grid:
        return
    if _recorders:
        _recorders[-1].append(Launch(kernel, grid, arguments, warps, stages))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=warps, num_stages=stages)
