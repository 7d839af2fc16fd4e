"""Write a model whose weights were changed (merged, reduced, recovered) beside the story of how: manifest and model card."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.weights import Source, save
from xmoe.compression import manifest
from xmoe.compression.cut import identify
from xmoe.model.transformer import Transformer
from xmoe.outputs import new_folder
from xmoe.quantization.packed import PackedWeight


def save_changed(
    model: Transformer,
    source: str | Path,
    destination: str | Path,
    operations: list[dict[str, Any]],
    *,
    layout: str | None = None,
    command: str = "",
    overwrite: bool = False,
) -> Path:
    """A checkpoint of `model`, made from the one at `source` by `operations`; the manifest says that it is not bit-exact.

    Args:
        layout: None keeps that of the source where it can hold the experts' format, and takes native where it cannot.
    """
    checkpoint = Checkpoint(source)
    if not hasattr(model, "source"):  # made anew: what lies beside the weights comes along all the same
        model.source = Source(checkpoint.folder, checkpoint.extra)
    formats = {m.format for m in model.modules() if isinstance(m, PackedWeight)} or {"dense"}

    def write(folder: Path, layout: str) -> None:
        save(model, folder, layout)

    return write_changed(
        checkpoint, destination, operations, formats, write, layout=layout, command=command, overwrite=overwrite
    )


def write_changed(
    checkpoint: Checkpoint,
    destination: str | Path,
    operations: list[dict[str, Any]],
    formats: Collection[str],
    write: Callable[[Path, str], None],
    *,
    layout: str | None = None,
    command: str = "",
    overwrite: bool = False,
) -> Path:
    """As :func:`save_changed` for weights that are elsewhere: `write` puts a checkpoint of a layout into an empty folder.

    Args:
        formats: of the experts, as they are now.
    """
    if layout is None:  # that of the source where it keeps the formats, without decoding or encoding on the way
        holds = checkpoint.layout.experts is None or set(formats) == {checkpoint.layout.experts}
        layout = checkpoint.layout.name if holds else "native"
    with new_folder(destination, overwrite) as partial, manifest.SourceHashes(checkpoint.reader.files) as hashes:
        write(partial, layout)
        written = Checkpoint(partial)
        reader = written.reader
        total, active = written.parameter_counts
        manifest.write(
            partial,
            source=checkpoint,
            source_model=identify(checkpoint),
            source_files=hashes.entries(),
            kept=None,
            operations=operations,
            bit_exact=False,
            tensors={n: manifest.sha256_of(i.file, i.start, i.stop) for n, i in reader.tensors.items()},
            after={
                "bytes": reader.total_bytes,
                "parameters": total,
                "active_parameters": active,
            },
            command=command,
        )
        manifest.card(partial)
    return Path(destination)
