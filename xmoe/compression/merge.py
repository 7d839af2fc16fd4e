"""Merge: experts that are alike become one, instead of one of them going.

Three published ways to group, all averaged with weights, biases too:

    hc-smoe   agglomerative clustering (average linkage) of the experts' mean outputs over a token sample; weights: how often
              each is used (arXiv 2410.08589)
    m-smoe    the most used experts are dominant; each other joins the dominant whose router logits are most like its own;
              neurons are permuted to the dominant's before averaging by use (arXiv 2310.01334)
    ream      the best by REAP are centroids; from the most salient on, each takes in its nearest by the mean of output and
              router-logit similarity, up to a group of 16; permuted, averaged by saliency (arXiv 2604.04356)

Hidden units have no order, so averaging two experts element by element mixes strangers. `align` permutes the neurons of one
to match another's: a neuron is its gate row, up row, their biases and its down column, and they move together.

What becomes of the router: the standard form keeps the row of each group's most used expert. The tied form keeps all E rows
and gives the members of a group the same weights, so every token's gates add up as before; it is exact about routing and
saves nothing by itself. A merged expert has weights that no source holds, so nothing here is bit-exact, and MXFP4 experts
are encoded anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe.compression.apply import prune
from xmoe.compression.criteria import activation_scores, ranked
from xmoe.compression.identity import model_hash
from xmoe.compression.plan import PrunePlan
from xmoe.compression.reconstruction import expert_output
from xmoe.compression.routing import RoutingStats
from xmoe.errors import ConfigError, DataError
from xmoe.model.experts import Experts, MoE
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight

METHODS = ("hc-smoe", "m-smoe", "ream")
LARGEST_GROUP = 16


class Group(NamedTuple):
    """Experts that become one: `leader`, whose router row stays, all `members`, and how much each counts."""

    leader: int
    members: tuple[int, ...]
    weights: tuple[float, ...]


@torch.no_grad()
def merge(
    model: Transformer, stats: RoutingStats, method: str, keep: int, *, tied: bool = False
) -> tuple[Transformer, list[list[Group]]]:
    """A new model whose layers have `keep` experts each, and the groups of every layer by ascending leader.

    Args:
        stats: with a token sample (`record_routing(..., sample=512)`), of this model.
        tied: keep all experts and router rows, members of a group equal, instead of one expert a group.

    Raises:
        ConfigError: an unknown method or an impossible `keep`. DataError: statistics of another model or without a sample.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    if stats.model and stats.model != model_hash(model):
        raise DataError(f"the statistics are of model {stats.model}, this is model {model_hash(model)}")
    held = [getattr(block.moe.experts, name) for block in model.blocks for name in ("gate_up", "down")]
    if any(isinstance(w, PackedWeight) and w.factors for w in held):
        raise ConfigError(
            "experts stored as low-rank factors have no common basis to be averaged in; merge before low-rank"
        )
    if any(isinstance(w, PackedWeight) and w.format == "mixed" for w in held):
        raise ConfigError(
            "the experts of a layer differ in form, and an average of them has none; merge before reduce --experts"
        )
    if stats.sample is None:
        raise DataError("merging compares experts on a token sample; record with one (--sample 512)")
    fewest = min(stats.num_experts)
    if not 1 <= keep <= fewest:
        raise ConfigError(f"keep is {keep}; expected 1 to {fewest}, the experts of the smallest layer")
    groups = []
    for layer, block in enumerate(model.blocks):
        groups.append(_groups(block.moe, stats, layer, method, keep))
    if tied:
        small = prune(model, _plan(stats, [range(E) for E in stats.num_experts]))
    else:
        small = prune(model, _plan(stats, [[g.leader for g in row] for row in groups]))
    for row, old, new in zip(groups, model.blocks, small.blocks):
        _write(row, old.moe.experts, new.moe.experts, align=method != "hc-smoe", tied=tied)
    return small, groups


