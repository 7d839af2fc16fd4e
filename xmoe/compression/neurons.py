"""Neuron pruning: take whole hidden units out of every expert, so that the result is a standard, narrower model.

Neuron i of an expert is rows 2i and 2i+1 of gate_up (gate and up), their biases, and column i of down. Its worth is what it
adds to the output over the tokens X routed there, with h the hidden activation and g the routing weight:

    c_i = sum over X of g^2 h_i^2 * ||down[:, i]||^2

and the mean of what is removed moves into the bias: down_bias += sum_i mean(h_i) down[:, i]. Every expert keeps the same
number, since `intermediate_size` is one number. MXFP4 groups 32 inputs of down under one scale, so packed experts lose
whole aligned groups of 32 neurons, and every byte that stays is the byte it was.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from xmoe.compression.reconstruction import expert_output
from xmoe.errors import ConfigError
from xmoe.model.experts import Experts, MoE
from xmoe.model.transformer import Transformer
from xmoe.quantization.mxfp4 import GROUP
from xmoe.quantization.packed import PackedWeight, dense_matrix


def neurons_to_keep(model: Transformer, fraction: float) -> int:
    """intermediate_size after removing `fraction` of it: a multiple of 32 where experts are packed, at least one group."""
    formats = {w.format for w in model.modules() if isinstance(w, PackedWeight)}
    if formats - {"mxfp4"}:
        raise ConfigError(f"neurons cannot be cut out of {', '.join(sorted(formats))} weights; put neurons before them")
    unit = GROUP if formats else 1
    F = model.config.intermediate_size
    keep = max(1, round(F * (1 - fraction) / unit)) * unit
    if keep >= F:
        raise ConfigError(
            f"a fraction of {fraction} is less than one group of {unit} of the {F} neurons; take at least {unit / F:.3f}"
        )
    return keep


@torch.no_grad()
def cut_neurons(model: Transformer, keep: int, sample: Tensor | None = None) -> Transformer:
    """A new model with intermediate_size `keep`.

    Args:
        sample: MoE inputs [layers, N, D] (`RoutingStats.sample`); None scores neurons by their weights alone and leaves
            the biases as they are. Experts to which no sampled token goes are scored by weights, too.
    """
    with torch.device("meta"):
        small = Transformer(dataclasses.replace(model.config, intermediate_size=keep))
    for name, parameter in model.named_parameters():
        if ".moe.experts." not in name:
            owner, _, leaf = name.rpartition(".")
            copied = nn.Parameter(parameter.data.clone(), requires_grad=parameter.requires_grad)
            setattr(small.get_submodule(owner), leaf, copied)
    for layer, (old, new) in enumerate(zip(model.blocks, small.blocks)):
        new.moe.router.selection_bias = old.moe.router.selection_bias
        chosen, added = _choose(old.moe, keep, None if sample is None else sample[layer].to(model.device))
        _fill(old.moe.experts, new.moe.experts, chosen, added)
    small.recompute = model.recompute
    return small.train(model.training)


def _choose(moe: MoE, keep: int, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """Neurons that stay, ascending [E, keep], and what the down bias of each expert gains [E, D]."""
    experts = moe.experts
    unit = GROUP if isinstance(experts.down, PackedWeight) else 1
    E, D = experts.down_bias.shape
    routing = None if x is None else moe.router(x.to(moe.router.weight.dtype))
    chosen, added = [], torch.zeros(E, D, dtype=torch.float32, device=experts.down_bias.device)
    for e in range(E):
        gate_up, down = (dense_matrix(w, e) for w in (experts.gate_up, experts.down))
        hidden = g = None
        if routing is not None:
            token, slot = (routing.indices == e).nonzero(as_tuple=True)
            if len(token):
                hidden, g = expert_output(experts, e, x[token])[0], routing.weights[token, slot]
        if hidden is None:
            energy = gate_up.square().sum(-1).view(-1, 2).sum(-1)
        else:
            energy = (g.unsqueeze(-1) * hidden).square().sum(0)
        worth = (energy.double() * down.double().square().sum(0)).view(-1, unit).sum(-1)
        best = torch.sort(worth, descending=True, stable=True).indices[: keep // unit].sort().values
        ids = (best.unsqueeze(-1) * unit + torch.arange(unit, device=best.device)).reshape(-1)
        if hidden is not None:
            gone = torch.ones(worth.numel() * unit, dtype=torch.bool, device=ids.device)
            gone[ids] = False
            added[e] = down[:, gone] @ hidden.mean(0)[gone]
        chosen.append(ids)
    return torch.stack(chosen), added


def _fill(old: Experts, new: Experts, chosen: Tensor, added: Tensor) -> None:
    rows = torch.stack((2 * chosen, 2 * chosen + 1), dim=-1).flatten(1)  # gate and up of each neuron
    each = torch.arange(len(chosen), device=chosen.device).unsqueeze(-1)
    if isinstance(old.gate_up, PackedWeight):
        groups = chosen[:, ::GROUP] // GROUP
        new.pack("gate_up", PackedWeight("mxfp4", {n: t[each, rows] for n, t in old.gate_up.tensors.items()}))
        index = groups.unsqueeze(1).expand(-1, old.down.shape[1], -1)
        blocks, scales = old.down.tensors["blocks"], old.down.tensors["scales"]
        packed = {
            "blocks": blocks.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, blocks.shape[-1])),
            "scales": scales.gather(2, index),
        }
        new.pack("down", PackedWeight("mxfp4", packed))
    else:
        new.gate_up = _parameter(old.gate_up.data[each, rows], old.gate_up)
        columns = chosen.unsqueeze(1).expand(-1, old.down.shape[1], -1)
        new.down = _parameter(old.down.data.gather(2, columns), old.down)
    new.gate_up_bias = _parameter(old.gate_up_bias.data[each, rows], old.gate_up_bias)
    new.down_bias = _parameter((old.down_bias.data.float() + added).to(old.down_bias.dtype), old.down_bias)


def _parameter(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=like.requires_grad)
