"""CompressConfig: what to record and who stays, as a file (configs/compress/*.yaml) that fits any model it is applied to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from xmoe.compression.budget import BUDGETS, uniform_counts
from xmoe.compression.criteria import criterion_name
from xmoe.compression.plan import Place
from xmoe.errors import ConfigError

ALL_LAYERS = "all"
Experts = dict[str, tuple[int, ...]]
"""Expert ids by layer number, or by `all`."""


@dataclass(frozen=True)
class RecordConfig:
    """What to watch the model on. Fields and the flags of `compress.py record` have the same names.

    data: as in :mod:`xmoe.data.sources`; None where statistics are at hand or the criterion needs none. sample: tokens
    whose inputs are kept too, for reconstruction and merging. generate: record the model's own answers as well.
    """

    ALIASES: ClassVar[dict[str, str]] = {
        "dataset": "data", "source": "data", "num_samples": "sample", "max_seq_length": "seq_len", "seqlen": "seq_len",
    }  # fmt: skip

    data: str | None = None
    tokens: int = 100_000
    seq_len: int = 512
    batch_size: int = 4
    domain: str = ""
    sample: int = 0
    generate: bool = False
    new_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("tokens", "seq_len", "batch_size", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.sample < 0:
            raise ConfigError(f"sample is {self.sample}; expected 0 (none) or more tokens")


@dataclass(frozen=True)
class PlanConfig:
    """Who stays. Fields and the flags of `compress.py plan` have the same names.

    keep: experts of each layer that stay, "16", or a share of them, "0.5". protect, remove: experts that stay or go
    whatever their score, as {layer: [experts]}, the layer a number or `all`. ranking: a file for the criterion of that
    name. guard: protect super experts.
    """

    ALIASES: ClassVar[dict[str, str]] = {
        "prune_method": "criterion", "method": "criterion", "importance": "criterion", "num_experts": "keep",
        "compression_ratio": "keep", "sparsity": "keep", "preserve_super_experts": "guard",
    }  # fmt: skip

    criterion: str = "reap"
    keep: str | None = None
    budget: str = "uniform"
    protect: Experts = field(default_factory=dict)
    remove: Experts = field(default_factory=dict)
    ranking: str | None = None
    guard: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "criterion", criterion_name(self.criterion))
        if self.budget not in BUDGETS:
            raise ConfigError(f"unknown budget {self.budget!r}; there are {', '.join(BUDGETS)}")
        if self.keep is not None:
            uniform_counts([2**31], self.amount)  # the count is held against a model later; its form is checked here
        for name in ("protect", "remove"):
            for layer in getattr(self, name):
                if layer != ALL_LAYERS and not layer.isdigit():
                    raise ConfigError(f"{name} names layer {layer!r}; expected a number or {ALL_LAYERS}")

    @property
    def amount(self) -> int | float | None:
        """`keep` as a number: 16 for "16", 0.5 for "0.5"."""
        if self.keep is None:
            return None
        try:
            return int(self.keep) if self.keep.lstrip("+-").isdigit() else float(self.keep)
        except ValueError:
            raise ConfigError(
                f"keep is {self.keep!r}; expected a count (16) or a share between 0 and 1 (0.5)"
            ) from None


@dataclass(frozen=True)
class CompressConfig:
    """A recipe: what to record, and how to choose."""

    record: RecordConfig
    plan: PlanConfig


def with_flags(section, flags: dict):
    """`section` with those flags that were given (that are not None) in the place of its fields of the same names."""
    names = {f.name for f in dataclasses.fields(section)}
    return dataclasses.replace(section, **{k: v for k, v in flags.items() if k in names and v is not None})


def read_places(text: str, flag: str) -> Experts:
    """`3:7,3:9,5` is experts 7 and 9 of layer 3 and expert 5 of all layers."""
    found: dict[str, list[int]] = {}
    for part in filter(None, text.split(",")):
        layer, _, expert = part.strip().rpartition(":")
        layer = layer or ALL_LAYERS
        if not expert.isdigit() or not (layer == ALL_LAYERS or layer.isdigit()) or part.strip().startswith(":"):
            raise ConfigError(f"--{flag} {part}: expected LAYER:EXPERT or EXPERT, such as 3:7")
        found.setdefault(layer, []).append(int(expert))
    return {layer: tuple(experts) for layer, experts in found.items()}


def places(experts: Experts, num_layers: int) -> list[Place]:
    """(layer, expert) of every expert named."""
    found = []
    for layer, ids in experts.items():
        layers = range(num_layers) if layer == ALL_LAYERS else [int(layer)]
        found += [(i, e) for i in layers for e in ids]
    return found
