"""What a model is, in numbers: parameters (total, active), experts, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from xmoe.model.config import ModelConfig
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight


class Description(NamedTuple):
    """Counts of one model. `bytes` are those of all its tensors as they are held now, packed ones packed."""

    parameters: int
    active_parameters: int
    layers: int
    experts: int | tuple[int, ...]
    experts_per_token: int
    expert_format: str
    bytes: int

    def __str__(self) -> str:
        experts = self.experts if isinstance(self.experts, int) else f"{min(self.experts)} to {max(self.experts)}"
        return (
            f"{self.parameters:,} parameters, {self.active_parameters:,} active a token; {self.layers} layers of "
            f"{experts} experts, {self.experts_per_token} a token; experts in {self.expert_format}; "
            f"{self.bytes / 1e6:,.1f} MB"
        )


def parameter_counts(config: ModelConfig, spared: Sequence[int]) -> tuple[int, int]:
    """All parameters, and those active a token; `spared`, for each layer: what low-rank factors spare in one expert."""
    experts = [config.experts_in_layer(layer) for layer in range(config.num_hidden_layers)]
    active = [min(config.num_experts_per_tok, n) for n in experts]
    total = config.parameter_count() - sum(n * s for n, s in zip(experts, spared))
    return total, config.active_parameter_count() - sum(n * s for n, s in zip(active, spared))


def model_parameter_counts(model: Transformer) -> tuple[int, int]:
    """:func:`parameter_counts` of a model as it stands."""
    spared = []
    for block in model.blocks:
        held = [w for w in (block.moe.experts.gate_up, block.moe.experts.down) if isinstance(w, PackedWeight)]
        spared.append(sum((w.shape[0] * w.shape[1] * w.shape[2] - w.count) // w.shape[0] for w in held))
    return parameter_counts(model.config, spared)


def describe(model: Transformer) -> Description:
    """Count `model`. Active parameters leave the input embedding out and count the unembedding."""
    config = model.config
    tensors: list = [*model.parameters(), *model.buffers()]
    stacks = [w for block in model.blocks for w in (block.moe.experts.gate_up, block.moe.experts.down)]
    formats = dict.fromkeys(w.format if isinstance(w, PackedWeight) else _dtype_name(w) for w in stacks)
    total, active = model_parameter_counts(model)
    return Description(
        parameters=total,
        active_parameters=active,
        layers=config.num_hidden_layers,
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        expert_format=" and ".join(formats),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
    )


def _dtype_name(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")
