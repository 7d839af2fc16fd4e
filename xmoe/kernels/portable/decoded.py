"""Decoded matrices of the experts in use, for machines without the C kernels.

Decoding an expert in PyTorch takes several times as long as multiplying a token with it, and a prompt touches most experts
of every layer. So what was decoded for a prompt or a token is kept for the next, as far as memory is to spare: up to
`XMOE_DECODED_GB` gigabytes (1 GB is 10^9 bytes; 0 keeps nothing), or half of what is free when the first one is kept. A
token displaces what was used least recently. A prompt displaces nothing: where its experts do not all fit, it would
push out in one layer what it needs in the next round of all. All matrices of a weight go with it.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from xmoe.errors import ConfigError
from xmoe.kernels.memory import empty_in_huge_pages, in_huge_pages
from xmoe.quantization import mxfp4
from xmoe.quantization.packed import PackedWeight, dense_matrix, matrices

LIMIT = "XMOE_DECODED_GB"

Keep = Literal["never", "room", "always"]
"""Whether to keep what is decoded: "room" where the limit leaves some, "always" in the place of something else if need be."""


class DecodedExperts:
    """Matrices by weight, expert and dtype, up to `limit` bytes (None: see :func:`limit_asked` and :func:`free_memory`)."""

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[tuple, Tensor] = OrderedDict()
        self._known: set[int] = set()

    def describe(self) -> str:
        """How much is kept; a clause."""
        limit = limit_asked() if self.limit is None else self.limit
        most = "half of the memory that is free" if limit is None else f"{limit / 1e9:.3g} GB"
        return (
            f"decoded experts are kept in up to {most} ({LIMIT})"
            if limit != 0
            else f"no decoded expert is kept ({LIMIT})"
        )

    def matrices(
        self, weight: Tensor | PackedWeight, e: int, dtype: torch.dtype, keep: Keep = "never"
    ) -> tuple[Tensor, ...]:
        """As :func:`xmoe.quantization.packed.matrices`; what is kept is found, and what is decoded kept if `keep` says so."""
        if isinstance(weight, Tensor):
            return matrices(weight, e, dtype)
        return tuple(self._matrix(leaf, row, dtype, keep) for _, leaf, row in weight.leaves(e))

    def _matrix(self, weight: Tensor | PackedWeight, e: int, dtype: torch.dtype, keep: Keep) -> Tensor:
        """Of a stack that is dense or packed numbers throughout; dense ones are not kept."""
        if isinstance(weight, Tensor) or weight.device.type != "cpu":
            return dense_matrix(weight, e, dtype)
        # bytes that were written to, or moved, are another weight
        state = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in weight.tensors.values())
        key = (id(weight), e, dtype, state)
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return found
        if keep == "never" or not self._make_room(math.prod(weight.shape[1:]) * dtype.itemsize, keep == "always"):
            return dense_matrix(weight, e, dtype)
        matrix = _decoded(weight, e, dtype)
        self._kept[key] = matrix
        self.nbytes += matrix.nbytes
        if key[0] not in self._known:
            self._known.add(key[0])
            weakref.finalize(weight, self._forget, key[0])
        return matrix

    def _make_room(self, nbytes: int, displace: bool) -> bool:
        """Whether `nbytes` more may be kept now."""
        if self.limit is None:
            asked = limit_asked()
            self.limit = free_memory() // 2 if asked is None else asked
        if nbytes > (self.limit if displace else self.limit - self.nbytes):
            return False
        while self.nbytes + nbytes > self.limit:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return True

    def _forget(self, weight: int) -> None:
        """Drop what belongs to a weight that is no more: its id may soon be another's."""
        self._known.discard(weight)
        for key in [k for k in self._kept if k[0] == weight]:
            self.nbytes -= self._kept.pop(key).nbytes


def _decoded(weight: PackedWeight, e: int, dtype: torch.dtype) -> Tensor:
    """The matrix of expert e in huge pages, since it will be read many times."""
    room = empty_in_huge_pages(weight.shape[1:], dtype) if weight.format == "mxfp4" else None
    if room is None:
        return in_huge_pages(dense_matrix(weight, e, dtype))
    room.zero_()  # the table lookups of `decode` run on one thread, which alone would take far longer to get the pages
    return mxfp4.decode(weight.blocks[e], weight.scales[e], dtype, out=room)


def limit_asked() -> int | None:
    """Bytes that the environment variable allows, None where it is not set.

    Raises:
        ConfigError: it is no number of gigabytes.
    """
    text = os.environ.get(LIMIT)
    if not text:
        return None
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise ConfigError(f"{LIMIT} is {text!r}; expected gigabytes such as 6 or 0.5, or 0 to keep no decoded expert")
    return int(limit * 1e9)


def free_memory() -> int:
    """Bytes that this process may still take, by Linux and by its control group; 0 where neither says."""
    free = []
    try:
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
        free.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, StopIteration, ValueError):  # another system, or a group without a limit ("max")
        pass
    return max(min(free), 0) if free else 0