def _plan(stats: RoutingStats, kept) -> PrunePlan:
    rows = tuple(tuple(row) for row in kept)
    return PrunePlan("merge", "uniform", stats.num_experts, stats.num_experts_per_tok, rows)


# ----------------------------------------------------------------------------------------------------------- grouping


def _groups(moe: MoE, stats: RoutingStats, layer: int, method: str, keep: int) -> list[Group]:
    x = stats.sample[layer].to(moe.router.weight.device)
    used = stats.layer(layer).count
    E = stats.num_experts[layer]
    if method == "hc-smoe":
        outputs = torch.stack([expert_output(moe.experts, e, x)[1].mean(0) for e in range(E)])
        clusters = agglomerate(torch.cdist(outputs.double(), outputs.double()), keep)
        weights = used
    else:
        logits = moe.router(x.to(moe.router.weight.dtype)).logits.double()
        alike = _cosine(logits.t())
        if method == "m-smoe":
            leaders, weights = ranked(used)[:keep], used
            clusters = _join(leaders, alike, E)
        else:
            saliency = activation_scores(stats, "reap")[layer]
            outputs = torch.stack([expert_output(moe.experts, e, x)[1].flatten() for e in range(E)])
            leaders, weights = ranked(saliency)[:keep], saliency
            clusters = collect(leaders, (alike + _cosine(outputs.double())) / 2)
    return sorted(_group(members, used, weights) for members in clusters)


def _group(members: Sequence[int], used: Tensor, weights: Tensor) -> Group:
    leader = min(members, key=lambda e: (-float(used[e]), e))
    total = float(sum(weights[e] for e in members))
    shares = [float(weights[e]) / total if total > 0 else 1 / len(members) for e in members]
    return Group(leader, tuple(members), tuple(shares))


def _cosine(rows: Tensor) -> Tensor:
    unit = F.normalize(rows, dim=-1)
    return unit @ unit.t()


def agglomerate(distance: Tensor, clusters: int) -> list[list[int]]:
    """Join the two nearest clusters until `clusters` are left; nearness is the mean distance between their members."""
    groups = [[i] for i in range(distance.shape[0])]
    while len(groups) > clusters:
        pairs = ((a, b) for a in range(len(groups)) for b in range(a + 1, len(groups)))
        a, b = min(pairs, key=lambda p: (float(distance[groups[p[0]]][:, groups[p[1]]].mean()), p))
        groups[a] = sorted(groups[a] + groups.pop(b))
    return groups


def _join(leaders: Sequence[int], alike: Tensor, E: int) -> list[list[int]]:
    groups = {leader: [leader] for leader in leaders}
    for e in range(E):
        if e not in groups:
            groups[max(leaders, key=lambda leader: (float(alike[e, leader]), -leader))].append(e)
    return [sorted(g) for g in groups.values()]


