"""Magnitude: the weights that matter least become zero, by their size alone or by their size times that of their inputs.

    magnitude    |W_ij|
    wanda        |W_ij| ||x_j||     x over the tokens routed to the expert (arXiv 2306.11695)
    moe-pruner   |W_ij| ||g x_j||   g the routing weight of each (arXiv 2410.12013)

For down, x is the expert's own activation. All packed formats can hold zeros exactly: scales and all other codes stay. Of a
low-rank weight the zeros are in its factors, each a tensor of its own; what left is fed is what right makes of x. A zero
takes as much room as any other weight, so no byte is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xmoe.compression.expert_inputs import LayerInputs, visit_inputs
from xmoe.compression.layerwise import Batch
from xmoe.errors import ConfigError
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight, dense_matrix, leaves

SCOPES = ("row", "tensor", "expert", "layer", "global")
SCORES = ("magnitude", "wanda", "moe-pruner")
_WEIGHTS = ("gate_up", "down")

Norms = Mapping[tuple[int, int, str], Tensor]
"""(layer, expert, matrix) -> the length of each of its inputs; `gate_up`, `down`, or a factor such as `down.left`."""


class Matrix(NamedTuple):
    """A matrix of one expert, or one of its factors: (layer, expert, name), and the row of the stack that holds it."""

    key: tuple[int, int, str]
    stack: Tensor | PackedWeight
    row: int


def input_norms(
    model: Transformer, score: str, sample: Tensor | None = None, batches: Sequence[Batch] | None = None
) -> Norms:
    """What `score` multiplies |W| with; see :func:`~xmoe.compression.expert_inputs.visit_inputs` for the rest."""
    found: dict[tuple[int, int, str], Tensor] = {}

    def act(layer: int, inputs: LayerInputs) -> None:
        for e in range(len(inputs.moe.experts.down_bias)):
            for name, norms in inputs.norms(e, weighted=score == "moe-pruner").items():
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
    for block in model.blocks:
        for name in _WEIGHTS:
            if isinstance(weight := getattr(block.moe.experts, name), PackedWeight):
                block.moe.experts.hold(name, weight.map(lambda t: t))  # out of any order that only a kernel knows
    places = [(i, e) for i, b in enumerate(model.blocks) for e in range(b.moe.experts.gate_up_bias.shape[0])]
    named = set(places if experts is None else experts)
    chosen = [p for p in places if p in named]
    scopes: dict[tuple, list[Matrix]] = {}
    key: dict[str, Callable] = {
        "row": lambda i, e, n: (i, e, n), "tensor": lambda i, e, n: (i, e, n), "expert": lambda i, e, n: (i, e),
        "layer": lambda i, e, n: (i,), "global": lambda i, e, n: (),
    }  # fmt: skip
    for i, e in chosen:
        for name in _WEIGHTS:
            for factor, stack, row in leaves(getattr(model.blocks[i].moe.experts, name), e):
                full = f"{name}.{factor}" if factor else name
                scopes.setdefault(key[scope](i, e, full), []).append(Matrix((i, e, full), stack, row))
    for members in scopes.values():
        found = [_importance(m, norms) for m in members]
        if pattern is not None:
            masks = [_pattern_mask(m, *pattern) for m in found]
        elif scope == "row":
            masks = [_smallest_of_rows(m, fraction) for m in found]
        else:
            masks = smallest(found, round(fraction * sum(m.numel() for m in found)))
        for member, mask in zip(members, masks):
            _zero(member.stack, member.row, mask)


def _importance(matrix: Matrix, norms: Norms | None) -> Tensor:
    size = dense_matrix(matrix.stack, matrix.row).abs()
    return size if norms is None else size * norms[matrix.key].to(size.device)


def _smallest_of_rows(magnitudes: Tensor, fraction: float) -> Tensor:
    order = magnitudes.sort(dim=-1, stable=True).indices[..., : round(fraction * magnitudes.shape[-1])]
    return torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(-1, order, True)


def _pattern_mask(magnitudes: Tensor, n: int, m: int) -> Tensor:
    if magnitudes.shape[-1] % m:
        raise ConfigError(f"pattern {n}:{m} does not divide the {magnitudes.shape[-1]} inputs of a row")
    groups = magnitudes.unflatten(-1, (-1, m))
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], False).flatten(-2)


def _zero(stack: Tensor | PackedWeight, row: int, mask: Tensor) -> None:
    """Zeros where `mask` [out, in] says so; of packed weights the code of zero, scales and all other codes as they were."""
    if not isinstance(stack, PackedWeight):
        stack.data[row].masked_fill_(mask, 0.0)
    elif stack.format == "int8":
        values = stack.values[row]
        values.copy_(torch.where(mask, _zero_points(stack, row, 0), values))
    elif stack.format == "int4":
        zero = _zero_points(stack, row, 8)
        _write_nibbles(stack.values[row], mask, zero[..., 0::2] | zero[..., 1::2] << 4)
    else:
        _write_nibbles(stack.blocks[row], mask, torch.zeros_like(mask[..., 0::2], dtype=torch.uint8))


def _zero_points(stack: PackedWeight, row: int, symmetric: int) -> Tensor:
    """[out, in]: the code that stands for zero at each place."""
    if not hasattr(stack, "zeros"):
        return torch.full(stack.shape[1:], symmetric, dtype=stack.values.dtype, device=stack.device)
    return stack.zeros[row].repeat_interleave(stack.group, dim=-1)


def _write_nibbles(packed: Tensor, mask: Tensor, codes: Tensor) -> None:
    """Nibbles of `codes` [out, in / 2] where `mask` [out, in] says so, even places in the low one; all others stay."""
    written = mask[..., 0::2].to(torch.uint8) * 0x0F | mask[..., 1::2].to(torch.uint8) * 0xF0
    old = packed.reshape(written.shape)
    packed.copy_((old & ~written | (codes & written)).view(packed.shape))
