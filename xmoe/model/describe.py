"""What a model is, in numbers: parameters (total, active), experts, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from xmoe.model.config import ModelConfig
from xmoe.model.transformer import Transformer
from xmoe.quantization.compound import MixedWeight
from xmoe.quantization.packed import FORMATS, PackedWeight, form, leaves


class Description(NamedTuple):
    """Counts of one model. `bytes` are those of all its tensors as they are held now, packed ones packed."""

    parameters: int
    active_parameters: int
    layers: int
    experts: int | tuple[int, ...]
    experts_per_token: int
    expert_format: str
    projection_format: str
    """What attention's projections are held in; told where they are packed."""
    bytes: int

    def __str__(self) -> str:
        experts = self.experts if isinstance(self.experts, int) else f"{min(self.experts)} to {max(self.experts)}"
        return (
            f"{self.parameters:,} parameters, {self.active_parameters:,} active a token; {self.layers} layers of "
            f"{experts} experts, {self.experts_per_token} a token; experts in {self.expert_format}; "
            + (f"projections in {self.projection_format}; " if self.projection_format in FORMATS else "")
            + f"{self.bytes / 1e6:,.1f} MB"
        )


def parameter_counts(config: ModelConfig, spared: Sequence[Sequence[int]]) -> tuple[int, int]:
    """All parameters, and those active a token.

    spared: for each layer, what low-rank factors spare in each expert. Where experts differ, an active one counts as the
    mean of its layer.
    """
    total = config.parameter_count() - sum(map(sum, spared))
    active = [min(config.num_experts_per_tok, len(row)) * sum(row) // len(row) for row in spared]
    return total, config.active_parameter_count() - sum(active)


def model_parameter_counts(model: Transformer) -> tuple[int, int]:
    """:func:`parameter_counts` of a model as it stands."""
    spared = []
    for block in model.blocks:
        held = [block.moe.experts.gate_up, block.moe.experts.down]
        spared.append([sum(_spared(w, e) for w in held) for e in range(held[0].shape[0])])
    return parameter_counts(model.config, spared)


def _spared(weight: Tensor | PackedWeight, e: int) -> int:
    """Parameters of the whole matrix of expert e less those it is held in."""
    held = [stack.shape[1] * stack.shape[2] for _, stack, _ in leaves(weight, e)]
    return weight.shape[1] * weight.shape[2] - sum(held)


def describe(model: Transformer) -> Description:
    """Count `model`. Active parameters leave the input embedding out and count the unembedding."""
    config = model.config
    tensors: list = [*model.parameters(), *model.buffers()]
    stacks = [w for block in model.blocks for w in (block.moe.experts.gate_up, block.moe.experts.down)]
    stacks = [part for w in stacks for part in (w.parts.values() if isinstance(w, MixedWeight) else [w])]
    formats = dict.fromkeys(map(form, stacks))
    total, active = model_parameter_counts(model)
    return Description(
        parameters=total,
        active_parameters=active,
        layers=config.num_hidden_layers,
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        expert_format=" and ".join(formats),
        projection_format=" and ".join(dict.fromkeys(form(block.attn.qkv.weight) for block in model.blocks)),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
    )
