"""Tensors written into a folder of safetensors files within bounded memory, or copied there as bytes from another one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from xmoe.checkpoint.shard_header import TensorInfo, make_header
from xmoe.checkpoint.shard_reader import INDEX, ShardReader
from xmoe.checkpoint.wording import few
from xmoe.errors import CheckpointError

SINGLE = "model.safetensors"

MAX_SHARD_BYTES = 5_000_000_000
"""The hub's customary limit for one file."""

_COPY_BUFFER = 8 << 20


class ShardWriter:
    """Writes tensors into one or several safetensors files of `folder`, holding none of them.

    All names, dtypes and shapes are known up front, so every byte has its place before the first one is written;
    tensors may then come in any order and in pieces along dimension 0. Use it within `with`: the end of the block
    checks that every tensor is complete and writes the index where there is more than one file.

    Args:
        folder: an existing folder (see :func:`xmoe.outputs.new_folder` for making it appear whole).
        tensors: name -> (dtype, shape).
        max_shard_bytes: tensors are put into a new file when this would be passed; a larger tensor has a file alone.
        shard_name: name of a file among several, with `{number}` (from 1) and `{count}`.
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        shard_name: str = "model-{number:05d}-of-{count:05d}.safetensors",
    ):
        self.folder = Path(folder)
        shards = _split({n: (d, tuple(s)) for n, (d, s) in tensors.items()}, max_shard_bytes)
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[Path, BinaryIO] = {}
        self._written = dict.fromkeys(tensors, 0)
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else shard_name.format(number=number, count=len(shards))
            file = self.folder / name
            header, infos = make_header(file, shard)
            stream = self._files[file] = open(file, "w+b")  # noqa: SIM115  closed by __exit__
            stream.write(header)
            self.tensors |= infos

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        for stream in self._files.values():
            stream.close()
        if kind is None:
            incomplete = [n for n, info in self.tensors.items() if self._written[n] != info.nbytes]
            assert not incomplete, f"never completed: {few(incomplete)}"
            if len(self._files) > 1:
                self._write_index()

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def append(self, name: str, tensor: Tensor) -> None:
        """Write `tensor` as the next rows of `name` (the whole of it, if that is what it is)."""
        info = self.tensors[name]
        assert tensor.dtype == info.dtype, f"{name}: {tensor.dtype} given, {info.dtype} announced"
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._put(info, memoryview(flat.numpy()))

    def copy_rows(
        self, name: str, reader: ShardReader, source: str, rows: Sequence[int] | None = None, digest: Any = None
    ) -> None:
        """Append rows of dimension 0 of the tensor `source`, byte for byte, without decoding them.

        Args:
            rows: row numbers in the order wanted; None copies the whole tensor.
            digest: a hashlib object fed with every byte that is copied.
        """
        info = reader[source]
        assert info.dtype == self.tensors[name].dtype, f"{name}: {source} has another dtype"
        spans = [(info.start, info.stop)] if rows is None else _spans(info, rows)
        buffer = memoryview(bytearray(min(_COPY_BUFFER, max(info.nbytes, 1))))
        with open(info.file, "rb", buffering=0) as f:
            for start, stop in spans:
                f.seek(start)
                while start < stop:
                    got = f.readinto(buffer[: min(len(buffer), stop - start)])
                    if not got:
                        raise CheckpointError(f"{info.file} was shortened while {source} was copied; try again")
                    if digest is not None:
                        digest.update(buffer[:got])
                    self._put(self.tensors[name], buffer[:got])
                    start += got

    def _put(self, info: TensorInfo, data: memoryview) -> None:
        at = self._written[info.name]
        assert at + len(data) <= info.nbytes, f"{info.name}: more bytes than announced"
        stream = self._files[info.file]
        stream.seek(info.start + at)
        stream.write(data)
        self._written[info.name] = at + len(data)

    def _write_index(self) -> None:
        weight_map = {name: self.tensors[name].file.name for name in sorted(self.tensors)}
        content = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _split(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> list[dict]:
    shards: list[dict] = [{}]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled += nbytes
    return shards


def _spans(info: TensorInfo, rows: Sequence[int]) -> list[tuple[int, int]]:
    """Byte ranges of `rows`, neighbours joined."""
    spans: list[tuple[int, int]] = []
    for row in rows:
        assert 0 <= row < info.shape[0], f"{info.name} has rows 0..{info.shape[0] - 1}, not {row}"
        start = info.start + row * info.row_bytes
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, info.start + (row + 1) * info.row_bytes))
    return spans
