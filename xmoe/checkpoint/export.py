"""What a checkpoint will consist of in a given layout, and the writing of it, one expert in memory at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmoe.checkpoint import config_writing, sidecars
from xmoe.checkpoint.config_keys import CONFIG, GENERATION
from xmoe.checkpoint.layouts import Layout, Rule, from_native, is_expert_weight, stored_shapes
from xmoe.checkpoint.shard_writer import ShardWriter
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import ConfigError
from xmoe.model.config import ModelConfig
from xmoe.quantization.packed import PackedWeight


class Plan:
    """Names, dtypes and shapes of all tensors to write, known before the first byte is.

    Args:
        config: of the model.
        layout: the goal.
        value: native name -> its tensor or packed weight; called once to plan and once to write.
        biases: native names of balancing biases, which only the native layout can keep.
        dtype: of what is not packed; None keeps it in the native layout and means bfloat16 elsewhere.
        encode: how dense experts become MXFP4, where the layout packs.

    Raises:
        ConfigError: the layout cannot express the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        value: Callable[[str], Tensor | PackedWeight],
        biases: list[str],
        dtype: torch.dtype | None,
        encode: Callable[[Tensor], PackedWeight] = PackedWeight.encode,
    ):
        config_writing.check_expressible(config, layout)
        native = layout.name == "native"
        if biases and not native:
            raise ConfigError(
                f"the routers have a balancing bias that acts on the choice alone, which {layout.name} cannot say "
                "(its bias acts on the weights too); choose native, or train it down to zero"
            )
        # Exports have an unembedding of their own: some readers know no tied embeddings.
        self.tied = config.tie_word_embeddings and not native
        self.config = dataclasses.replace(config, tie_word_embeddings=False) if self.tied else config
        self.layout = layout
        self.dtype = dtype if native or dtype is not None else torch.bfloat16
        self._value, self._encode = value, encode
        self._rules = [*layout.rules(self.config), *(Rule(name, (name,)) for name in biases)]
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for rule in self._rules:
            self.tensors |= self._stored(rule)

    @property
    def total_bytes(self) -> int:
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors.values())

    def write(self, folder: Path, advance: Callable[[int], Any] = lambda nbytes: None) -> None:
        """Write the weights into `folder`; `advance` is told how many bytes were."""
        with ShardWriter(folder, self.tensors, shard_name=self.layout.shard_name) as writer:
            for rule in self._rules:
                for piece in self._pieces(rule):
                    for name, tensor in from_native(rule, self.config, piece).items():
                        dtype = self.tensors[name][0]
                        writer.append(name, tensor.to(dtype))
                        advance(tensor.numel() * dtype.itemsize)

    def get(self, name: str) -> Tensor | PackedWeight:
        return self._value("embed.weight" if self.tied and name == "head.weight" else name)

    def _stored(self, rule: Rule) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        value = self.get(rule.native)
        if self._stays_packed(rule, value):
            return {n: (t.dtype, tuple(t.shape)) for n, t in from_native(rule, self.config, value).items()}
        dtype = torch.uint8 if rule.kind == "packed" else self.dtype or value.dtype
        return {n: (dtype, shape) for n, shape in stored_shapes(rule, self.config, tuple(value.shape)).items()}

    def _stays_packed(self, rule: Rule, value: Tensor | PackedWeight) -> bool:
        return isinstance(value, PackedWeight) and self.layout.experts in (None, value.format)

    def _pieces(self, rule: Rule) -> Iterator[Tensor | PackedWeight]:
        """The native value in the layout's expert format, expert by expert where anything has to be computed."""
        value = self.get(rule.native)
        if not is_expert_weight(rule.native) or self._stays_packed(rule, value):
            yield value
            return
        for expert in range(value.shape[0]):
            if not isinstance(value, PackedWeight):
                dense = value[expert : expert + 1]
            elif isinstance(own := value.expert(expert), PackedWeight) and own.format == self.layout.experts:
                yield own  # one of several forms, and the layout's own
                continue
            else:
                dense = value.decode([expert], self.dtype or torch.bfloat16)
            yield self._encode(dense) if rule.kind == "packed" else dense


def write_small_files(
    folder: Path, plan: Plan, tokenizer: Tokenizer | None, extra: Mapping[str, Any], source: Path | None
) -> None:
    """config.json and what else stands beside the weights; files of `source` are kept as they are."""
    config, layout = plan.config, plan.layout
    if source is not None:
        sidecars.keep(source, folder)
    if tokenizer is not None:
        sidecars.write_tokenizer(tokenizer, folder)
    elif (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if layout.name in ("hf-mxfp4", "hf-bf16"):
        if config.vocab_size != config_writing.HARMONY_VOCABULARY:
            extra = {**sidecars.token_ids(tokenizer), **extra}
        generation = config_writing.generation_text(config, extra)
        if generation is not None and not (folder / GENERATION).exists():
            (folder / GENERATION).write_text(generation, encoding="utf-8")
        if tokenizer is not None and not (folder / "tokenizer_config.json").exists():
            sidecars.write_tokenizer_config(folder, tokenizer, config.max_position_embeddings)
    if layout.name == "openai":
        labels = {rule: ("FP4", "UE8") for rule in layout.rules(config) if rule.kind == "packed"}
        names = dict.fromkeys(plan.tensors, "BF16")
        names |= {n: label for rule, both in labels.items() for n, label in zip(rule.foreign, both)}
        (folder / "dtypes.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    text = config_writing.config_text(config, layout, extra)
    (folder / CONFIG).write_text(text, encoding="utf-8")
