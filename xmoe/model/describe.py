"""What a model is, in numbers: parameters (total, active), experts, bytes."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

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


def describe(model: Transformer) -> Description:
    """Count `model`. Active parameters leave the input embedding out and count the unembedding."""
    config = model.config
    tensors: list = [*model.parameters(), *model.buffers()]
    gate_up = model.blocks[0].moe.experts.gate_up
    return Description(
        parameters=config.parameter_count(),
        active_parameters=config.active_parameter_count(),
        layers=config.num_hidden_layers,
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        expert_format=gate_up.format if isinstance(gate_up, PackedWeight) else _dtype_name(gate_up),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
    )


def _dtype_name(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")
