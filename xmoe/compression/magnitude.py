"""Magnitude: the weights that matter least become zero, by their size alone or by their size times that of their inputs.

    magnitude    |W_ij|
    wanda        |W_ij| ||x_j||     x over the tokens routed to the expert (arXiv 2306.11695)
    moe-pruner   |W_ij| ||g x_j||   g the routing weight of each (arXiv 2410.12013)

For down, x is the expert's own activation. MXFP4 can hold zeros exactly: scales and all other codes stay. A zero takes as
much room as any other weight, so no byte is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from xmoe.compression.expert_inputs import LayerInputs, visit_inputs
from xmoe.compression.layerwise import Batch
from xmoe.errors import ConfigError
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight, dense_matrix

SCOPES = ("row", "tensor", "expert", "layer", "global")
SCORES = ("magnitude", "wanda", "moe-pruner")
_WEIGHTS = ("gate_up", "down")

Norms = Mapping[tuple[int, int, str], Tensor]
"""(layer, expert, weight's name) -> the length of each of its inputs."""


def input_norms(
    model: Transformer, score: str, sample: Tensor | None = None, batches: Sequence[Batch] | None = None
) -> Norms:
    """What `score` multiplies |W| with; see :func:`~xmoe.compression.expert_inputs.visit_inputs` for the rest."""
    found: dict[tuple[int, int, str], Tensor] = {}

    def act(layer: int, inputs: LayerInputs) -> None:
        for e in range(len(inputs.moe.experts.down_bias)):
            for name, norms in zip(_WEIGHTS, inputs.norms(e, weighted=score == "moe-pruner")):
                found[layer, e, name] = norms

    visit_inputs(model, act, sample, batches)
    return found


def smallest(magnitudes: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of exactly `count` smallest entries over all tensors together; of equal ones the earlier go first."""
    masks = [torch.zeros_like(m, dtype=torch.bool) for m in magnitudes]
    if not count:
        return masks
    flat = torch.cat([m.reshape(-1) for m in magnitudes])
    limit = flat.kthvalue(count).values
    chosen = flat < limit
    ties = (flat == limit).nonzero().squeeze(-1)
    chosen[ties[: count - int(chosen.sum())]] = True
    for mask, part in zip(masks, chosen.split([m.numel() for m in magnitudes])):
        mask.copy_(part.view(mask.shape))
    return masks


@torch.no_grad()
def prune_magnitude(
    model: Transformer,
    fraction: float | None,
    scope: str = "tensor",
    pattern: tuple[int, int] | None = None,
    experts: Sequence[tuple[int, int]] | None = None,
    norms: Norms | None = None,
) -> None:
    """Set the least weights to zero, in place: exactly round(fraction * count) in each scope, or N:M along the inputs."""
    places = [(i, e) for i, b in enumerate(model.blocks) for e in range(b.moe.experts.gate_up_bias.shape[0])]
    chosen = [p for p in places if experts is None or p in set(experts)]
    scopes: dict[tuple, list[tuple[int, int, str]]] = {}
    key: dict[str, Callable] = {
        "row": lambda i, e, n: (i, e, n), "tensor": lambda i, e, n: (i, e, n), "expert": lambda i, e, n: (i, e),
        "layer": lambda i, e, n: (i,), "global": lambda i, e, n: (),
    }  # fmt: skip
    for i, e in chosen:
        for name in _WEIGHTS:
            scopes.setdefault(key[scope](i, e, name), []).append((i, e, name))
    for members in scopes.values():
        found = [_importance(model, *m, norms) for m in members]
        if pattern is not None:
            masks = [_pattern_mask(m, *pattern) for m in found]
        elif scope == "row":
            masks = [_smallest_of_rows(m, fraction) for m in found]
        else:
            masks = smallest(found, round(fraction * sum(m.numel() for m in found)))
        for member, mask in zip(members, masks):
            _zero(model, *member, mask)


def _importance(model: Transformer, layer: int, e: int, name: str, norms: Norms | None) -> Tensor:
    size = dense_matrix(getattr(model.blocks[layer].moe.experts, name), e).abs()
    return size if norms is None else size * norms[layer, e, name].to(size.device)


def _smallest_of_rows(magnitudes: Tensor, fraction: float) -> Tensor:
    order = magnitudes.sort(dim=-1, stable=True).indices[..., : round(fraction * magnitudes.shape[-1])]
    return torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(-1, order, True)


def _pattern_mask(magnitudes: Tensor, n: int, m: int) -> Tensor:
    if magnitudes.shape[-1] % m:
        raise ConfigError(f"pattern {n}:{m} does not divide the {magnitudes.shape[-1]} inputs of a row")
    groups = magnitudes.unflatten(-1, (-1, m))
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], False).flatten(-2)


def _zero(model: Transformer, layer: int, e: int, name: str, mask: Tensor) -> None:
    weight = getattr(model.blocks[layer].moe.experts, name)
    if not isinstance(weight, PackedWeight):
        weight.data[e].masked_fill_(mask, 0.0)
    elif weight.format == "mxfp4":
        # Code 0 in place of a nibble; scales and all other codes stay.
        low, high = mask[..., 0::2], mask[..., 1::2]
        keep = (~low).to(torch.uint8) * 0x0F | (~high).to(torch.uint8) * 0xF0
        blocks = weight.tensors["blocks"][e]
        blocks &= keep.view(blocks.shape)
    else:
        raise ConfigError(
            f"magnitude cannot set {weight.format} weights to zero in place; put it before {weight.format}"
        )
