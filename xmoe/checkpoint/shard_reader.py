"""The tensors of a folder of safetensors files, read lazily.

Large models are split into several files ("shards") with `model.safetensors.index.json` saying which tensor is where.
Pickled weights (`.bin`, `.pt`) are never opened, because unpickling runs code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from xmoe.checkpoint.json_file import read_json
from xmoe.checkpoint.shard_header import TensorInfo, is_name, read_header
from xmoe.checkpoint.wording import few, first_line
from xmoe.errors import CheckpointError

INDEX = "model.safetensors.index.json"

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
            raise CheckpointError(f"{info.file}: cannot read {name}: {first_line(e)}") from e

    def release(self) -> None:
        """Unmap all files. Tensors that are still in use stay valid; the memory of all others is free again."""
        self._handles.clear()


def _by_index(index: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    folder = index.parent
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensor names to files; download or write it again")
    if odd := [name for name in weight_map if not is_name(name)]:
        raise CheckpointError(f"{index} is damaged: it names a tensor {odd[0][:80]!r}; download or write it again")
    names = sorted(set(weight_map.values()))
    if odd := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise CheckpointError(f"{index} names {odd[0]!r}; expected a .safetensors file of the same folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} shards: {few(missing)}; finish the download"
        )
    headers = {name: read_header(folder / name)[0] for name in names}
    if absent := [t for t, name in weight_map.items() if t not in headers[name]]:
        raise CheckpointError(
            f"{index} names {len(absent)} tensors that are not in the shard it says: {few(absent)}; "
            "index and shards are of different models"
        )
    if extra := [t for name in names for t in headers[name] if weight_map.get(t) != name]:
        raise CheckpointError(
            f"{folder} has {len(extra)} tensors in its shards of which the index knows nothing: {few(extra)}; "
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
                    f"{folder} lacks {len(lost)} of {match.group(3)} shards: numbers {few(lost)}; finish the download"
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
            f"{folder} holds pickled weights ({few(pickled)}), which are never opened because unpickling runs code; "
            "ask for a safetensors version or convert them where you trust the source"
        )
    if inner := sorted(p.parent.name for p in folder.glob("*/*.safetensors")):
        return f"{folder} has no weights of its own; they are in {folder / inner[0]}, pass that folder"
    return f"{folder} has no weights; expected *.safetensors files beside config.json"
