"""Adapters (LoRA, arXiv 2106.09685): trainable low-rank changes beside weights that stay as they are, dense or packed.

Attention's two projections, the router and an expert stack have a place for one each, empty unless :func:`attach` fills
it. Each has two parameters, a and b in fp32, and the product becomes W x + scale * b (a x); the experts' are stacks, one
pair an expert, computed over the same rows sorted by expert as W itself. The rows of gate_up's b alternate gate and up as
the weight's do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xmoe.errors import ConfigError
from xmoe.kernels import dispatch
from xmoe.kernels.adapter import Adapter
from xmoe.quantization.packed import PackedWeight

# group -> the weights it adapts, by their names in a block, and where each one's adapter stands
GROUPS: dict[str, dict[str, str]] = {
    "attention": {"attn.qkv.weight": "attn.qkv.adapter", "attn.out.weight": "attn.out.adapter"},
    "experts": {
        "moe.experts.gate_up": "moe.experts.gate_up_adapter",
        "moe.experts.down": "moe.experts.down_adapter",
    },
    "router": {"moe.router.weight": "moe.router.adapter"},
}
_HOME = {weight: adapter for weights in GROUPS.values() for weight, adapter in weights.items()}


class LoRA(nn.Module):
    """a [r, in] and b [out, r], or [E, r, in] and [E, out, r] for a stack of experts; starts as zeros, so it adds nothing."""

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float, device: torch.device | str | None = None):
        """shape: of the weight, [out, in] or [E, out, in]."""
        super().__init__()
        *experts, out, width = shape
        self.a = nn.Parameter(torch.zeros(*experts, rank, width, device=device))
        self.b = nn.Parameter(torch.zeros(*experts, out, rank, device=device))
        self.scale = scale

    @property
    def value(self) -> Adapter:
        """What the kernels take."""
        return Adapter(self.a, self.b, self.scale)

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def forward(self, x: Tensor) -> Tensor:
        """scale * b (a x): what to add to the product of the weight."""
        return dispatch.adapter_product(x, self.value)

    def delta(self, expert: int | None = None) -> Tensor:
        """What the weight has become more by, fp32 [out, in]: that of one expert where it is a stack."""
        a, b = (t.detach().float() if expert is None else t.detach()[expert].float() for t in (self.a, self.b))
        return (b @ a).mul_(self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, a={list(self.a.shape)}, b={list(self.b.shape)}"


class Settings(NamedTuple):
    """What fixes a model's adapters but for their values.

    ranks: by group of :data:`GROUPS`; 0 or absent leaves a group alone. The scale is alpha / r, or alpha / sqrt(r) with
    `rslora` (arXiv 2312.03732). layers: which blocks have them; None is all.
    """

    ranks: Mapping[str, int]
    alpha: float
    rslora: bool = False
    layers: Collection[int] | None = None

    def scale(self, rank: int) -> float:
        return self.alpha / (rank**0.5 if self.rslora else rank)


def adapted(settings: Settings, layers: int) -> dict[str, int]:
    """Native name of every weight that gets an adapter in a model of so many layers, and the rank.

    Raises:
        ConfigError: the settings name a layer that the model has not.
    """
    chosen = range(layers) if settings.layers is None else sorted(settings.layers)
    if beyond := [i for i in chosen if not 0 <= i < layers]:
        raise ConfigError(f"adapters are asked for in layer {beyond[0]}; the model has layers 0 to {layers - 1}")
    return {
        f"blocks.{i}.{weight}": settings.ranks[group]
        for i in chosen
        for group, weights in GROUPS.items()
        for weight in weights
        if settings.ranks.get(group, 0)
    }


def attach(model: nn.Module, settings: Settings) -> dict[str, LoRA]:
    """Give `model` the adapters of `settings`, of zeros -> native name of each weight and its adapter.

    Raises:
        ConfigError: it has adapters already, its projections are packed, or the settings name a layer that it has not.
    """
    if adapters(model):
        raise ConfigError("the model has adapters already; merge() them into the weights, or detach() them")
    found: dict[str, LoRA] = {}
    for name, rank in adapted(settings, len(model.blocks)).items():
        _, layer, rest = name.split(".", 2)
        owner, _, attribute = _HOME[rest].rpartition(".")
        owner, weight = model.blocks[int(layer)].get_submodule(owner), weight_of(model, name)
        if isinstance(weight, PackedWeight) and weight.shape[0] == 1 and ".attn." in name:
            raise ConfigError(
                f"{name} is held in {weight.format}; adapters stand beside the stored weights: load those"
            )
        lora = LoRA(tuple(weight.shape), rank, settings.scale(rank), weight.device)
        setattr(owner, attribute, lora)
        found[name] = lora
    return found


def weight_of(model: nn.Module, name: str) -> Tensor | PackedWeight:
    """The weight of this native name, dense or packed."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def detach(model: nn.Module) -> None:
    """Take all adapters away, which leaves the model as it was."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, LoRA):
                setattr(module, name, None)


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """Native name of the weight -> its adapter, for all that the model has."""
    weight_at = {adapter: weight for weight, adapter in _HOME.items()}
    found = [(name.split(".", 2), module) for name, module in model.named_modules() if isinstance(module, LoRA)]
    return {f"blocks.{layer}.{weight_at[rest]}": module for (_, layer, rest), module in found}
