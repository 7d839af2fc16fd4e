"""What a layer's output loses without some of its experts, and which subset loses least (NAEE, arXiv 2402.14800).

For a sample of tokens let y_t be the layer's output and y_t(S) that of the experts S alone, *re-routed*: the best k of S
and a softmax over those. The error of S is L(S) = sum_t ||y_t - y_t(S)||^2.

With a_t the difference of the two weight vectors in R^E, y_t - y_t(S) = sum_e a_te f_e(x_t), so
||y_t - y_t(S)||^2 = a_t^T G_t a_t with the Gram matrix (G_t)_ef = f_e(x_t) . f_f(x_t). The Gram matrices (E^2 numbers a
token) are all that is kept of the outputs; after that a subset costs no more than a few small products.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe.compression.criteria import Scores, ranked
from xmoe.errors import ConfigError, DataError
from xmoe.kernels.reference import swiglu
from xmoe.model.experts import Experts, MoE
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import dense_matrix

MOST_SUBSETS = 20_000


class LayerProblem(NamedTuple):
    """One layer on a token sample. logits: float64 [N, E]; gram: float64 [N, E, E]; k: experts a token visits."""

    logits: Tensor
    gram: Tensor
    k: int


class Curve(NamedTuple):
    """order: experts in the order of their removal, first removed first. errors: L with n experts left, n = 0 .. E."""

    order: list[int]
    errors: list[float]


def expert_output(experts: Experts, e: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """What expert e makes of x [N, D], in fp32: hidden [N, F] after SwiGLU, and output [N, D], down bias included."""
    x = x.float()
    gate_up, down = (dense_matrix(w, e) for w in (experts.gate_up, experts.down))
    hidden = swiglu(F.linear(x, gate_up, experts.gate_up_bias[e].float()), experts.limit)
    return hidden, F.linear(hidden, down, experts.down_bias[e].float())


@torch.no_grad()
def layer_problem(moe: MoE, inputs: Tensor) -> LayerProblem:
    """Run every expert on `inputs` [N, D], the MoE's inputs of N tokens, and keep logits and Gram matrices."""
    x = inputs.to(moe.router.weight.device)
    E = moe.router.weight.shape[0]
    logits = moe.router(x.to(moe.router.weight.dtype)).logits.double().cpu()
    outputs = torch.stack([expert_output(moe.experts, e, x)[1] for e in range(E)], dim=1)  # [N, E, D]
    gram = torch.bmm(outputs, outputs.transpose(1, 2)).double().cpu()
    return LayerProblem(logits, gram, moe.router.num_experts_per_tok)


def model_problems(model: Transformer, sample: Tensor | None) -> list[LayerProblem]:
    """One problem a layer from `RoutingStats.sample` [layers, N, D]."""
    if sample is None:
        raise DataError(
            "the statistics hold no token sample, and reconstruction asks what every expert makes of one; "
            "record with a sample (record_routing(..., sample=256), or --sample 256)"
        )
    return [layer_problem(block.moe, sample[i]) for i, block in enumerate(model.blocks)]


def routing_weights(logits: Tensor, kept: Tensor, k: int) -> Tensor:
    """Dense weights [N, E] when only the experts `kept` (bool [E] or [N, E]) may be chosen; zeros where none may."""
    scores = logits.masked_fill(~kept, float("-inf"))
    top = scores.topk(min(k, scores.shape[-1]), dim=-1)
    weights = top.values.softmax(-1).nan_to_num(0.0)
    return torch.zeros_like(logits).scatter_(-1, top.indices, weights)


def errors_of(problem: LayerProblem, kept: Tensor, rows: Tensor | None = None) -> Tensor:
    """||y_t - y_t(S)||^2 for each token (of `rows`, or all), S given as bool [E] -> float64 [N]."""
    logits = problem.logits if rows is None else problem.logits[rows]
    gram = problem.gram if rows is None else problem.gram[rows]
    everything = torch.ones_like(kept)
    a = routing_weights(logits, everything, problem.k) - routing_weights(logits, kept, problem.k)
    return torch.einsum("ne,nef,nf->n", a, gram, a).clamp(min=0.0)


def greedy(problem: LayerProblem) -> Curve:
    """Take away, again and again, the expert whose absence costs least: the whole error curve in one run.

    Only tokens that had chosen the expert are looked at again. Of equal costs the highest id goes first.
    """
    E = problem.logits.shape[1]
    kept = torch.ones(E, dtype=torch.bool)
    current = torch.zeros(problem.logits.shape[0], dtype=torch.float64)
    order, errors = [], [0.0]
    for _ in range(E):
        visited = routing_weights(problem.logits, kept, problem.k) > 0
        best = None
        for e in reversed(kept.nonzero().squeeze(-1).tolist()):
            rows = visited[:, e].nonzero().squeeze(-1)
            without = kept.clone()
            without[e] = False
            changed = errors_of(problem, without, rows)
            cost = float((changed - current[rows]).sum())
            if best is None or cost < best[0]:
                best = (cost, e, rows, changed)
        _, e, rows, changed = best
        kept[e] = False
        current[rows] = changed
        order.append(e)
        errors.append(float(current.sum()))
    return Curve(order, errors[::-1])


def along(problem: LayerProblem, order: list[int]) -> Curve:
    """The error curve of removing experts in a given order, first removed first."""
    kept = torch.ones(problem.logits.shape[1], dtype=torch.bool)
    errors = [0.0]
    for e in order:
        kept[e] = False
        errors.append(float(errors_of(problem, kept).sum()))
    return Curve(list(order), errors[::-1])


def exact(problem: LayerProblem, keep: int) -> tuple[list[int], float]:
    """The subset of `keep` experts with the least error, and that error, by trying all; ConfigError where too many."""
    E = problem.logits.shape[1]
    count = math.comb(E, keep)
    if count > MOST_SUBSETS:
        raise ConfigError(
            f"{keep} of {E} experts can be chosen in {count:,} ways; all are tried up to {MOST_SUBSETS:,}, "
            "so use the criterion reconstruction (greedy)"
        )
    best, best_error = None, math.inf
    kept = torch.zeros(E, dtype=torch.bool)
    for subset in itertools.combinations(range(E), keep):
        kept.zero_()
        kept[list(subset)] = True
        error = float(errors_of(problem, kept).sum())
        if error < best_error:
            best, best_error = list(subset), error
    return best, best_error


def curve_scores(curve: Curve) -> Tensor:
    """Saliency from a greedy run: the layer's error right after the expert's removal, increasing along the order.

    The error need not grow with every removal; where it does not, the score does by the least possible step, so that
    keeping the best n by score is what the greedy run keeps.
    """
    E = len(curve.order)
    scores = torch.zeros(E, dtype=torch.float64)
    last, before = -1.0, E
    for removed, e in enumerate(curve.order, 1):
        score = curve.errors[E - removed]
        if score < last or (score == last and e > before):  # equal scores go to the lower id
            score = math.nextafter(last, math.inf)
        scores[e], last, before = score, score, e
    return scores


def curves_for(problems: list[LayerProblem], scores: Scores) -> list[Curve]:
    """The error curve of each layer along any criterion's scores."""
    return [along(problem, ranked(s)[::-1]) for problem, s in zip(problems, scores)]
