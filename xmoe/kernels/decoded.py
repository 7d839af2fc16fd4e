"""Decoded matrices of the experts that were used last, for machines without the C kernels.

Decoding an expert in PyTorch takes many times as long as multiplying a token with it. A text keeps to some experts of each
layer for a while, so what was decoded for one token is kept for the next, as far as memory is to spare: half of what is
free when the first one is kept. The least recently used go first, and all of a weight go with it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from xmoe.kernels.memory import in_huge_pages
from xmoe.quantization.packed import PackedWeight, matrices


class DecodedExperts:
    """Matrices by weight, expert and dtype, up to `limit` bytes (None: half of the memory free at first use)."""

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[tuple, Tensor] = OrderedDict()
        self._known: set[int] = set()

    def matrices(self, weight: Tensor | PackedWeight, e: int, dtype: torch.dtype, keep: bool) -> tuple[Tensor, ...]:
        """As :func:`xmoe.quantization.packed.matrices`; what is kept is found, and what is decoded kept if `keep` says so."""
        if isinstance(weight, Tensor) or weight.format == "low-rank" or weight.device.type != "cpu":
            return matrices(weight, e, dtype)
        # bytes that were written to, or moved, are another weight
        state = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in weight.tensors.values())
        key = (id(weight), e, dtype, state)
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return (found,)
        decoded = matrices(weight, e, dtype)
        return (self._keep(weight, key, decoded[0]),) if keep else decoded

    def _keep(self, weight: PackedWeight, key: tuple, matrix: Tensor) -> Tensor:
        if self.limit is None:
            self.limit = free_memory() // 2
        if matrix.nbytes > self.limit:
            return matrix
        matrix = in_huge_pages(matrix)  # it will be read many times
        while self.nbytes + matrix.nbytes > self.limit:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[key] = matrix
        self.nbytes += matrix.nbytes
        if key[0] not in self._known:
            self._known.add(key[0])
            weakref.finalize(weight, self._forget, key[0])
        return matrix

    def _forget(self, weight: int) -> None:
        """Drop what belongs to a weight that is no more: its id may soon be another's."""
        self._known.discard(weight)
        for key in [k for k in self._kept if k[0] == weight]:
            self.nbytes -= self._kept.pop(key).nbytes


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
