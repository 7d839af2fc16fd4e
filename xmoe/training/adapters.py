"""Adapters as a training run has them: which groups of weights get one, of what rank, and where they start.

    model, tokenizer = xmoe.load("checkpoints/gpt-oss-20b")          # experts stay packed
    add_adapters(model, LoRAConfig(rank={"attention": 16, "experts": 8}))
    ...                                                              # gradients reach the adapters and nothing else

`xmoe.checkpoint.adapters` keeps them in a folder beside the base model, loads them and merges them.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from xmoe.errors import ConfigError
from xmoe.model.adapter import GROUPS, LoRA, Settings, attach
from xmoe.model.transformer import Transformer

# What others call our groups, offered when a name is unknown.
_ELSEWHERE = {
    **dict.fromkeys(("attn", "self_attn", "qkv", "q_proj", "k_proj", "v_proj", "o_proj", "out"), "attention"),
    **dict.fromkeys(("mlp", "ffn", "moe", "gate_up", "down", "gate_up_proj", "down_proj"), "experts"),
    "gate": "router",
}


@dataclass(frozen=True)
class LoRAConfig:
    """The `lora` section of a run; its presence freezes the model and trains adapters beside it.

    The change of a weight is scale * b a, with a scale of alpha / rank; with `rslora` alpha / sqrt(rank), which keeps its
    size as the rank grows (arXiv 2312.03732). A group's rank of 0, or one that is not named, leaves it as it is.
    """

    rank: dict[str, int] = field(default_factory=lambda: {"attention": 16, "experts": 8, "router": 0})
    alpha: float = 16.0
    rslora: bool = False
    layers: tuple[int, ...] | None = None  # which blocks; null: all

    ALIASES: ClassVar[dict[str, str]] = {
        "r": "rank",
        "ranks": "rank",
        "lora_r": "rank",
        "lora_rank": "rank",
        "target_modules": "rank",
        "lora_alpha": "alpha",
        "use_rslora": "rslora",
        "layers_to_transform": "layers",
    }

    def __post_init__(self) -> None:
        for group, rank in self.rank.items():
            if group not in GROUPS:
                near = _ELSEWHERE.get(group) or next(iter(difflib.get_close_matches(group, GROUPS, 1, 0.4)), None)
                hint = f"; did you mean {near}?" if near else ";"
                raise ConfigError(f"lora.rank names {group!r}{hint}  groups: {', '.join(GROUPS)}")
            if rank < 0:
                raise ConfigError(f"lora.rank.{group} is {rank}; expected 0 (left as it is) or more")
        if not any(self.rank.values()):
            raise ConfigError(
                f"lora.rank gives no group a rank above 0, so nothing would be trained; name some of {', '.join(GROUPS)}, "
                "for example {attention: 16, experts: 8}"
            )
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha is {self.alpha}; expected a number above 0, for example 16")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ConfigError(f"lora.layers is {list(self.layers)}; expected layers from 0 on, or null for all")

    @property
    def settings(self) -> Settings:
        """The same for the model."""
        return Settings(self.rank, self.alpha, self.rslora, self.layers)


def add_adapters(model: Transformer, config: LoRAConfig, seed: int = 0) -> dict[str, LoRA]:
    """Freeze `model` and give it adapters to train: a uniform within 1 / sqrt(in), drawn with `seed`, b zero.

    b of zeros adds exactly nothing, so the start is the base model bit for bit. Returns them by the weight they adapt.

    Raises:
        ConfigError: the model has adapters already, or has not the layers named.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    model.requires_grad_(False)
    added = attach(model, config.settings)
    with torch.no_grad():
        for lora in added.values():
            bound = lora.a.shape[-1] ** -0.5
            lora.a.copy_(torch.empty(lora.a.shape, device="cpu").uniform_(-bound, bound, generator=generator))
    return added
