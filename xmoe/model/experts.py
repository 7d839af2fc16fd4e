"""The experts (gate_up, clamped SwiGLU, down; dense or packed) and the MoE block that joins the router to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from xmoe.kernels import dispatch
from xmoe.kernels.adapter import Adapter
from xmoe.model.adapter import LoRA
from xmoe.model.config import ModelConfig
from xmoe.model.router import Router, Routing
from xmoe.quantization.compound import MixedWeight
from xmoe.quantization.packed import PackedWeight

# What computes the chosen experts: (x [T, D], indices [T, K], weights [T, K], experts, norms) -> (y [T, D], norms).
# The local one below calls the kernels; expert parallelism puts an all-to-all around the same call.
Dispatcher = Callable[[Tensor, Tensor, Tensor, "Experts", bool], tuple[Tensor, "Tensor | None"]]


def local_dispatch(
    x: Tensor, indices: Tensor, weights: Tensor, experts: Experts, norms: bool
) -> tuple[Tensor, Tensor | None]:
    """All experts are here: hand everything to the kernels."""
    return experts(x, indices, weights, norms)


class Experts(nn.Module):
    """E experts of one layer, stacked: an expert is row e of every tensor.

    gate_up [E, 2F, D] (even rows gate, odd rows up), gate_up_bias [E, 2F], down [E, D, F], down_bias [E, D]. The two
    large ones are parameters, or :class:`~xmoe.quantization.packed.PackedWeight` of the same logical shape. Where experts
    differ in form, both are mixed and parted alike; every part then runs on the kernels of its own form.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, limit: float):
        super().__init__()
        E, D, F = num_experts, hidden_size, intermediate_size
        self.limit = limit
        self.gate_up: nn.Parameter | PackedWeight = nn.Parameter(torch.empty(E, 2 * F, D))
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * F))
        self.down: nn.Parameter | PackedWeight = nn.Parameter(torch.empty(E, D, F))
        self.down_bias = nn.Parameter(torch.empty(E, D))
        self.gate_up_adapter: LoRA | None = None
        self.down_adapter: LoRA | None = None

    def pack(self, name: str, weight: PackedWeight) -> None:
        """Put a packed weight in the place of the dense parameter `name` ("gate_up" or "down")."""
        delattr(self, name)
        setattr(self, name, weight)

    def hold(self, name: str, weight: Tensor | PackedWeight) -> None:
        """Put any weight in the place of `name`: a packed one as it is, a dense one as a parameter."""
        delattr(self, name)
        setattr(self, name, weight if isinstance(weight, PackedWeight) else nn.Parameter(weight))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, norms: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [T, D], indices and weights [T, K] -> the weighted sum [T, D] and, if asked, output lengths [T, K]."""
        adapters = [None if low is None else low.value for low in (self.gate_up_adapter, self.down_adapter)]
        if isinstance(self.gate_up, MixedWeight):
            return self._parted(x, indices, weights, norms, *adapters)
        return dispatch.experts(
            x,
            indices,
            weights,
            self.gate_up,
            self.gate_up_bias,
            self.down,
            self.down_bias,
            limit=self.limit,
            norms=norms,
            gate_up_adapter=adapters[0],
            down_adapter=adapters[1],
        )

    def _parted(
        self,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        norms: bool,
        gate_up_adapter: Adapter | None,
        down_adapter: Adapter | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Every part of mixed experts with the slots that are its own, added up in fp32 and rounded once more."""
        y, lengths, dtype = None, None, x.dtype
        for k, (ids, rows) in self.gate_up.places(indices.device).items():
            own = rows[indices]
            if own.device.type == "cpu" and not bool((own >= 0).any()) and y is not None:
                continue  # elsewhere looking would stop the queue
            part, norm = dispatch.experts(
                x,
                own,
                weights,
                self.gate_up.parts[k],
                self.gate_up_bias[ids],
                self.down.parts[k],
                self.down_bias[ids],
                limit=self.limit,
                norms=norms,
                gate_up_adapter=_rows(gate_up_adapter, ids),
                down_adapter=_rows(down_adapter, ids),
            )
            dtype = part.dtype
            y = part.float() if y is None else y + part.float()
            lengths = norm if lengths is None else lengths + norm
        return y.to(dtype), lengths


def _rows(adapter: Adapter | None, ids: Tensor) -> Adapter | None:
    """The adapter of the experts `ids` alone."""
    return None if adapter is None else Adapter(adapter.a[ids], adapter.b[ids], adapter.scale)


class MoE(nn.Module):
    """Route every token to K of E experts and add up what they make of it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        E = config.experts_in_layer(layer)
        self.router = Router(config.hidden_size, E, config.num_experts_per_tok)
        self.experts = Experts(E, config.hidden_size, config.intermediate_size, config.swiglu_limit)
        self.dispatcher: Dispatcher = local_dispatch

    def forward(self, x: Tensor, num_experts_per_tok: int | None, norms: bool) -> tuple[Tensor, Routing]:
        """x [B, S, D] -> the mixture [B, S, D] and the routing of its B * S tokens."""
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(flat, num_experts_per_tok)
        y, lengths = self.dispatcher(flat, routing.indices, routing.weights, self.experts, norms)
        return y.view(x.shape), routing._replace(output_norm=lengths)
