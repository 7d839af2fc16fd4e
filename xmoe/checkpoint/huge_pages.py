"""Tensors read into huge pages, for those who would rather wait once than decode from a mapped file.

They are read, not copied from the map: the map comes in pages of 4 kB, which cost a fault every few of them and count as this
process's memory beside the copy. All threads read, since the first touch of a page, which clears it, takes longer than
the bytes that follow.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from xmoe.checkpoint.shards import ShardReader, TensorInfo
from xmoe.errors import CheckpointError
from xmoe.kernels.memory import HUGE, empty_in_huge_pages, in_huge_pages

_PIECE = 4 * HUGE  # bytes a thread reads at a time


class HugePageReader(ShardReader):
    """A reader whose tensors lie in huge pages; small ones are mapped, and all are where the system has no such pages.

    leave: names of tensors that stay mapped.
    """

    def __init__(self, folder: str | Path, leave: Collection[str] = ()):
        super().__init__(folder)
        self._leave = frozenset(leave)
        self._made: set[int] = set()

    def tensor(self, name: str) -> Tensor:
        """As :meth:`ShardReader.tensor`, but read now.

        Raises:
            CheckpointError: the file cannot be read, or became shorter since it was opened.
        """
        info = self[name]
        wanted = name not in self._leave and hasattr(os, "preadv")
        room = empty_in_huge_pages(info.shape, info.dtype) if wanted else None
        if room is None:
            return super().tensor(name)
        _read(info, memoryview(room.view(-1).view(torch.uint8).numpy()))
        self._made.add(room.data_ptr())
        return room

    def settle(self, value: Tensor) -> Tensor:
        """`value` in huge pages: itself if :meth:`tensor` made it, a copy if it was joined, converted or decoded since."""
        return value if value.data_ptr() in self._made else in_huge_pages(value)


def _read(info: TensorInfo, into: memoryview) -> None:
    """The bytes of a tensor, piece by piece by as many threads as torch has."""
    try:
        file = os.open(info.file, os.O_RDONLY)
    except OSError as e:
        raise CheckpointError(f"cannot read {info.file}: {e.strerror}") from e

    def piece(start: int) -> None:
        stop = min(start + _PIECE, len(into))
        while start < stop:
            got = os.preadv(file, [into[start:stop]], info.start + start)
            if not got:
                raise CheckpointError(f"{info.file} was shortened while {info.name} was read; try again")
            start += got

    try:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(piece, range(0, len(into), _PIECE)):
                pass
    except OSError as e:
        raise CheckpointError(f"{info.file}: cannot read {info.name}: {e.strerror}") from e
    finally:
        os.close(file)
