"""Neuron pruning: take whole hidden units out of every expert, so that the result is a standard, narrower model.

Neuron i of an expert is rows 2i and 2i+1 of gate_up (gate and up), their biases, and column i of down. Its worth is what it
adds to the output over the tokens X routed there, with h the hidden activation and g the routing weight:

    c_i = sum over X of g^2 h_i^2 * ||down[:, i]||^2

and the mean of what is removed moves into the bias: down_bias += sum_i mean(h_i) down[:, i]. Every expert keeps the same
number, since `intermediate_size` is one number. MXFP4 groups 32 inputs of down under one scale (int4 as many as it was
asked for), so such experts lose whole aligned groups of neurons, and every byte that stays is the byte it was. Of a
low-rank weight the rows are those of gate_up's left factor, the columns those of down's right one; the other two stay.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from xmoe.compression.reconstruction import expert_output
from xmoe.errors import ConfigError
from xmoe.model.experts import Experts, MoE
from xmoe.model.transformer import Transformer
from xmoe.quantization.compound import MixedWeight, PackedFactors
from xmoe.quantization.packed import PackedWeight, dense_matrix, leaves

Stack = Tensor | PackedWeight


def neurons_to_keep(model: Transformer, fraction: float, unit: int = 1) -> int:
    """intermediate_size after removing `fraction` of the experts' bytes: a multiple of the groups that share a scale.

    Neurons make up all bytes of ordinary weights, and of low-rank ones those of two of the four factors. `unit`: what it
    must be a multiple of besides, since down is to be packed in such groups afterwards.
    """
    F = model.config.intermediate_size
    total = cuttable = 0.0
    for block in model.blocks:
        experts = block.moe.experts
        total += experts.gate_up.nbytes + experts.down.nbytes
        for e in range(experts.gate_up.shape[0]):
            for stack, _ in (_rows_of(experts.gate_up, e), _columns_of(experts.down, e)):
                cuttable += stack.nbytes / stack.shape[0]
            unit = math.lcm(unit, _unit(_columns_of(experts.down, e)[0]))
    cuttable = min(cuttable, total) if _has_factors(model) else total
    if fraction * total >= cuttable:
        raise ConfigError(
            f"neurons are {cuttable / total:.1%} of the bytes of these low-rank experts, so a fraction of {fraction} cannot "
            "be removed with them; take less, or put neurons before low-rank"
        )
    keep = max(1, round(F * (1 - fraction * total / cuttable) / unit)) * unit
    if keep >= F:
        raise ConfigError(
            f"a fraction of {fraction} is less than one group of {unit} of the {F} neurons; take at least "
            f"{unit / F * cuttable / total:.3f}"
        )
    return keep


def _has_factors(model: Transformer) -> bool:
    weights = [block.moe.experts.gate_up for block in model.blocks]
    return any(len(leaves(w, e)) > 1 for w in weights for e in range(w.shape[0]))


def _rows_of(gate_up: Stack, e: int) -> tuple[Stack, int]:
    """The stack whose rows are those of gate_up of expert e, and its row."""
    return leaves(gate_up, e)[0][1:]


def _columns_of(down: Stack, e: int) -> tuple[Stack, int]:
    """The stack whose columns are those of down of expert e, and its row."""
    return leaves(down, e)[-1][1:]


def _unit(down: Stack) -> int:
    """How many neighbouring columns have to go together."""
    if isinstance(down, Tensor):
        return 1
    group = 32 if down.format == "mxfp4" else down.group
    return 1 if down.format == "int8" and group == down.shape[2] else group


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
    E, D = experts.down_bias.shape
    routing = None if x is None else moe.router(x.to(moe.router.weight.dtype))
    chosen, added = [], torch.zeros(E, D, dtype=torch.float32, device=experts.down_bias.device)
    for e in range(E):
        unit = _unit(_columns_of(experts.down, e)[0])
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
    new.hold("gate_up", _cut_rows(old.gate_up, rows))
    new.hold("down", _cut_columns(old.down, chosen))
    new.gate_up_bias = nn.Parameter(old.gate_up_bias.data[each, rows])
    new.down_bias = nn.Parameter((old.down_bias.data.float() + added).to(old.down_bias.dtype))
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        if isinstance(made := getattr(new, name), nn.Parameter):
            made.requires_grad_(getattr(old, name).requires_grad)


def _cut_rows(weight: Stack, rows: Tensor) -> Stack:
    """Rows [E, n] of every matrix of a stack, in the form that it has: bytes unchanged."""
    if isinstance(weight, MixedWeight):
        parts = {k: _cut_rows(w, rows[weight.members[k]]) for k, w in weight.parts.items()}
        return MixedWeight(weight.part.clone(), parts)
    if isinstance(weight, PackedFactors):
        return PackedFactors(_cut_rows(weight.left, rows), weight.right.map(Tensor.clone))
    if isinstance(weight, PackedWeight) and weight.factors:
        return PackedWeight("low-rank", {"left": _cut_rows(weight.left, rows), "right": weight.right.clone()})
    each = torch.arange(len(rows), device=rows.device).unsqueeze(-1)
    if isinstance(weight, Tensor):
        return weight.data[each, rows]
    return PackedWeight(weight.format, {n: t[each, rows] for n, t in weight.tensors.items()})


def _cut_columns(weight: Stack, columns: Tensor) -> Stack:
    """Columns [E, n] of every matrix of a stack, in whole groups where they share scales: bytes unchanged."""
    if isinstance(weight, MixedWeight):
        parts = {k: _cut_columns(w, columns[weight.members[k]]) for k, w in weight.parts.items()}
        return MixedWeight(weight.part.clone(), parts)
    if isinstance(weight, PackedFactors):
        return PackedFactors(weight.left.map(Tensor.clone), _cut_columns(weight.right, columns))
    if isinstance(weight, PackedWeight) and weight.factors:
        return PackedWeight("low-rank", {"left": weight.left.clone(), "right": _cut_columns(weight.right, columns)})
    if isinstance(weight, Tensor):
        return _gathered(weight.data, columns)
    tensors = dict(weight.tensors)
    unit = _unit(weight)
    if unit == 1:  # int8 with one scale a row
        return PackedWeight(weight.format, tensors | {"values": _gathered(tensors["values"], columns)})
    groups = columns[:, ::unit] // unit
    main = "blocks" if weight.format == "mxfp4" else "values"
    numbers = tensors[main].flatten(2).unflatten(2, (weight.shape[2] // unit, -1))  # [E, out, group, bytes]
    cut = {n: _gathered(t, groups) for n, t in (tensors | {main: numbers}).items()}
    if main == "values":
        cut[main] = cut[main].flatten(2)
    return PackedWeight(weight.format, cut)


def _gathered(tensor: Tensor, places: Tensor) -> Tensor:
    """tensor [E, out, n, ...] at `places` [E, m] of its third dimension."""
    index = places.view(len(places), 1, -1, *[1] * (tensor.ndim - 3))
    return tensor.gather(2, index.expand(-1, tensor.shape[1], -1, *tensor.shape[3:]))
