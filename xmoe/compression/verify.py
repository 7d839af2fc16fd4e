"""The proof: a pruned folder holds the bytes of its source, the right experts under the right numbers, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.shard_header import TensorInfo
from xmoe.compression import manifest
from xmoe.compression.cut import DEAD_BIAS, kept_rows
from xmoe.errors import CheckpointError

_BUFFER = 4 << 20


class Verification(NamedTuple):
    """ok, how many tensors and bytes were compared, and in one sentence what was proved or the first thing that differs."""

    ok: bool
    tensors: int
    bytes: int
    message: str


class _Differs(Exception):
    """The first difference."""


def verify(source: str | Path, pruned: str | Path) -> Verification:
    """Compare every byte of `pruned` with the rows of `source` that its manifest names, and both with their hashes.

    Raises:
        CheckpointError: either folder cannot be read, or `pruned` was not made by pruning alone.
    """
    whole, small = Checkpoint(source), Checkpoint(pruned)
    content = manifest.read(small.folder)
    if not content["bit_exact"] or content["kept"] is None:
        done = ", ".join(o["name"] for o in content["operations"])
        raise CheckpointError(f"{pruned} is not bit-exact ({done}), so its bytes cannot be proved against a source")
    compared, count = 0, 0
    try:
        kept = _check_manifest(content, whole, small)
        chosen = kept_rows(whole, kept)
        bar = tqdm(total=small.reader.total_bytes, desc="verifying", unit="B", unit_scale=True, disable=None)
        with bar:
            for name, info in small.reader.tensors.items():
                _check_tensor(name, whole.reader[name], info, chosen.get(name), content["tensors"])
                compared += info.nbytes
                count += 1
                bar.update(info.nbytes)
    except _Differs as e:
        return Verification(False, count, compared, str(e))
    experts = sum(len(row) for row in kept)
    return Verification(
        True, count, compared, f"{count} tensors, {compared:,} bytes: {experts} experts and all else equal the source"
    )


def _check_manifest(content: dict, whole: Checkpoint, small: Checkpoint) -> list[list[int]]:
    """The manifest against both folders; returns kept experts."""
    config, kept = whole.config, content["kept"]
    layers = config.num_hidden_layers
    if len(kept) != layers or small.config.num_hidden_layers != layers:
        raise _Differs(f"manifest: it lists {len(kept)} layers, the source has {layers}")
    for layer, row in enumerate(kept):
        E = config.experts_in_layer(layer)
        if not row or row != sorted(set(row)) or not all(type(e) is int and 0 <= e < E for e in row):
            raise _Differs(f"manifest: layer {layer} keeps {row}; expected ascending experts out of 0..{E - 1}")
        if len(row) > small.config.experts_in_layer(layer):
            raise _Differs(
                f"manifest: layer {layer} keeps {len(row)} experts, the folder has {small.config.experts_in_layer(layer)}"
            )
    k = min(config.num_experts_per_tok, *(len(row) for row in kept))
    if small.config.num_experts_per_tok != k:
        raise _Differs(f"config.json: {small.config.num_experts_per_tok} experts a token; expected {k}")
    listed = {entry["name"]: entry for entry in content["source"]["files"]}
    for file in whole.reader.files:
        entry = listed.get(file.name)
        if entry is None or entry["bytes"] != file.stat().st_size or entry["sha256"] != manifest.sha256_of(file):
            raise _Differs(f"source file {file.name} is not the one this folder was made from")
    gone = {name for name, rows in kept_rows(whole, kept).items() if not rows}
    for what, names in (("source", set(whole.reader) - gone), ("manifest", set(content["tensors"]))):
        if odd := sorted(names ^ set(small.reader)):
            raise _Differs(f"{odd[0]} is in the {what} and not in the folder, or the reverse")
    return kept


def _check_tensor(name: str, old: TensorInfo, new: TensorInfo, rows: list[int] | None, hashes: dict[str, str]) -> None:
    """`rows`: those of the source that the new tensor has to hold; None where it is the whole tensor."""
    if new.dtype != old.dtype:
        raise _Differs(f"{name} is {new.dtype}; in the source it is {old.dtype}")
    if rows is None:
        if new.shape != old.shape:
            raise _Differs(f"{name} has shape {list(new.shape)}; in the source it has {list(old.shape)}")
        if (at := _first_difference(old, old.start, new, new.start, new.nbytes)) is not None:
            raise _Differs(f"{name} differs from the source at byte {at}")
    else:
        for row, expert in enumerate(rows):
            at = _first_difference(
                old, old.start + expert * old.row_bytes, new, new.start + row * new.row_bytes, new.row_bytes
            )
            if at is not None:
                raise _Differs(f"{name}: expert {row} differs from expert {expert} of the source at byte {at}")
        _check_dead(name, new, len(rows))
    if manifest.sha256_of(new.file, new.start, new.stop) != hashes[name]:
        raise _Differs(f"{name} equals the source, but the manifest has another hash for it")


def _check_dead(name: str, info: TensorInfo, first: int) -> None:
    """Rows behind the kept ones fill a place only: zeros, and in a router's bias one value for all."""
    dead = info.shape[0] - first
    if not dead:
        return
    with open(info.file, "rb") as f:
        f.seek(info.start + first * info.row_bytes)
        data = f.read(dead * info.row_bytes)
    if any(data):
        values = torch.frombuffer(bytearray(data), dtype=info.dtype)
        expected = torch.tensor(DEAD_BIAS, dtype=info.dtype)
        if not (len(info.shape) == 1 and bool((values == expected).all())):
            raise _Differs(f"{name}: padding behind expert {first - 1} is not dead")


def _first_difference(a: TensorInfo, a_start: int, b: TensorInfo, b_start: int, count: int) -> int | None:
    """Where `count` bytes of two files first differ, relative to their starts."""
    with open(a.file, "rb", buffering=0) as f, open(b.file, "rb", buffering=0) as g:
        f.seek(a_start)
        g.seek(b_start)
        at = 0
        while at < count:
            size = min(_BUFFER, count - at)
            left, right = f.read(size), g.read(size)
            if left != right:
                return at + next(i for i, (x, y) in enumerate(zip(left, right)) if x != y)
            at += len(left)
    return None
