"""Judge: the saliency of every expert, one number each; the higher, the more worth keeping.

With g the routing weight, r = ||f_e(x)||_2 and X the tokens routed to the expert, n = |X| (see `routing.py`):

    frequency   n                                     the usual baseline
    share       n / (K T)                             the same, as a share of all routed pairs
    soft        sum g                                 how much weight it was given
    soft_all    sum over ALL tokens softmax(z)_e      SEER-MoE, arXiv 2404.05089
    ean         sum r                                 expert activation norm, arXiv 2504.05586
    man         sum r / n                             arXiv 2606.15716 (mean activation norm)
    msan        sum r^2 / n                           arXiv 2606.15716 (mean squared)
    reap        sum g r / n                           REAP, arXiv 2510.13999
    reap_sum    sum g r                               its sum; "weighted EAN"
    reap_l2     sqrt(sum g^2 r^2 / n)                 its root mean square
    weight_norm sqrt(||gate_up||^2 + ||down||^2)      Frobenius, biases included; needs no data
    aimer       -mean|w| / rms(w)                     arXiv 2603.18492: flat weights go first; needs no data
    random      a seeded draw                         the floor; average many seeds

`reconstruction` and `reconstruction_exact` are in `reconstruction.py`; `ranking` takes an order from elsewhere, `list`
drops the experts that are named and judges nobody. An expert that no token visited scores 0 in every activation criterion.
Ties go to the lower id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xmoe.compression.routing import LayerMoments, RoutingStats
from xmoe.errors import ConfigError, DataError
from xmoe.model.experts import Experts
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight

Scores = list[Tensor]
"""float64 [E] for each layer."""


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """total / count, 0 where nothing was counted."""
    return torch.where(count > 0, total / count.clamp(min=1e-300), 0.0)


ACTIVATION: dict[str, Callable[[LayerMoments], Tensor]] = {
    "frequency": lambda m: m.count,
    "share": lambda m: m.count / (m.num_experts_per_tok * max(m.tokens, 1e-300)),
    "soft": lambda m: m.weight,
    "soft_all": lambda m: m.probability,
    "ean": lambda m: m.norm,
    "man": lambda m: _mean(m.norm, m.count),
    "msan": lambda m: _mean(m.norm_sq, m.count),
    "reap": lambda m: _mean(m.weighted_norm, m.count),
    "reap_sum": lambda m: m.weighted_norm,
    "reap_l2": lambda m: _mean(m.weighted_norm_sq, m.count).sqrt(),
}
WEIGHTS = ("weight_norm", "aimer")
RECONSTRUCTION = ("reconstruction", "reconstruction_exact")
CRITERIA = (*ACTIVATION, *WEIGHTS, *RECONSTRUCTION, "random", "ranking", "list")


def criterion_name(text: str) -> str:
    """`reap-sum` and `reap_sum` are one criterion; an unknown name is a ConfigError."""
    name = text.strip().lower().replace("-", "_")
    if name not in CRITERIA:
        raise ConfigError(f"unknown criterion {text!r}; there are {', '.join(CRITERIA)}")
    return name


def activation_scores(stats: RoutingStats, criterion: str) -> Scores:
    """Scores by one of :data:`ACTIVATION`. DataError where the statistics lack what the criterion needs."""
    scores = [ACTIVATION[criterion](stats.layer(i)) for i in range(stats.num_layers)]
    if any(bool(s.isnan().any()) for s in scores):
        raise DataError(
            f"the statistics hold only {', '.join(stats.moments)}; {criterion} needs more, so record them with "
            "scripts/compress.py record, or judge by frequency"
        )
    return scores


def weight_scores(model: Transformer, criterion: str) -> Scores:
    """Scores by one of :data:`WEIGHTS`, expert by expert; packed ones are decoded one at a time."""
    return [layer_weight_scores(block.moe.experts, criterion) for block in model.blocks]


@torch.no_grad()
def layer_weight_scores(experts: Experts, criterion: str) -> Tensor:
    """float64 [E] of one layer; see :data:`WEIGHTS`."""
    scores = []
    for e in range(experts.gate_up_bias.shape[0]):
        matrices = [_matrix(experts.gate_up, e), _matrix(experts.down, e)]
        if criterion == "weight_norm":
            parts = [*matrices, experts.gate_up_bias[e], experts.down_bias[e]]
            scores.append(sum(_square_sum(p) for p in parts) ** 0.5)
        else:
            count = sum(m.numel() for m in matrices)
            mean = sum(float(m.abs().sum(dtype=torch.float64)) for m in matrices) / count
            rms = (sum(_square_sum(m) for m in matrices) / count) ** 0.5
            scores.append(-mean / rms if rms else 0.0)
    return torch.tensor(scores, dtype=torch.float64)


def _square_sum(tensor: Tensor) -> float:
    return float(tensor.float().square().sum(dtype=torch.float64))


def _matrix(weight: Tensor | PackedWeight, e: int) -> Tensor:
    return weight.decode([e], dtype=torch.float32)[0] if isinstance(weight, PackedWeight) else weight[e].float()


def random_scores(num_experts: Sequence[int], seed: int) -> Scores:
    """Uniform draws, one generator a layer, so that a layer's draw does not depend on the others' sizes."""
    draws = []
    for layer, E in enumerate(num_experts):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        draws.append(torch.rand(E, generator=generator, dtype=torch.float64))
    return draws


def ranking_scores(ranking: Sequence[Sequence[int]], num_experts: Sequence[int]) -> Scores:
    """Scores E, E-1, ... 1 along a ranking (best first) for each layer; experts it leaves out score 0."""
    if len(ranking) != len(num_experts):
        raise DataError(f"the ranking has {len(ranking)} layers and the model {len(num_experts)}")
    scores = []
    for layer, (order, E) in enumerate(zip(ranking, num_experts)):
        if len(set(order)) != len(order) or not all(isinstance(e, int) and 0 <= e < E for e in order):
            raise DataError(f"the ranking of layer {layer} must name experts 0..{E - 1}, each once; found {order}")
        row = torch.zeros(E, dtype=torch.float64)
        row[torch.tensor(order, dtype=torch.int64)] = torch.arange(E, E - len(order), -1, dtype=torch.float64)
        scores.append(row)
    return scores


def ranked(scores: Tensor) -> list[int]:
    """Expert ids, best first; equal scores by ascending id."""
    return torch.sort(scores, descending=True, stable=True).indices.tolist()


def super_experts(stats: RoutingStats, quantile: float = 0.995, depth: float = 0.75) -> list[tuple[int, int]]:
    """(layer, expert) of those whose output can be extreme, which a model may depend on however rarely they speak.

    m = max_norm of each expert; super is m > max(quantile of m over all, 0.1 of the largest m), in the first `depth` of
    the layers ("super experts", arXiv 2507.23279). Empty where the statistics hold no norms.
    """
    if "max_norm" not in stats.moments:
        return []
    rows = [stats.layer(i).max_norm for i in range(stats.num_layers)]
    everything = torch.cat(rows)
    limit = max(float(everything.quantile(quantile)), 0.1 * float(everything.max()))
    reach = int(depth * stats.num_layers)
    return [(i, e) for i in range(reach) for e in range(len(rows[i])) if float(rows[i][e]) > limit]
