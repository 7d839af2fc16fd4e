"""Low rank: every expert's gate_up and down become two thin factors, which are stored and run as such.

Plain, or fitted to what each expert is fed (activation-aware, as SVD-LLM, arXiv 2403.07378): the error that counts is that
of outputs, so directions in which inputs are small may go first. gate_up is factored as one matrix, its gate and up rows
interleaved as they are, so both share the inner factor; biases stay. See :mod:`xmoe.quantization.low_rank`.

A weight in any other form is decoded for it, and judged by the bytes it takes in that form; one that is low-rank already
is multiplied out and factored again. Where packed weights are factored and the factors packed next, it is by those bytes
that a rank is judged: factors in bfloat16 stand between the two only.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from xmoe.compression.expert_inputs import LayerInputs, visit_inputs
from xmoe.compression.layerwise import Batch
from xmoe.errors import ConfigError
from xmoe.model.experts import Experts
from xmoe.model.transformer import Transformer
from xmoe.quantization.compound import Stack, assemble
from xmoe.quantization.low_rank import factor
from xmoe.quantization.packed import PackedWeight, dense_matrix, form, one

WEIGHTS = ("gate_up", "down")

Place = tuple[int, int]
"""(layer, expert)"""


class Packing(NamedTuple):
    """What factors will be packed in: the format, its group size, and what a rank must be a multiple of on the way there."""

    format: str
    group_size: int
    unit: int


def factor_dtype(weight: Stack) -> torch.dtype:
    """What factors of this weight are stored in: its own floating point type, bfloat16 where it is packed."""
    if isinstance(weight, Tensor):
        return weight.dtype
    return weight.left.dtype if weight.format == "low-rank" else torch.bfloat16


def factor_bytes(weight: Stack, rank: int, then: Packing | None = None) -> int:
    """Bytes of all factors of a stack [E, out, in] at this rank.

    then: of a packed weight, count them as they will be packed: like is to be compared with like.
    """
    E, out, width = weight.shape
    if not _judged_packed(weight, then):
        return E * rank * (out + width) * factor_dtype(weight).itemsize
    held = -(-rank // then.unit) * then.unit
    numbers = held * (out + width)
    if then.format == "mxfp4":
        return E * numbers * 17 // 32
    if then.format == "int8":
        return E * (numbers + 2 * (out + held))
    return E * (numbers // 2 + 2 * numbers // then.group_size)


def _judged_packed(weight: Stack, then: Packing | None) -> bool:
    return then is not None and isinstance(weight, PackedWeight) and weight.format != "low-rank"


def rank_for(weight: Stack, fraction: float, then: Packing | None = None) -> int:
    """The largest rank that removes at least `fraction` of the bytes the stack takes now; 0 where none does.

    then: take a multiple of its unit, where one is small enough.
    """
    room = (1 - fraction) * weight.nbytes * (1 + 1e-12)
    ranks = range(1, min(weight.shape[1:]) + 1)
    rank = bisect.bisect_right(ranks, room, key=lambda r: factor_bytes(weight, r, then))
    return rank if then is None else rank // then.unit * then.unit or rank


def check_rank(weight: Stack, rank: int, where: str, then: Packing | None = None) -> None:
    """ConfigError unless factors of this rank exist and take fewer bytes than the stack does now."""
    E, out, width = weight.shape
    ranks = range(1, min(out, width) + 1)
    most = bisect.bisect_left(ranks, weight.nbytes, key=lambda r: factor_bytes(weight, r, then))
    held = form(weight)
    kind = then.format if _judged_packed(weight, then) else str(factor_dtype(weight)).removeprefix("torch.")
    if most < 1:
        raise ConfigError(f"{where} [{out}, {width}] in {held} is smaller than {kind} factors of any rank")
    if rank < 1:
        raise ConfigError(
            f"{where} [{out}, {width}] in {held}: that fraction leaves less than rank 1 in {kind}; take at most "
            f"{1 - factor_bytes(weight, 1, then) / weight.nbytes:.3f}"
        )
    if rank > most:
        raise ConfigError(
            f"rank {rank} of {where} [{out}, {width}] saves nothing: {factor_bytes(weight, rank, then) // E:,} bytes an "
            f"expert in {kind} factors, {weight.nbytes // E:,} in {held}; take at most {most}"
        )


def choose_ranks(
    model: Transformer,
    places: Collection[Place],
    fraction: float | None,
    rank: tuple[int, int] | None,
    then: Packing | None = None,
) -> dict[Place, tuple[int, int]]:
    """Ranks of gate_up and down of each expert to be factored, all of them checked before anything is computed."""
    chosen = {}
    for layer, e in sorted(places):
        experts = model.blocks[layer].moe.experts
        weights = [one(getattr(experts, name), e) for name in WEIGHTS]
        chosen[layer, e] = rank or tuple(rank_for(w, fraction, then) for w in weights)
        for name, weight, r in zip(WEIGHTS, weights, chosen[layer, e]):
            check_rank(weight, r, f"{name} of layer {layer}", then)
    return chosen


class Factored(NamedTuple):
    """What was done to `total` experts: ranks of gate_up and down, tokens they were fitted to, experts that had too few."""

    ranks: frozenset[tuple[int, int]]
    tokens: int
    short: int
    total: int

    def __add__(self, other: Factored) -> Factored:
        """Of the layers of both."""
        short, total = self.short + other.short, self.total + other.total
        return Factored(self.ranks | other.ranks, max(self.tokens, other.tokens), short, total)

    def said(self) -> str:
        """In a few words."""
        sizes = [sorted({r[i] for r in self.ranks}) for i in range(2)]
        said = "rank " + " and ".join(f"{'-'.join(map(str, found))} ({n})" for n, found in zip(WEIGHTS, sizes))
        if not self.tokens:
            return said + ", plain"
        few = f", too few for {self.short} of {self.total} experts" if self.short else ""
        return said + f", fitted to {self.tokens:,} tokens{few}"


@torch.no_grad()
def factor_experts(
    model: Transformer,
    ranks: Mapping[Place, tuple[int, int]],
    *,
    sample: Tensor | None = None,
    batches: Sequence[Batch] | None = None,
) -> Factored:
    """Put factors in the place of the experts' weights, in place; returns what there is to tell.

    Args:
        ranks: what :func:`choose_ranks` returned.
        sample, batches: what the experts are fed, as in :func:`~xmoe.compression.expert_inputs.visit_inputs`; without
            either the factors are those of the plain SVD.
    """
    short, tokens = 0, 0

    def act(layer: int, inputs: LayerInputs | None) -> None:
        nonlocal short, tokens
        experts = model.blocks[layer].moe.experts
        made = {}
        for e in range(len(experts.down_bias)):
            if (layer, e) not in ranks:
                continue
            moments: tuple = (None, None)
            if inputs is not None:
                *moments, count = inputs.moments(e)
                short += count < max(len(m) for m in moments)
                tokens = len(inputs.inputs)
            weights = [one(getattr(experts, name), e) for name in WEIGHTS]
            made[e] = [_factors(*given) for given in zip(weights, ranks[layer, e], moments)]
            bar.update()
        replace_experts(experts, made)

    with tqdm(total=len(ranks), desc="factoring", unit="expert", disable=None) as bar:
        visit_inputs(model, act, sample, batches)
    return Factored(frozenset(ranks.values()), tokens, short, len(ranks))


def _factors(weight: Stack, rank: int, moment: Tensor | None) -> PackedWeight:
    """Factors of a stack of one, as a stack of one."""
    matrix = dense_matrix(weight, 0)
    where = matrix.device
    found = factor(matrix.cpu() if where.type == "mps" else matrix, rank, moment)  # MPS has no float64
    dtype = factor_dtype(weight)
    factors = {"left": found.left, "right": found.right}
    return PackedWeight("low-rank", {n: f.to(dtype).to(where).unsqueeze(0) for n, f in factors.items()})


def replace_experts(experts: Experts, made: Mapping[int, Sequence[Stack]]) -> None:
    """Put new gate_up and down, stacks of one, in the place of the experts in `made`; the others keep their bytes.

    Where experts then differ in form, both weights become mixed ones.
    """
    if not made:
        return
    held = [getattr(experts, name) for name in WEIGHTS]
    everyone = range(held[0].shape[0])
    for name, weight in zip(WEIGHTS, assemble([made.get(e) or [one(w, e) for w in held] for e in everyone])):
        experts.hold(name, weight)
