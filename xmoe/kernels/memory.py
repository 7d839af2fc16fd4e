"""What the system does with memory, where it costs speed: pages that training frees, and the size of pages.

glibc gives large blocks back at once. A training step frees and takes hundreds of megabytes; each new page costs a
fault and a cleared page, which on a virtual machine came to 3 GB/s against 50 GB/s for memory already there. Two
settings of the C library stop it; where that library is another (macOS, musl, Windows) nothing is done.

A mapped file lies in pages of 4 kB. Decoding streams gigabytes past a few small caches, and the same kernels read a third
faster from pages of 2 MB, which Linux gives to memory that asks for them, though not to mapped files.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE = 2 << 20
"""Bytes of a huge page where Linux has them; smaller tensors stay where they are."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@functools.cache
def keep_freed_pages() -> bool:
    """Make this process keep freed memory for its next allocations; True where that took effect. Idempotent."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """A CPU tensor of zeros in huge pages; None where it would be smaller than one of them, or the system has none.

    Pages come into being when they are first touched, by the thread that touches them: fill it with all of them.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    room = mmap.mmap(-1, -(-nbytes // HUGE) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        room.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return None
    return torch.frombuffer(room, dtype=dtype, count=math.prod(shape)).view(tuple(shape))  # keeps `room` alive


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor in huge pages; the tensor itself where it is small, elsewhere, or the system has none."""
    room = empty_in_huge_pages(tensor.shape, tensor.dtype) if tensor.device.type == "cpu" else None
    return tensor if room is None else room.copy_(tensor)
