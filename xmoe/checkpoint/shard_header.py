"""The header of a safetensors file: where each of its tensors stands.

A safetensors file is an 8-byte little-endian length, a JSON header {name: {dtype, shape, data_offsets}} and the bytes of
all tensors without a gap. Headers are checked here before the safetensors library maps the file into memory, so that a
damaged download is one clear sentence; and made here before the first tensor is written.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xmoe.checkpoint.wording import first_line
from xmoe.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

ALIGNMENT = 64
"""Bytes at which torch's own tensors begin. Products of the same numbers may differ in the last bit elsewhere."""

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class TensorInfo(NamedTuple):
    """Where one tensor stands: bytes `start` to `stop` of `file`, row-major."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of dimension 0, the unit of :meth:`ShardWriter.copy_rows`."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else 0


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file, checked against each other and against the file's size."""

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged: {what}; download or write it again")

    try:
        size = os.path.getsize(file)
        with open(file, "rb") as f:
            prefix = f.read(8)
            if len(prefix) < 8:
                raise damaged(f"{size} bytes are too few for a safetensors file")
            length = struct.unpack("<Q", prefix)[0]
            if length > _MAX_HEADER_BYTES or 8 + length > size:
                raise damaged(f"its header would take {length:,} bytes and the file has {size:,}")
            text = f.read(length)
    except OSError as e:
        raise CheckpointError(f"cannot read {file}: {e.strerror or e}") from e
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as e:
        raise damaged(f"its header is no JSON ({first_line(e)})") from e
    if not isinstance(header, dict):
        raise damaged("its header is no JSON object")
    if odd := [name for name in header if not is_name(name)]:
        raise damaged(f"it names a tensor {odd[0][:80]!r}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged("its __metadata__ does not map names to texts")
    tensors = {name: _tensor_info(name, entry, file, 8 + length, damaged) for name, entry in header.items()}
    end = 8 + length
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if info.start != end:
            raise damaged(f"the bytes of {info.name} begin at {info.start:,} where {end:,} was expected")
        end = info.stop
    if end > size:
        raise CheckpointError(
            f"{file} is truncated: its header promises {end:,} bytes and it has {size:,}; download or write it again"
        )
    if end < size:
        raise damaged(f"{size - end:,} bytes follow the last tensor")
    return tensors, metadata


def _tensor_info(name: str, entry: Any, file: Path, base: int, damaged) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise damaged(f"{name} lacks one of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {str(dtype)[:40]!r}; expected one of {', '.join(DTYPES)}")
    if not _naturals(shape):
        raise damaged(f"{name} has shape {str(shape)[:80]}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise damaged(f"{name} has data_offsets {str(offsets)[:80]}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise damaged(f"{name} has {offsets[1] - offsets[0]:,} bytes where its shape {shape} takes {nbytes:,}")
    return TensorInfo(name, DTYPES[dtype], tuple(shape), file, base + offsets[0], base + offsets[1])


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands in it twice")
    return result


def is_name(name: str) -> bool:
    """Whether it may be a tensor's name, and fits into a message of one line."""
    return name.isprintable() and len(name) <= 200


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def make_header(
    file: Path, shard: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a file, and where its tensors will stand.

    The format allows no gaps, so tensors that fill whole units of ALIGNMENT come first and are all aligned; of the rest,
    wide dtypes come before narrow ones.
    """

    def order(item) -> tuple[bool, int]:
        dtype, shape = item[1]
        return math.prod(shape) * dtype.itemsize % ALIGNMENT != 0, -dtype.itemsize

    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end, places = 0, {}
    for name, (dtype, shape) in sorted(shard.items(), key=order):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        places[name] = (dtype, shape, start, end)
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    base = 8 + len(text)
    infos = {n: TensorInfo(n, d, s, file, base + start, base + stop) for n, (d, s, start, stop) in places.items()}
    return struct.pack("<Q", len(text)) + text, infos
