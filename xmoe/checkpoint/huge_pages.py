"""Tensors in huge pages, for those who would rather wait once than decode from a file mapped in pages of 4 kB.

Recent kernels keep a file in pieces of 2 MB where it was written or read in large pieces, and map those as they are:
such a shard stays mapped, since nothing would be won. Any other is read, not copied from the map, whose small pages cost
a fault every few of them and count as this process's memory beside the copy. All threads read, since the first touch of
a page, which clears it, takes longer than the bytes that follow.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from xmoe.checkpoint.shard_header import ALIGNMENT, TensorInfo
from xmoe.checkpoint.shard_reader import ShardReader
from xmoe.errors import CheckpointError
from xmoe.kernels.memory import HUGE, empty_in_huge_pages, in_huge_pages

_PIECE = 4 * HUGE  # bytes a thread reads at a time
_MOSTLY = 0.75  # of a shard in huge pages is enough to leave it mapped
_FIRST = 32  # windows of a shard, far apart, that are tried before all are: a slow disk would seek for each
_SMALL = 64 << 20  # tensors up to this size at odd addresses would be copied anyway: see `weights`


class HugePageReader(ShardReader):
    """A reader whose tensors lie in huge pages; small ones are mapped, and all are where the system has no such pages.

    leave: names of tensors that stay mapped, in whatever pages.
    """

    def __init__(self, folder: str | Path, leave: Collection[str] = ()):
        super().__init__(folder)
        self._leave = frozenset(leave)
        self._maps: dict[Path, Tensor | None] = {}
        self._made: set[int] = set()

    def tensor(self, name: str) -> Tensor:
        """As :meth:`ShardReader.tensor`, but in huge pages now, by map or by copy.

        Raises:
            CheckpointError: the file cannot be read, or became shorter since it was opened.
        """
        info = self[name]
        room = empty_in_huge_pages(info.shape, info.dtype)  # costs nothing before it is touched
        if room is None or name in self._leave or not hasattr(os, "preadv"):
            return super().tensor(name)
        mapped = self._mapped(info)
        if mapped is None:
            _read(info, memoryview(room.view(-1).view(torch.uint8).numpy()))
        else:
            room = mapped
        self._made.add(room.data_ptr())
        return room

    def settle(self, value: Tensor) -> Tensor:
        """`value` in huge pages: itself if :meth:`tensor` made it, a copy if it was joined, converted or decoded since."""
        return value if value.data_ptr() in self._made else in_huge_pages(value)

    def _mapped(self, info: TensorInfo) -> Tensor | None:
        """The tensor where it lies in its shard, if the kernel has that in huge pages and no copy would be made anyway."""
        if info.file not in self._maps:
            left = [i for name in self._leave if (i := self.tensors[name]).file == info.file]
            self._maps[info.file] = _mapped_in_huge_pages(info.file, left)
        whole = self._maps[info.file]
        odd = info.start % (ALIGNMENT if info.nbytes <= _SMALL else info.dtype.itemsize)
        if whole is None or odd or len(whole) < info.stop:
            return None
        return whole[info.start : info.stop].view(info.dtype).view(info.shape)


def _mapped_in_huge_pages(file: Path, left: Collection[TensorInfo]) -> Tensor | None:
    """The bytes of a file as a private map, None where less than most of it, tensors `left` out, lies in huge pages."""
    try:
        with open(file, "rb") as f:
            room = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        room.madvise(mmap.MADV_HUGEPAGE)  # what is not in memory yet is then read in such pieces
    except (OSError, ValueError):  # gone, empty, or a kernel without huge pages: whoever reads will tell
        return None
    whole = torch.frombuffer(room, dtype=torch.uint8)
    windows = torch.arange(0, len(whole) // HUGE * HUGE, HUGE)
    for info in left:
        windows = windows[(windows + HUGE <= info.start) | (windows >= info.stop)]
    if not len(windows):
        return None
    for some in (windows[:: -(-len(windows) // _FIRST)], windows):
        whole[some].sum()  # one byte of each maps the page that it is in
        if _huge_bytes(whole.data_ptr()) < _MOSTLY * HUGE * len(some):
            return None
    return whole


def _huge_bytes(address: int) -> int:
    """Bytes in huge pages of the file's map that holds `address`, by Linux; 0 where it does not say."""
    inside = False
    try:
        with open("/proc/self/smaps", encoding="ascii", errors="replace") as f:
            for line in f:
                word = line.split(maxsplit=1)[0]
                if not word.endswith(":"):
                    start, stop = (int(x, 16) for x in word.split("-"))
                    inside = start <= address < stop
                elif inside and word == "FilePmdMapped:":
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


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
