"""Adapters on disk, and merged into the weights they stand beside.

    DIR/
        adapter.json          rank of each group, alpha, which base model
        adapter.safetensors   fp32: NAME.a [r, in] and NAME.b [out, r] of every adapted weight NAME, [E, ...] of experts

Such a folder means something beside one base model only, whatever the layout it is stored in; any other is refused.
A merge adds b a to the weights. Experts that become MXFP4 again are rounded to it: see :class:`Merge`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xmoe.checkpoint.json_file import read_json
from xmoe.checkpoint.layouts import mismatch, native_shapes
from xmoe.checkpoint.opened import ADAPTER
from xmoe.checkpoint.shard_header import read_header
from xmoe.errors import CheckpointError, ConfigError
from xmoe.model.adapter import GROUPS, LoRA, Settings, adapted, adapters, attach, detach, weight_of
from xmoe.model.config import ModelConfig
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight

SCHEMA_VERSION = 1
ABOUT, TENSORS = ADAPTER, "adapter.safetensors"
MERGED = "merge.json"

Weight = Tensor | PackedWeight


# ---------------------------------------------------------------------------------------------------- which base model


def base_hash(config: ModelConfig, weight: Callable[[str], Weight]) -> str:
    """sha256 (16 hex digits) over the model's shape and some rows of every weight that an adapter may change.

    Rounded to bfloat16 first, in which MXFP4 is exact: a model has one hash in every layout and compute type, packed or
    decoded, and another after a merge, a cut or more training.
    """
    experts = [config.experts_in_layer(i) for i in range(config.num_hidden_layers)]
    digest = hashlib.sha256(f"{config.hidden_size} {config.intermediate_size} {experts}".encode())
    for layer in range(config.num_hidden_layers):
        for name in (
            "attn.qkv.weight",
            "attn.out.weight",
            "moe.router.weight",
            "moe.experts.gate_up",
            "moe.experts.down",
        ):
            for rows in _witnesses(weight(f"blocks.{layer}.{name}")):
                rounded = rows.detach().to("cpu", torch.bfloat16).contiguous()
                digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _witnesses(weight: Weight) -> list[Tensor]:
    """First, middle and last row of a matrix; of an expert stack, of its first and last expert."""
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return [weight[[0, len(weight) // 2, -1]]]
    E, out, _ = weight.shape
    rows = [0, out // 2, out - 1]
    if isinstance(weight, Tensor):
        return [weight[e][rows] for e in (0, E - 1)]
    if type(weight) is PackedWeight and weight.format == "mxfp4":  # decode these rows alone
        parts = [PackedWeight("mxfp4", {n: t[e : e + 1, rows] for n, t in weight.tensors.items()}) for e in (0, E - 1)]
        return [part.decode()[0] for part in parts]
    return [weight.decode([e], torch.float32)[0][rows] for e in (0, E - 1)]


# ------------------------------------------------------------------------------------------------------------ the file


class AdapterFile(NamedTuple):
    """An adapter folder whose two files have been read and agree. `base`: see :func:`base_hash`."""

    folder: Path
    settings: Settings
    base: str


def save(model: Transformer, folder: str | Path, settings: Settings, *, base: str = "", command: str = "") -> None:
    """Write the model's adapters into the existing `folder` (see :func:`xmoe.outputs.new_folder` for making it whole).

    Args:
        base: what the base model is called, for the reader; its hash is taken from the weights.
        command: what made it.
    """
    from safetensors.torch import save_file

    found = adapters(model)
    tensors = {f"{n}.{part}": getattr(lora, part).detach().float().cpu() for n, lora in found.items() for part in "ab"}
    assert found and not mismatch(_expected(model.config, settings), {n: tuple(t.shape) for n, t in tensors.items()})
    about = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "base": base,
        "base_hash": base_hash(model.config, lambda name: weight_of(model, name)),
        "rank": {group: settings.ranks.get(group, 0) for group in GROUPS},
        "alpha": settings.alpha,
        "rslora": settings.rslora,
        "layers": None if settings.layers is None else sorted(settings.layers),
        "parameters": sum(t.numel() for t in tensors.values()),
    }
    save_file({n: t.contiguous() for n, t in tensors.items()}, Path(folder) / TENSORS, metadata={"format": "pt"})
    (Path(folder) / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def read(folder: str | Path, config: ModelConfig, weight: Callable[[str], Weight]) -> AdapterFile:
    """Open an adapter folder for the model of this config and these weights (by native name).

    Raises:
        CheckpointError: a file that is missing, truncated or malformed, an adapter of another model, or tensors that do
            not fit what adapter.json says.
    """
    folder = Path(folder).expanduser()
    if not (folder / ABOUT).is_file() or not (folder / TENSORS).is_file():
        raise CheckpointError(f"{folder} holds no adapter; expected a folder with {ABOUT} and {TENSORS}")
    about = read_json(folder / ABOUT)
    tensors = {name: info.shape for name, info in read_header(folder / TENSORS)[0].items()}
    settings = _settings(about, folder / ABOUT)
    if about["base_hash"] != (here := base_hash(config, weight)):
        name = f" ({about['base']})" if about.get("base") else ""
        raise CheckpointError(
            f"{folder} was trained beside another model, {about['base_hash']}{name}; this one is {here}; "
            "give the checkpoint that it was trained on"
        )
    if wrong := mismatch(_expected(config, settings), tensors):
        raise CheckpointError(f"{folder / TENSORS} does not fit its {ABOUT}: {wrong}")
    return AdapterFile(folder, settings, about["base_hash"])


def load(model: Transformer, folder: str | Path) -> AdapterFile:
    """Attach the adapters of `folder` to `model`, frozen; what it computes from then on includes them.

    Raises:
        CheckpointError: see :func:`read`. ConfigError: the model has adapters already.
    """
    file = read(folder, model.config, lambda name: weight_of(model, name))
    attach(model, file.settings)
    _fill(model, file)
    for lora in adapters(model).values():
        lora.requires_grad_(False)
    return file


def restore(model: Transformer, folder: str | Path) -> None:
    """Give the adapters that `model` has the values in `folder`: how a run goes on. CheckpointError where they do not fit."""
    _fill(model, read(folder, model.config, lambda name: weight_of(model, name)))


@torch.no_grad()
def _fill(model: Transformer, file: AdapterFile) -> None:
    values = _values(file)
    parameters = {f"{n}.{part}": getattr(lora, part) for n, lora in adapters(model).items() for part in "ab"}
    wrong = mismatch({n: tuple(p.shape) for n, p in parameters.items()}, {n: tuple(t.shape) for n, t in values.items()})
    if wrong:
        raise CheckpointError(f"{file.folder} does not fit the adapters of this run: {wrong}")
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _values(file: AdapterFile) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file.folder / TENSORS)


def _settings(about: dict[str, Any], file: Path) -> Settings:
    """What adapter.json says, or a CheckpointError that names what is wrong with it."""
    rank, alpha, layers = about.get("rank"), about.get("alpha"), about.get("layers")
    fits = {
        "schema_version": about.get("schema_version") == SCHEMA_VERSION,
        "base_hash": isinstance(about.get("base_hash"), str),
        "rank": isinstance(rank, dict) and set(rank) <= set(GROUPS) and all(_natural(r) for r in rank.values()),
        "alpha": isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 < alpha < math.inf,
        "rslora": isinstance(about.get("rslora"), bool),
        "layers": layers is None or (isinstance(layers, list) and all(_natural(i) for i in layers)),
    }
    if wrong := [key for key, good in fits.items() if not good]:
        raise CheckpointError(f"{file} is malformed ({', '.join(wrong)}); expected what training with `lora:` writes")
    return Settings(rank, float(alpha), about["rslora"], layers)


def _natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def _expected(config: ModelConfig, settings: Settings) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the file."""
    try:
        ranks = adapted(settings, config.num_hidden_layers)
    except ConfigError as e:
        raise CheckpointError(str(e)) from None
    shapes, expected = native_shapes(config), {}
    for name, rank in ranks.items():
        *experts, out, width = shapes[name]
        expected |= {f"{name}.a": (*experts, rank, width), f"{name}.b": (*experts, out, rank)}
    return expected


