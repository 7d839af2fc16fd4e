"""Low rank: every expert's gate_up and down become two thin factors, which are stored and run as such.

Plain, or fitted to what each expert is fed (activation-aware, as SVD-LLM, arXiv 2403.07378): the error that counts is that
of outputs, so directions in which inputs are small may go first. gate_up is factored as one matrix, its gate and up rows
interleaved as they are, so both share the inner factor; biases stay. See :mod:`xmoe.quantization.low_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from xmoe.compression.expert_inputs import LayerInputs, visit_inputs
from xmoe.compression.layerwise import Batch
from xmoe.errors import ConfigError
from xmoe.model.experts import Experts
from xmoe.model.transformer import Transformer
from xmoe.quantization.low_rank import factor
from xmoe.quantization.packed import PackedWeight, dense_matrix

WEIGHTS = ("gate_up", "down")


def factor_dtype(weight: Tensor | PackedWeight) -> torch.dtype:
    """What factors of this weight are stored in: its own floating point type, bfloat16 where it is packed."""
    if isinstance(weight, Tensor):
        return weight.dtype
    return weight.left.dtype if weight.format == "low-rank" else torch.bfloat16


def factor_bytes(weight: Tensor | PackedWeight, rank: int) -> int:
    """Bytes of all factors of a stack [E, out, in] at this rank."""
    E, out, width = weight.shape
    return E * rank * (out + width) * factor_dtype(weight).itemsize


def rank_for(weight: Tensor | PackedWeight, fraction: float) -> int:
    """The largest rank that removes at least `fraction` of the bytes the stack takes now; 0 where none does."""
    return min(math.floor((1 - fraction) * weight.nbytes / factor_bytes(weight, 1) + 1e-9), *weight.shape[1:])


def check_rank(weight: Tensor | PackedWeight, rank: int, where: str) -> None:
    """ConfigError unless factors of this rank exist and take fewer bytes than the stack does now."""
    E, out, width = weight.shape
    most = min((weight.nbytes - 1) // factor_bytes(weight, 1), out, width)
    held = weight.format if isinstance(weight, PackedWeight) else str(weight.dtype).removeprefix("torch.")
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
    model: Transformer, layers: Collection[int], fraction: float | None, rank: tuple[int, int] | None
) -> dict[int, tuple[int, int]]:
    """Ranks of gate_up and down in each layer to be factored, all of them checked before anything is computed."""
    chosen = {}
    for layer in sorted(layers):
        weights = [getattr(model.blocks[layer].moe.experts, name) for name in WEIGHTS]
        chosen[layer] = rank or tuple(rank_for(w, fraction) for w in weights)
        for name, weight, r in zip(WEIGHTS, weights, chosen[layer]):
            check_rank(weight, r, f"{name} of layer {layer}")
    return chosen


@torch.no_grad()
def factor_experts(
    model: Transformer,
    ranks: dict[int, tuple[int, int]],
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
    total = sum(len(model.blocks[layer].moe.experts.down_bias) for layer in ranks)

    def act(layer: int, inputs: LayerInputs | None) -> None:
        nonlocal short, tokens
        if layer not in ranks:
            return
        experts = model.blocks[layer].moe.experts
        pairs: tuple[list, list] = ([], [])
        for e in range(len(experts.down_bias)):
            moments: tuple = (None, None)
            if inputs is not None:
                *moments, count = inputs.moments(e)
                short += count < max(len(m) for m in moments)
                tokens = len(inputs.inputs)
            for name, rank, moment, found in zip(WEIGHTS, ranks[layer], moments, pairs):
                found.append(_factors(getattr(experts, name), e, rank, moment))
            bar.update()
        for name, found in zip(WEIGHTS, pairs):
            experts.pack(name, PackedWeight("low-rank", {k: torch.stack([f[k] for f in found]) for k in found[0]}))

    with tqdm(total=total, desc="factoring", unit="expert", disable=None) as bar:
        visit_inputs(model, act, sample, batches)
    sizes = [sorted({r[i] for r in ranks.values()}) for i in range(2)]
    said = "rank " + " and ".join(f"{'-'.join(map(str, found))} ({n})" for n, found in zip(WEIGHTS, sizes))
    if not tokens:
        return said + ", plain"
    return said + f", fitted to {tokens:,} tokens" + (f", too few for {short} of {total} experts" if short else "")


def _factors(weight: Tensor | PackedWeight, e: int, rank: int, moment: Tensor | None) -> dict[str, Tensor]:
    matrix = dense_matrix(weight, e)
    where = matrix.device
    found = factor(matrix.cpu() if where.type == "mps" else matrix, rank, moment)  # MPS has no float64
    dtype = factor_dtype(weight)
    return {"left": found.left.to(dtype).to(where), "right": found.right.to(dtype).to(where)}


def is_factored(experts: Experts) -> bool:
    """Whether any weight of these experts is stored as factors."""
    return any(isinstance(w, PackedWeight) and w.format == "low-rank" for w in (experts.gate_up, experts.down))
