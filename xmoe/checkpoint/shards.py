"""The tensors of a folder of safetensors files: read lazily, copied as bytes, written within bounded memory.

A safetensors file is an 8-byte little-endian length, a JSON header {name: {dtype, shape, data_offsets}} and the bytes of
all tensors without a gap. Large models are split into several files ("shards") with `model.safetensors.index.json` saying
which tensor is where. Headers are checked here before the safetensors library maps the file into memory, so that a
damaged download is one clear sentence; pickled weights (`.bin`, `.pt`) are never opened, because unpickling runs code.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from xmoe.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

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

MAX_SHARD_BYTES = 5_000_000_000
"""The hub's customary limit for one file."""

ALIGNMENT = 64
"""Bytes at which torch's own tensors begin. Products of the same numbers may differ in the last bit elsewhere."""

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_COPY_BUFFER = 8 << 20


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


# ---------------------------------------------------------------------------------------------------------- reading


class ShardReader:
    """All tensors of a folder by name. Opening it reads and checks headers only.

    With an index, the tensors are those it names, in the shards it says; without one, those of every file whose name
    begins with `model` (routing statistics may lie beside them), or of every `*.safetensors` file where none does.

    Raises:
        CheckpointError: no weights, pickled weights, a missing or truncated shard, a malformed header or index, an index
            and shards that disagree.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is no folder; expected one with config.json and *.safetensors files")
        index = self.folder / INDEX
        self.files: tuple[Path, ...]
        self.tensors: dict[str, TensorInfo]
        if index.is_file():
            self.files, self.tensors = _by_index(index)
        else:
            self.files, self.tensors = _by_scan(self.folder)
        self._handles: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}") from None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers left out: the `total_size` of an index."""
        return sum(info.nbytes for info in self.tensors.values())

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file on the CPU: nothing is read until it is touched.

        The mapping is private, so writing into the tensor changes memory and never the file.
        """
        info = self[name]
        handle = self._handles.get(info.file)
        try:
            if handle is None:
                from safetensors import safe_open

                handle = self._handles[info.file] = safe_open(info.file, framework="pt")
            return handle.get_tensor(name)
        except Exception as e:  # the library has an error type of its own, and OSError besides
            raise CheckpointError(f"{info.file}: cannot read {name}: {_first_line(e)}") from e

    def release(self) -> None:
        """Unmap all files. Tensors that are still in use stay valid; the memory of all others is free again."""
        self._handles.clear()


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
        raise damaged(f"its header is no JSON ({_first_line(e)})") from e
    if not isinstance(header, dict):
        raise damaged("its header is no JSON object")
    if odd := [name for name in header if not _is_name(name)]:
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


def _by_index(index: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    folder = index.parent
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensor names to files; download or write it again")
    if odd := [name for name in weight_map if not _is_name(name)]:
        raise CheckpointError(f"{index} is damaged: it names a tensor {odd[0][:80]!r}; download or write it again")
    names = sorted(set(weight_map.values()))
    if odd := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise CheckpointError(f"{index} names {odd[0]!r}; expected a .safetensors file of the same folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} shards: {_some(missing)}; finish the download"
        )
    headers = {name: read_header(folder / name)[0] for name in names}
    if absent := [t for t, name in weight_map.items() if t not in headers[name]]:
        raise CheckpointError(
            f"{index} names {len(absent)} tensors that are not in the shard it says: {_some(absent)}; "
            "index and shards are of different models"
        )
    if extra := [t for name in names for t in headers[name] if weight_map.get(t) != name]:
        raise CheckpointError(
            f"{folder} has {len(extra)} tensors in its shards of which the index knows nothing: {_some(extra)}; "
            "index and shards are of different models"
        )
    return tuple(folder / name for name in names), {t: headers[name][t] for t, name in weight_map.items()}


def _by_scan(folder: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    found = sorted(p for p in folder.glob("*.safetensors") if p.is_file() and not p.name.startswith("."))
    files = [p for p in found if p.name.startswith("model")] or found
    if not files:
        raise CheckpointError(_no_weights(folder))
    for file in files:
        # `model-00001-of-00003.safetensors` counts from 1, the published GPT-OSS files from 0: both ends say how many.
        if match := re.fullmatch(r"(.*-)(\d+)-of-(\d+)\.safetensors", file.name):
            numbers = {
                int(m.group(2)) for f in files if (m := re.fullmatch(r"(.*-)(\d+)-of-(\d+)\.safetensors", f.name))
            }
            if lost := sorted(set(range(1, int(match.group(3)) + 1)) - numbers):
                raise CheckpointError(
                    f"{folder} lacks {len(lost)} of {match.group(3)} shards: numbers {_some(lost)}; finish the download"
                )
            break
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file)[0].items():
            if name in tensors:
                raise CheckpointError(f"{name} stands both in {tensors[name].file.name} and in {file.name} of {folder}")
            tensors[name] = info
    return tuple(files), tensors


def _no_weights(folder: Path) -> str:
    if pickled := sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED):
        return (
            f"{folder} holds pickled weights ({_some(pickled)}), which are never opened because unpickling runs code; "
            "ask for a safetensors version or convert them where you trust the source"
        )
    if inner := sorted(p.parent.name for p in folder.glob("*/*.safetensors")):
        return f"{folder} has no weights of its own; they are in {folder / inner[0]}, pass that folder"
    return f"{folder} has no weights; expected *.safetensors files beside config.json"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; a CheckpointError where it is missing or malformed."""
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}; expected a checkpoint folder") from None
    except OSError as e:
        raise CheckpointError(f"cannot read {file}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file} is no JSON ({_first_line(e)}); download or write it again") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no JSON object; download or write it again")
    return content


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands in it twice")
    return result


def _is_name(name: str) -> bool:
    """Whether it may be a tensor's name, and fits into a message of one line."""
    return name.isprintable() and len(name) <= 200


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _some(names: Sequence[Any], most: int = 4) -> str:
    shown = ", ".join(str(n) for n in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# ---------------------------------------------------------------------------------------------------------- writing


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
            header, infos = _header(file, shard)
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
            assert not incomplete, f"never completed: {_some(incomplete)}"
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


def _header(file: Path, shard: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, TensorInfo]]:
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