# --------------------------------------------------------------------------------------------------------------- merge


class Merged:
    """A stack of experts with its adapter added, one expert at a time: takes a slice of one, gives fp32 [1, out, in].

    Stands where a dense stack may stand when a checkpoint is written; only the expert asked for is decoded.
    """

    def __init__(self, merge: Merge, weight: Weight, lora: LoRA, dtype: torch.dtype) -> None:
        self._merge, self._weight, self._lora = merge, weight, lora
        self.shape, self.dtype = tuple(weight.shape), dtype

    def __getitem__(self, one: slice) -> Tensor:
        expert = one.start
        packed = isinstance(self._weight, PackedWeight)
        base = self._weight.decode([expert], torch.float32) if packed else self._weight[one].float()
        self._merge.delta = self._lora.delta(expert).unsqueeze(0)
        return base + self._merge.delta


class Merge:
    """Weights with their adapters added, and what rounding does to them.

    MXFP4 has 16 values a group: an expert's new weight goes to the nearest of them, and a change that is small beside
    their distance may round away. Two numbers tell, once experts have been encoded: `relative_error`, the length of
    all rounding errors over that of the merged experts, and `change_kept`, the share of the adapters' change that is
    left, <rounded - base, change> / <change, change>: 1 is all of it, 0 is none. Both are None where nothing was rounded.
    """

    def __init__(self, file: AdapterFile, config: ModelConfig) -> None:
        self.file = file
        self.delta: Tensor | None = None
        self._sums = {"weights": 0.0, "error": 0.0, "change": 0.0, "along": 0.0}
        self._loras: dict[str, LoRA] = {}
        values, shapes = _values(file), native_shapes(config)
        for name, rank in adapted(file.settings, config.num_hidden_layers).items():
            lora = LoRA(shapes[name], rank, file.settings.scale(rank), "meta")
            lora.a, lora.b = (nn.Parameter(values[f"{name}.{part}"], requires_grad=False) for part in "ab")
            self._loras[name] = lora

    def value(self, name: str, weight: Weight, stored: torch.dtype, wanted: torch.dtype | None) -> Weight | Merged:
        """The weight `name` with its adapter added, a stack of experts as :class:`Merged`; itself where it has none.

        Args:
            stored: the checkpoint's type of what is not packed.
            wanted: the type to be written; None keeps the stored one.

        Raises:
            ConfigError: the experts are in a form that a sum cannot keep (int8, int4, low rank).
        """
        lora = self._loras.get(name)
        if lora is None:
            return weight
        if isinstance(weight, PackedWeight) and weight.format != "mxfp4":
            raise ConfigError(
                f"{name} is stored as {weight.format}, and with an adapter added it would have to become dense; "
                "keep the adapter beside the checkpoint (--adapter), or merge it into the model that was reduced"
            )
        if len(weight.shape) == 3:
            return Merged(self, weight, lora, wanted or stored)
        merged = weight.float() + lora.delta()
        return merged if wanted else merged.to(stored)

    def encode(self, dense: Tensor) -> PackedWeight:
        """The last expert that a :class:`Merged` gave, as MXFP4; the best of three scales for each group."""
        packed = PackedWeight.encode(dense, "mxfp4")
        if self.delta is not None:
            error = packed.decode(dtype=torch.float32) - dense
            self._sums["weights"] += float(dense.square().sum())
            self._sums["error"] += float(error.square().sum())
            self._sums["change"] += float(self.delta.square().sum())
            self._sums["along"] += float(((error + self.delta) * self.delta).sum())
            self.delta = None
        return packed

    @property
    def relative_error(self) -> float | None:
        return math.sqrt(self._sums["error"] / self._sums["weights"]) if self._sums["weights"] else None

    @property
    def change_kept(self) -> float | None:
        return self._sums["along"] / self._sums["change"] if self._sums["change"] else None

    def write(self, folder: Path) -> None:
        """merge.json: what was merged, and what rounding did."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "adapter": self.file.folder.resolve().name,
            "base_hash": self.file.base,
            "mxfp4_relative_error": self.relative_error,
            "mxfp4_change_kept": self.change_kept,
        }
        (folder / MERGED).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def merge(model: Transformer) -> None:
    """Add the model's adapters to its weights, in place, and take them away.

    Packed experts that have an adapter become dense, in the type of the embedding. To have MXFP4 again, save the model in
    a layout that packs, or convert the checkpoint with its adapter.
    """
    for name, lora in adapters(model).items():
        owner, _, leaf = name.rpartition(".")
        module, weight = model.get_submodule(owner), weight_of(model, name)
        if isinstance(weight, PackedWeight):
            dense = torch.empty(weight.shape, dtype=model.embed.weight.dtype, device=weight.device)
            for e in range(weight.shape[0]):
                dense[e] = weight.decode([e], torch.float32)[0] + lora.delta(e)
            delattr(module, leaf)
        elif weight.ndim == 3:
            dense = torch.empty_like(weight)
            for e in range(len(weight)):
                dense[e] = weight[e].float() + lora.delta(e)
        else:
            dense = (weight.float() + lora.delta()).to(weight.dtype)
        setattr(module, leaf, nn.Parameter(dense))
    detach(model)