def collect(leaders: Sequence[int], alike: Tensor) -> list[list[int]]:
    """Leaders in order of saliency take in their nearest free experts, one group filled before the next."""
    free = [e for e in range(alike.shape[0]) if e not in set(leaders)]
    room = max(LARGEST_GROUP, -(-alike.shape[0] // len(leaders)))
    groups = []
    for i, leader in enumerate(leaders):
        nearest = sorted(free, key=lambda e: (-float(alike[leader, e]), e))
        mine = [e for e in nearest if alike[leader, e] >= alike[list(leaders[i:]), e].max()][: room - 1]
        free = [e for e in free if e not in set(mine)]
        groups.append(sorted([leader, *mine]))
    for e in free:  # their nearest leader had no room: the nearest that has
        open_groups = [(float(alike[leader, e]), -i) for i, leader in enumerate(leaders) if len(groups[i]) < room]
        groups[-max(open_groups)[1]].append(e)
    return [sorted(g) for g in groups]


# ---------------------------------------------------------------------------------------------------------- averaging


class Weights(NamedTuple):
    """One expert in fp32: gate_up [2F, D], gate_up_bias [2F], down [D, F], down_bias [D]."""

    gate_up: Tensor
    gate_up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def permuted(self, order: Tensor) -> Weights:
        """The same function with its neurons in another order."""
        rows = torch.stack((2 * order, 2 * order + 1), dim=-1).flatten()
        return Weights(self.gate_up[rows], self.gate_up_bias[rows], self.down[:, order], self.down_bias)

    def features(self) -> Tensor:
        """A neuron a row: gate row, up row, their biases, down column."""
        pairs = self.gate_up.unflatten(0, (-1, 2)).flatten(1)
        return torch.cat((pairs, self.gate_up_bias.view(-1, 2), self.down.t()), dim=1)


def expert_weights(experts: Experts, e: int) -> Weights:
    gate_up, down = (
        w.decode([e], dtype=torch.float32)[0] if isinstance(w, PackedWeight) else w[e].float()
        for w in (experts.gate_up, experts.down)
    )
    return Weights(gate_up, experts.gate_up_bias[e].float(), down, experts.down_bias[e].float())


def align(expert: Weights, leader: Weights) -> Weights:
    """`expert` with its neurons permuted to be nearest to those of `leader`, all together (the assignment problem)."""
    similarity = leader.features() @ expert.features().t()
    return expert.permuted(assign(similarity))


def assign(gain: Tensor) -> Tensor:
    """Column for each row, each used once, with the greatest total gain: shortest augmenting paths (Jonker-Volgenant)."""
    import numpy as np

    cost = -gain.double().cpu().numpy()
    n = len(cost)
    u, v = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, dtype=np.int64)  # row of each column, 1-based; 0: free
    for row in range(1, n + 1):
        row_of[0] = row
        column, least = 0, np.full(n + 1, np.inf)
        before, done = np.zeros(n + 1, dtype=np.int64), np.zeros(n + 1, dtype=bool)
        while True:
            done[column] = True
            at = row_of[column]
            reduced = cost[at - 1] - u[at] - v[1:]
            better = ~done[1:] & (reduced < least[1:])
            least[1:][better] = reduced[better]
            before[1:][better] = column
            open_columns = np.where(done[1:], np.inf, least[1:])
            following = int(open_columns.argmin()) + 1
            step = open_columns[following - 1]
            u[row_of[done]] += step
            v[done] -= step
            least[~done] -= step
            column = following
            if not row_of[column]:
                break
        while column:
            row_of[column] = row_of[before[column]]
            column = before[column]
    columns = np.empty(n, dtype=np.int64)
    columns[row_of[1:] - 1] = np.arange(n)
    return torch.from_numpy(columns).to(gain.device)


def average(group: Group, experts: Experts, aligned: bool) -> Weights:
    """The group's weighted mean, members permuted to the leader first if `aligned`."""
    leader = expert_weights(experts, group.leader)
    parts = []
    for e in group.members:
        mine = expert_weights(experts, e)
        parts.append(align(mine, leader) if aligned and e != group.leader else mine)
    return Weights(*(sum(w * t for w, t in zip(group.weights, tensors)) for tensors in zip(*parts)))


def _write(groups: list[Group], old: Experts, new: Experts, *, align: bool, tied: bool) -> None:
    """Put the averages where they belong; experts alone in their group keep their bytes where nothing is packed anew."""
    for row, group in enumerate(groups):
        if len(group.members) == 1:
            continue
        made = average(group, old, align)
        for place in group.members if tied else (row,):
            for name, value in made._asdict().items():
                target = getattr(new, name)
                if not isinstance(target, PackedWeight):
                    target.data[place] = value.to(target.dtype)
                    continue
                packed = target.expert(place).encode_like(value.unsqueeze(0))
                for part, tensor in packed.tensors.items():
                    target.tensors[part][place] = tensor[0]


def describe(groups: list[list[Group]]) -> list[list[dict]]:
    """For the manifest: every group of every layer."""
    return [[g._asdict() for g in row] for row in groups]
