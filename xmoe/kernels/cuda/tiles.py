"""Tile table: which block shape each Triton kernel uses for how many rows, read from tiles/<arch>.json.

A file is {"arch", "triton", "measured", "kernels": {kernel: [{"rows": limit or null, ...tile}, ...]}}: the first entry
whose limit is at least the number of rows counts (rows an expert, on average, for grouped kernels; keys or queries for
attention). `python3 benchmarks/gpu.py tune` writes such a file, named after the Triton version it was measured with
(`sm_90-triton3.6.json`) and read for that version alone. sm_90.json serves what has no table of its own. Searching at run
time is left out on purpose: it would need a driver at import, and a decode step must not stop to try things.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("tiles")
DEFAULT = "sm_90"
_overrides: list[Mapping[str, Mapping[str, int]]] = []


def tile(kernel: str, rows: int, device: torch.device) -> dict[str, int]:
    """The tile of `kernel` for `rows` rows on this device: block sizes by constexpr name, `warps` and `stages`."""
    for override in reversed(_overrides):
        if kernel in override:
            return dict(override[kernel])
    for entry in _table(*table_name(device))[kernel]:
        if entry["rows"] is None or rows <= entry["rows"]:
            return {key: value for key, value in entry.items() if key != "rows"}
    raise LookupError(f"the tile table has no entry for {kernel} with {rows} rows; the last one must have rows: null")


@contextlib.contextmanager
def override(tiles: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Use these tiles, by kernel, whatever the table says: how tests shrink tiles and how tuning tries them."""
    _overrides.append(tiles)
    try:
        yield
    finally:
        _overrides.pop()


def entries(arch: str = DEFAULT, triton_version: str = "") -> dict[str, list[dict[str, int | None]]]:
    """All kernels' tiles for an architecture (`sm_90`), and for one Triton version ("3.6") if there is such a table."""
    return _table(arch, triton_version)


def written(arch: str, triton_version: str, measured: str | None, table: Mapping[str, list]) -> str:
    """The text of a table file, an entry a line. measured: the date, or None for tiles that no GPU has confirmed."""
    kernels = ",\n".join(
        f"    {json.dumps(kernel)}: [\n" + ",\n".join(f"      {json.dumps(entry)}" for entry in found) + "\n    ]"
        for kernel, found in table.items()
    )
    head = {"arch": arch, "triton": triton_version or "any", "measured": measured}
    lines = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    return "{\n" + lines + '  "kernels": {\n' + kernels + "\n  }\n}\n"


def table_name(device: torch.device) -> tuple[str, str]:
    """(architecture, Triton version) of a device; what the tests use, where it is no CUDA device."""
    if device.type != "cuda":
        return DEFAULT, ""
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _architecture(index: int) -> tuple[str, str]:
    import triton

    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}", ".".join(triton.__version__.split(".")[:2])


@functools.cache
def _table(arch: str, triton_version: str) -> dict[str, list[dict[str, int | None]]]:
    table: dict[str, list[dict[str, int | None]]] = {}
    for name in (DEFAULT, arch, f"{arch}-triton{triton_version}"):  # later files win, kernel by kernel
        path = FOLDER / f"{name}.json"
        if path.exists():
            table.update(json.loads(path.read_text(encoding="utf-8"))["kernels"])
    return table
