"""Checkpoint: a folder whose config and every tensor have been checked, read under the model's own names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from xmoe.checkpoint import config_reading, forms
from xmoe.checkpoint.config_keys import CONFIG
from xmoe.checkpoint.hub import local_folder
from xmoe.checkpoint.layouts import (
    SELECTION_BIAS,
    Layout,
    Rule,
    detect,
    is_expert_weight,
    mismatch,
    native_shapes,
    stored_shapes,
    to_native,
)
from xmoe.checkpoint.shard_reader import ShardReader
from xmoe.errors import CheckpointError
from xmoe.model.describe import parameter_counts
from xmoe.quantization import mxfp4
from xmoe.quantization.packed import PackedWeight

ADAPTER = "adapter.json"
"""What a folder has that holds no model but an adapter of one: see :mod:`xmoe.checkpoint.adapters`."""


class Checkpoint:
    """An opened checkpoint of any layout. Opening reads headers and config.json, no weights.

    Attributes:
        folder: where it is (downloaded first, if a hub name was given).
        reader: its tensors under the names they have on disk.
        layout: one of :data:`xmoe.checkpoint.layouts.LAYOUTS`.
        config: the model's shape; expert counts come from the weights.
        extra: keys of config.json that the shape does not need (eos_token_id, what other tools left there).

    Raises:
        CheckpointError: anything missing, left over, mis-shaped or contradictory. Nothing is loaded by halves.
    """

    def __init__(self, path: str | Path):
        self.folder = local_folder(path)
        file = self.folder / CONFIG
        if not file.is_file() and (self.folder / ADAPTER).is_file():
            raise CheckpointError(
                f"{self.folder} holds an adapter and no model; give it as --adapter, beside the --checkpoint it was trained on"
            )
        if not file.is_file() and not any(self.folder.glob("*.safetensors")):
            ShardReader(self.folder)  # says what is there instead of weights
        content = config_reading.read_config(self.folder)
        self.reader = ShardReader(self.folder)
        self.layout: Layout = detect(self.reader, self.folder)
        config_reading.check_quantization(content, self.layout, file)
        experts = self._count_experts(config_reading.number_of_layers(content, file))
        self.config, self.extra = config_reading.to_model_config(content, experts, file)
        if self.config.tie_word_embeddings and self.layout.top[-1].foreign[0] in self.reader:
            raise CheckpointError(
                f"{file} says tie_word_embeddings, but the weights have {self.layout.top[-1].foreign[0]}; "
                "set it to false"
            )
        self.shapes = native_shapes(self.config)
        self.rules: dict[str, Rule] = {rule.native: rule for rule in self.layout.rules(self.config)}
        weights = [n for n in self.rules if is_expert_weight(n)]
        native = self.layout.experts is None
        self.forms: dict[str, forms.Form] = (
            {n: forms.read_form(self.reader, n, self.shapes[n]) for n in weights} if native else {}
        )
        self._formats = {n: self.forms[n].format if native else self.layout.experts for n in weights}
        self._account()

    # ------------------------------------------------------------------------------------------------------- reading

    def __iter__(self) -> Iterator[str]:
        """Native names of all tensors, in the order of the model."""
        return iter(self.rules)

    def format(self, name: str) -> str:
        """Of an expert weight: "dense", a packed format, "low-rank" or "mixed"."""
        return self._formats[name]

    def ranks(self, name: str) -> list[int]:
        """Rank of a low-rank expert weight, or of each low-rank part of a mixed one; empty for any other tensor."""
        return self.forms[name].ranks if name in self.forms else []

    def weight(self, name: str) -> Tensor | PackedWeight:
        """The native tensor `name` on the CPU, dtype and packing as stored: a view of the mapped file where it can be."""
        if name not in self.rules:  # a balancing bias, which native has beside its rules
            value: Tensor | PackedWeight = self.reader.tensor(name)
        elif name in self.forms:
            value = forms.read_weight(self.reader, self.forms[name])
        else:
            rule = self.rules[name]
            value = to_native(rule, [self.reader.tensor(foreign) for foreign in rule.foreign])
        if isinstance(value, PackedWeight):
            for stored, tensor in value.tensors.items():
                if stored.endswith("scales") and tensor.dtype == torch.uint8:
                    mxfp4.check_scales(tensor, f"{self.folder}: {name}")
        return value

    def stored_names(self, name: str) -> list[str]:
        """What the native tensor `name` is called on disk: one name or several."""
        return list(self.forms[name].expected) if name in self.forms else list(self.rules[name].foreign)

    def selection_bias(self, layer: int) -> Tensor | None:
        """The balancing bias of a layer's router, where the model was trained with one."""
        name = SELECTION_BIAS.format(i=layer)
        return self.reader.tensor(name) if name in self.reader else None

    @property
    def formats(self) -> list[str]:
        """Formats of the experts, most common first: ["mxfp4"], or ["dense", "int8"] where layers or experts differ."""
        named = (
            f for n, format in self._formats.items() for f in (self.forms[n].formats if n in self.forms else [format])
        )
        return [f for f, _ in Counter(named).most_common()]

    @property
    def spared(self) -> list[list[int]]:
        """For each layer, what low-rank factors spare in each expert: parameters of the whole matrices less theirs."""
        found = [[0] * self.config.experts_in_layer(i) for i in range(self.config.num_hidden_layers)]
        for name, form in self.forms.items():
            layer = int(name.split(".")[1])
            found[layer] = [a + b for a, b in zip(found[layer], forms.spared(self.reader, form))]
        return found

    @property
    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, and those one token meets: of a low-rank weight what its factors hold."""
        return parameter_counts(self.config, self.spared)

    # ------------------------------------------------------------------------------------------------------ checking

    def _count_experts(self, layers: int) -> list[int]:
        """Experts of each layer: rows of its router."""
        template = next(rule.foreign[0] for rule in self.layout.layer if rule.native.endswith("router.weight"))
        pattern = re.compile(re.escape(template).replace(re.escape("{i}"), r"(\d+)"))
        rows = {int(m.group(1)): self.reader[n].shape for n in self.reader if (m := pattern.fullmatch(n))}
        if len(rows) != layers or set(rows) != set(range(layers)) or any(len(shape) != 2 for shape in rows.values()):
            raise CheckpointError(
                f"{self.folder}: config.json says {layers} layers, but the weights have routers ({template}) for "
                f"{len(rows)}; config and weights are of different models, or a shard is missing"
            )
        return [rows[i][0] for i in range(layers)]

    def _expected(self) -> dict[str, tuple[int, ...]]:
        expected: dict[str, tuple[int, ...]] = {}
        for name, rule in self.rules.items():
            form = self.forms.get(name)
            expected |= form.expected if form else stored_shapes(rule, self.config, self.shapes[name])
        if self.layout.name == "native":
            biases = [(SELECTION_BIAS.format(i=i), i) for i in range(self.config.num_hidden_layers)]
            expected |= {n: (self.config.experts_in_layer(i),) for n, i in biases if n in self.reader}
        return expected

    def _account(self) -> None:
        expected = self._expected()
        found = {name: info.shape for name, info in self.reader.tensors.items()}
        if wrong := mismatch(expected, found):
            hint = ""
            if self.layout.name == "hf-mxfp4" and any(n.endswith("_scales") and n not in found for n in expected):
                hint = "; dense experts under packed names are what transformers' save_pretrained leaves behind"
            raise CheckpointError(f"{self.folder} ({self.layout.name} layout) does not fit its config: {wrong}{hint}")
        packed = {n for rule in self.rules.values() for n in self._bytes(rule)}
        for name in expected:
            dtype = self.reader[name].dtype
            if name in packed:
                fits, wanted = dtype in (torch.uint8, torch.int8), "U8"
            else:
                fits, wanted = dtype.is_floating_point, "a floating point type"
            if not fits:
                raise CheckpointError(f"{self.folder}: {name} has {dtype} where {wanted} was expected")
        for name in self.forms:
            if name.endswith(".gate_up"):
                pair = self.forms[name], self.forms[name.removesuffix("gate_up") + "down"]
                forms.check_parts(self.reader, *pair, str(self.folder))

    def _bytes(self, rule: Rule) -> tuple[str, ...]:
        """Foreign tensors of a packed weight that hold bytes rather than floats."""
        if rule.native in self.forms:
            return self.forms[rule.native].bytes
        return rule.foreign if rule.kind == "packed" else ()

    def tensor_dtype(self) -> torch.dtype:
        """dtype of what is not packed, by the embedding."""
        return self.reader[self.rules["embed.weight"].foreign[0]].dtype
