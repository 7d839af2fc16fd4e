"""manifest.json: what a compressed folder was made from, what was done to it, and a hash of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from xmoe.checkpoint.json_file import read_json
from xmoe.checkpoint.opened import Checkpoint
from xmoe.errors import CheckpointError

SCHEMA_VERSION = 1
FILE = "manifest.json"
_BUFFER = 4 << 20


def sha256_of(file: Path, start: int = 0, stop: int | None = None) -> str:
    """sha256 of a file, or of the bytes `start` to `stop` of it."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER))
    with open(file, "rb", buffering=0) as f:
        f.seek(start)
        left = (file.stat().st_size if stop is None else stop) - start
        while left > 0 and (got := f.readinto(buffer[: min(left, _BUFFER)])):
            digest.update(buffer[:got])
            left -= got
    return digest.hexdigest()


class SourceHashes:
    """sha256 of all weight files of a checkpoint, computed in a thread while the same bytes are being copied."""

    def __init__(self, files: Iterable[Path]):
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._found = {file: self._pool.submit(sha256_of, file) for file in files}

    def __enter__(self) -> SourceHashes:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def entries(self) -> list[dict[str, Any]]:
        """What the manifest says about each file; waits for the hashes."""
        return [
            {"name": file.name, "bytes": file.stat().st_size, "sha256": found.result()}
            for file, found in self._found.items()
        ]


def write(
    folder: Path,
    *,
    source: Checkpoint,
    source_model: str,
    source_files: list[dict[str, Any]],
    kept: Iterable[Iterable[int]] | None,
    operations: list[dict[str, Any]],
    bit_exact: bool,
    tensors: Mapping[str, str],
    after: Mapping[str, Any],
    command: str = "",
) -> None:
    """Write manifest.json into `folder`; see the module's page. `after` has bytes and parameters, as `before` will."""
    total, active = source.parameter_counts
    content = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": source_model,
        "source": {"name": source.folder.resolve().name, "layout": source.layout.name, "files": source_files},
        "bit_exact": bit_exact,
        "operations": operations,
        "kept": None if kept is None else [list(row) for row in kept],
        "before": {
            "bytes": source.reader.total_bytes,
            "parameters": total,
            "active_parameters": active,
        },
        "after": dict(after),
        "tensors": dict(tensors),
    }
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a compressed folder; CheckpointError where there is none or it is malformed."""
    if not (folder / FILE).is_file():
        raise CheckpointError(f"{folder} has no {FILE}; expected a folder that compress.py wrote")
    content = read_json(folder / FILE)
    wanted = {"source": dict, "bit_exact": bool, "tensors": dict, "operations": list, "before": dict, "after": dict}
    wrong = [k for k, kind in wanted.items() if not isinstance(content.get(k), kind)]
    if content.get("schema_version") != SCHEMA_VERSION or wrong or "kept" not in content:
        raise CheckpointError(f"{folder / FILE} is malformed ({', '.join(wrong) or 'schema_version'}); write it again")
    return content


def card(folder: Path) -> None:
    """README.md: the model card, from the manifest beside it."""
    m = read(folder)
    before, after = m["before"], m["after"]
    kept = m["kept"]
    lines = [
        "---",
        "library_name: xmoe",
        "tags: [mixture-of-experts, pruned]" if kept else "tags: [mixture-of-experts, compressed]",
        "---",
        "",
        f"# {m['source']['name']}, compressed",
        "",
        f"Made from `{m['source']['name']}` (model hash `{m['model']}`) by xmoe: "
        + "; ".join(_sentence(o) for o in m["operations"])
        + ".",
        "",
        "Every kept weight has the bytes it had in the source; `compress.py verify` proves it against that folder."
        if m["bit_exact"]
        else "Weights were changed: this folder is not bit-exact.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| bytes of weights | {before['bytes']:,} | {after['bytes']:,} |",
        f"| parameters | {before['parameters']:,} | {after['parameters']:,} |",
        f"| active a token | {before['active_parameters']:,} | {after['active_parameters']:,} |",
    ]
    if kept:
        lines += ["", "Experts kept, by their numbers in the source:", "", "| layer | experts |", "|---|---|"]
        lines += [f"| {i} | {' '.join(map(str, row))} |" for i, row in enumerate(kept)]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sentence(operation: dict[str, Any]) -> str:
    said = [f"{k} {v}" for k, v in operation.items() if k != "name" and isinstance(v, (str, int, float))]
    return operation["name"] + (f" ({', '.join(said)})" if said else "")
