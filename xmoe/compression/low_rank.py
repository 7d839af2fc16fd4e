"""Low rank: every expert's gate_up and down become two thin factors, which are stored and run as such.

Plain, or fitted to what each expert is fed (activation-aware, as SVD-LLM, arXiv 2403.07378): the error that counts is that
of outputs, so directions in which inputs are small may go first. gate_up is factored as one matrix, its gate and up rows
interleaved as they are, so both share the inner factor; biases stay. See :mod:`xmoe.quantization.low_rank`.

A weight in any other form is decoded for it, and judged by the bytes it takes in that form; one that is low-rank already
is multiplied out and factored again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from xmoe.compression.expert_inputs import LayerInputs, visit_inputs
from xmoe.compression.layerwise import Batch
from xmoe.errors import ConfigError
from xmoe.model.experts import Experts
from xmoe.model.transformer import Transformer
from xmoe.quantization.compound import assemble
from xmoe.quantization.low_rank import factor
from xmoe.quantization.packed import PackedWeight, dense_matrix, form

WEIGHTS = ("gate_up", "down")

Place = tuple[int, int]
"""(layer, expert)"""


def factor_dtype(weight: Tensor | PackedWeight) -> torch.dtype:
    """What factors of this weight are stored in: its own floating point type, bfloat16 where it is packed."""
    if isinstance(weight, Tensor):
        return weight.dtype
    return weight.left.dtype if weight.format == "low-rank" else torch.bfloat16


def factor_bytes(weight: Tensor | PackedWeight, rank: int) -> int:
    """Bytes of all factors of a stack [E, out, in] at this rank."""
    E, out, width = weight.shape
    return E * rank * (out + width) * factor_dtype(weight).itemsize


def rank_for(weight: Tensor | PackedWeight, fraction: float, unit: int = 1) -> int:
    """The largest rank that removes at least `fraction` of the bytes the stack takes now; 0 where none does.

    unit: take a multiple of it where one is small enough, since the factors are to be packed in such groups afterwards.
    """
    rank = min(math.floor((1 - fraction) * weight.nbytes / factor_bytes(weight, 1) + 1e-9), *weight.shape[1:])
    return rank // unit * unit or rank


def check_rank(weight: Tensor | PackedWeight, rank: int, where: str) -> None:
    """ConfigError unless factors of this rank exist and take fewer bytes than the stack does now."""
    E, out, width = weight.shape
    most = min((weight.nbytes - 1) // factor_bytes(weight, 1), out, width)
    held = form(weight)
    kind = str(factor_dtype(weight)).removeprefix("torch.")
    if most < 1:
        raise ConfigError(f"{where} [{out}, {width}] in {held} is smaller than {kind} factors of any rank")
    if rank < 1:
        raise ConfigError(
            f"{where} [{out}, {width}] in {held}: that fraction leaves less than rank 1 in {kind}; take at most "
            f"{1 - factor_bytes(weight, 1) / weight.nbytes:.3f}"
        )
    if rank > most:
        raise ConfigError(
            f"rank {rank} of {where} [{out}, {width}] saves nothing: {factor_bytes(weight, rank) // E:,} bytes an expert "
            f"in {kind} factors, {weight.nbytes // E:,} in {held}; take at most {most}"
        )


def choose_ranks(
    model: Transformer,
    places: Collection[Place],
    fraction: float | None,
    rank: tuple[int, int] | None,
    unit: int = 1,
) -> dict[Place, tuple[int, int]]:
    """Ranks of gate_up and down of each expert to be factored, all of them checked before anything is computed."""
    chosen = {}
    for layer, e in sorted(places):
        experts = model.blocks[layer].moe.experts
        weights = [one(getattr(experts, name), e) for name in WEIGHTS]
        chosen[layer, e] = rank or tuple(rank_for(w, fraction, unit) for w in weights)
        for name, weight, r in zip(WEIGHTS, weights, chosen[layer, e]):
            check_rank(weight, r, f"{name} of layer {layer}")
    return chosen


@torch.no_grad()
def factor_experts(
    model: Transformer,
    ranks: Mapping[Place, tuple[int, int]],
    *,
    sample: Tensor | None = None,
    batches: Sequence[Batch] | None = None,
) -> str:
    """Put factors in the place of the experts' weights, in place; returns in a few words what was done.

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
    sizes = [sorted({r[i] for r in ranks.values()}) for i in range(2)]
    said = "rank " + " and ".join(f"{'-'.join(map(str, found))} ({n})" for n, found in zip(WEIGHTS, sizes))
    if not tokens:
        return said + ", plain"
    return said + f", fitted to {tokens:,} tokens" + (f", too few for {short} of {len(ranks)} experts" if short else "")


def _factors(weight: Tensor | PackedWeight, rank: int, moment: Tensor | None) -> PackedWeight:
    """Factors of a stack of one, as a stack of one."""
    matrix = dense_matrix(weight, 0)
    where = matrix.device
    found = factor(matrix.cpu() if where.type == "mps" else matrix, rank, moment)  # MPS has no float64
    dtype = factor_dtype(weight)
    factors = {"left": found.left, "right": found.right}
    return PackedWeight("low-rank", {n: f.to(dtype).to(where).unsqueeze(0) for n, f in factors.items()})


def one(weight: Tensor | PackedWeight, e: int) -> Tensor | PackedWeight:
    """Expert e of a stack as a stack of one, in the form that it has."""
    return weight.expert(e) if isinstance(weight, PackedWeight) else weight[e : e + 1].detach()


def replace_experts(experts: Experts, made: Mapping[int, Sequence[Tensor | PackedWeight]]) -> None:
    """Put new gate_up and down, stacks of one, in the place of the experts in `made`; the others keep their bytes.

    Where experts then differ in form, both weights become mixed ones.
    """
    if not made:
        return
    held = [getattr(experts, name) for name in WEIGHTS]
    everyone = range(held[0].shape[0])
    for name, weight in zip(WEIGHTS, assemble([made.get(e) or [one(w, e) for w in held] for e in everyone])):
        experts.hold(name, weight)
