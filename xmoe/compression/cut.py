"""Act, on disk: prune_checkpoint copies the rows that stay from shard to shard, and decodes nothing.

In all layouts the expert is dimension 0 of every expert tensor, so an expert is one run of bytes in each. Memory is a
buffer of a few megabytes, whatever the size of the model. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from xmoe.checkpoint import forms, sidecars
from xmoe.checkpoint.config_keys import CONFIG
from xmoe.checkpoint.json_file import read_json
from xmoe.checkpoint.layouts import SELECTION_BIAS
from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.shard_writer import MAX_SHARD_BYTES, ShardWriter
from xmoe.compression import manifest
from xmoe.compression.apply import pruned_config
from xmoe.compression.identity import hash_of
from xmoe.compression.plan import PrunePlan
from xmoe.errors import ConfigError
from xmoe.model.describe import parameter_counts
from xmoe.outputs import check_free, new_folder

DEAD_BIAS = -1e4
"""Router bias of an expert that only fills a place: far below any logit, and finite in every type."""


def prune_checkpoint(
    source: str | Path,
    plan: PrunePlan,
    destination: str | Path,
    *,
    pad: bool = False,
    command: str = "",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the checkpoint `source` without the experts that `plan` drops, in the same layout, byte for byte.

    Router and expert tensors are copied row by row, everything else whole; config.json gets the new counts; tokenizer,
    templates and licences come along; `manifest.json` and a model card are added.

    Args:
        pad: where the plan keeps different counts, fill every layer up to the largest with dead experts (zero weights,
            router bias -10000), so that layouts with a single count can hold it. They are never chosen, and they cost
            as many bytes as live ones. Only the native layout holds different counts as they are.

    Raises:
        ConfigError: a plan for another model, or uneven counts that the layout cannot hold. CheckpointError: a source
            that cannot be read.
    """
    destination = check_free(destination, overwrite)
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    identity = identify(checkpoint)
    plan.check_model([config.experts_in_layer(i) for i in range(config.num_hidden_layers)], identity)
    uneven = not plan.is_uniform
    if uneven and not pad and checkpoint.layout.name != "native":
        raise ConfigError(
            f"the plan keeps {min(plan.counts)} to {max(plan.counts)} experts a layer and {checkpoint.layout.name} has "
            f"one count for all; pass --pad ({_padding(plan)} dead experts), convert the source to the native layout "
            "first, or plan with --budget uniform"
        )
    rows = max(plan.counts) if uneven and pad else None
    if rows is not None and "mixed" in (form.format for form in checkpoint.forms.values()):
        raise ConfigError(
            "experts that differ in form have no stack to be filled up; leave --pad out: native holds any count"
        )
    chosen = kept_rows(checkpoint, plan.kept)
    tensors = {}
    for name, info in checkpoint.reader.tensors.items():
        if name not in chosen:
            tensors[name] = (info.dtype, info.shape)
        elif chosen[name]:  # a part that loses all its experts goes
            tensors[name] = (info.dtype, (rows or len(chosen[name]), *info.shape[1:]))
    with (
        new_folder(destination, overwrite) as partial,
        manifest.SourceHashes(checkpoint.reader.files) as source_hashes,
    ):
        hashes = {}
        writer = ShardWriter(partial, tensors, max_shard_bytes, checkpoint.layout.shard_name)
        bar = tqdm(total=writer.total_bytes, desc="pruning", unit="B", unit_scale=True, disable=None)
        with writer, bar:
            for name in tensors:
                digest, kept = hashlib.sha256(), chosen.get(name)
                writer.copy_rows(name, checkpoint.reader, name, kept, digest)
                if kept is not None and rows is not None and rows > len(kept):
                    dead = _dead_rows(name, checkpoint, rows - len(kept))
                    writer.append(name, dead)
                    digest.update(dead.contiguous().view(torch.uint8).numpy().tobytes())
                hashes[name] = digest.hexdigest()
                bar.update(writer.tensors[name].nbytes)
        sidecars.keep(checkpoint.folder, partial)
        _write_config(checkpoint, plan, rows, partial)
        after = pruned_config(config, plan)
        spared = [[row[e] for e in kept] for row, kept in zip(checkpoint.spared, plan.kept)]
        total, active = parameter_counts(after, spared)
        operation = {"name": "prune", "criterion": plan.criterion, "budget": plan.budget, "data": plan.data}
        if rows is not None:
            operation["padded_to"] = rows
        manifest.write(
            partial,
            source=checkpoint,
            source_model=identity,
            source_files=source_hashes.entries(),
            kept=plan.kept,
            operations=[operation],
            bit_exact=True,
            tensors=hashes,
            after={
                "bytes": writer.total_bytes,
                "parameters": total,
                "active_parameters": active,
            },
            command=command,
        )
        plan.save(partial / "plan.json")
        manifest.card(partial)
    return destination


def identify(checkpoint: Checkpoint) -> str:
    """The model hash of a checkpoint on disk; touches small tensors only."""
    return hash_of(checkpoint.config, checkpoint.weight)


def kept_rows(checkpoint: Checkpoint, kept: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Names on disk of all tensors with the expert on dimension 0 -> the rows that hold the experts `kept` of their layer.

    A row is an expert, but where the experts of a layer differ in form: there every part has rows of its own.
    """
    found: dict[str, list[int]] = {}
    for native in checkpoint:
        if native in checkpoint.forms:
            held = forms.members(checkpoint.reader, checkpoint.forms[native])
        elif ".moe.router." in native or ".moe.experts." in native:
            held = dict.fromkeys(checkpoint.stored_names(native))
        else:
            continue
        chosen = kept[int(native.split(".")[1])]
        for name, ids in held.items():
            found[name] = list(chosen) if ids is None else [row for row, e in enumerate(ids) if e in set(chosen)]
    for layer in range(checkpoint.config.num_hidden_layers):
        if (name := SELECTION_BIAS.format(i=layer)) in checkpoint.reader:
            found[name] = list(kept[layer])
    return found


def _dead_rows(name: str, checkpoint: Checkpoint, count: int) -> torch.Tensor:
    info = checkpoint.reader[name]
    router_bias = next(r.foreign[0] for r in checkpoint.layout.layer if r.native.endswith("moe.router.bias"))
    is_bias = name in {router_bias.format(i=i) for i in range(checkpoint.config.num_hidden_layers)}
    return torch.full((count, *info.shape[1:]), DEAD_BIAS if is_bias else 0, dtype=info.dtype)


def _padding(plan: PrunePlan) -> int:
    return sum(max(plan.counts) - n for n in plan.counts)


def _write_config(checkpoint: Checkpoint, plan: PrunePlan, padded_to: int | None, folder: Path) -> None:
    """config.json with new counts under whatever names the source has for them, all else as it was."""
    content: dict[str, Any] = read_json(checkpoint.folder / CONFIG)
    after = pruned_config(checkpoint.config, plan)
    counts: Any = padded_to or after.num_experts
    counts = list(counts) if isinstance(counts, tuple) else counts
    for name in ("num_experts", "num_local_experts"):
        if name in content:
            content[name] = counts
    for name in ("num_experts_per_tok", "experts_per_token"):
        if name in content:
            content[name] = after.num_experts_per_tok
    if content.get("reasoning_effort") is not None:
        content["reasoning_effort"] = after.reasoning_effort
    if checkpoint.layout.name == "openai":  # its reference loader accepts no keys but its own
        if (labels := checkpoint.folder / "dtypes.json").is_file():
            shutil.copyfile(labels, folder / "dtypes.json")
    else:
        content["kept_experts"] = [list(row) for row in plan.kept]
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
