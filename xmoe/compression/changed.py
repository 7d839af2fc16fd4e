"""Write a model whose weights were changed (merged, reduced, recovered) beside the story of how: manifest and model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.shards import ShardReader
from xmoe.checkpoint.weights import save
from xmoe.compression import manifest
from xmoe.compression.cut import identify
from xmoe.model.describe import model_parameter_counts
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
    if layout is None:
        layout = checkpoint.layout.name if _holds(checkpoint, model) else "native"
    with new_folder(destination, overwrite) as partial, manifest.SourceHashes(checkpoint.reader.files) as hashes:
        save(model, partial, layout)
        reader = ShardReader(partial)
        total, active = model_parameter_counts(model)
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


def _holds(checkpoint: Checkpoint, model: Transformer) -> bool:
    """Whether the source's layout keeps the formats the experts now have, without decoding or encoding them on the way."""
    formats = {m.format for m in model.modules() if isinstance(m, PackedWeight)} or {"dense"}
    return checkpoint.layout.experts is None or formats == {checkpoint.layout.experts}
