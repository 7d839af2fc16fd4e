"""Decide: scores and a budget become a PrunePlan, a small file a person can read and edit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from xmoe.compression.budget import BUDGETS, counts_by_sensitivity, counts_globally, layer_limits, uniform_counts
from xmoe.compression.criteria import (
    ACTIVATION,
    RECONSTRUCTION,
    WEIGHTS,
    Scores,
    activation_scores,
    criterion_name,
    random_scores,
    ranked,
    ranking_scores,
    super_experts,
    weight_scores,
)
from xmoe.compression.identity import model_hash
from xmoe.compression.layerwise import StoredModel
from xmoe.compression.reconstruction import curve_scores, curves_for, exact, greedy, model_problems
from xmoe.compression.routing import RoutingStats
from xmoe.errors import ConfigError, DataError
from xmoe.model.transformer import Transformer
from xmoe.outputs import new_file

SCHEMA_VERSION = 1

Place = tuple[int, int]
"""(layer, expert)"""


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """Which experts stay, and why.

    Attributes:
        criterion, budget: how the scores were made and shared out among layers.
        num_experts: experts of each layer before.
        num_experts_per_tok: K before; :attr:`experts_per_token` is K after.
        kept: ascending expert ids for each layer.
        scores: one number an expert for each layer; None where there is none.
        protected: (layer, expert) kept whatever their score, super experts included.
        never_routed: (layer, expert) that no token visited.
        weight_mass: for each layer the share of routing weight that went to experts that stay; empty where unknown.
        data: what the statistics were recorded on: domain, tokens, hashes.
        model: hash of the model the plan is for; empty where unknown.
    """

    criterion: str
    budget: str
    num_experts: tuple[int, ...]
    num_experts_per_tok: int
    kept: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float | None, ...], ...] = ()
    protected: tuple[Place, ...] = ()
    never_routed: tuple[Place, ...] = ()
    weight_mass: tuple[float, ...] = ()
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: str = ""
    command: str = ""
    time: str = ""

    def __post_init__(self):
        if len(self.kept) != len(self.num_experts):
            raise ConfigError(f"the plan keeps experts in {len(self.kept)} layers and names {len(self.num_experts)}")
        for layer, (kept, E) in enumerate(zip(self.kept, self.num_experts)):
            if not kept:
                raise ConfigError(f"the plan keeps no expert in layer {layer}; expected at least 1 of {E}")
            if outside := [e for e in kept if not 0 <= e < E]:
                raise ConfigError(f"the plan keeps expert {outside[0]} in layer {layer}, which has experts 0..{E - 1}")
            if list(kept) != sorted(set(kept)):
                raise ConfigError(f"the plan's experts of layer {layer} must ascend, each once; found {list(kept)}")

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts kept in each layer."""
        return tuple(len(k) for k in self.kept)

    @property
    def is_uniform(self) -> bool:
        return len(set(self.counts)) == 1

    @property
    def experts_per_token(self) -> int:
        """K after the cut: one number for all layers, so no more than the smallest layer keeps."""
        return min(self.num_experts_per_tok, *self.counts)

    @property
    def kept_share(self) -> float:
        """Experts that stay / experts before."""
        return sum(self.counts) / sum(self.num_experts)

    def check_model(self, num_experts: Sequence[int], model: str = "") -> None:
        """ConfigError unless the plan is for a model of these experts and, where both are known, of this hash."""
        if tuple(num_experts) != tuple(self.num_experts):
            raise ConfigError(
                f"the plan is for {_layers(self.num_experts)}, the model has {_layers(num_experts)}; "
                "make a plan from this model's statistics"
            )
        if self.model and model and self.model != model:
            raise ConfigError(
                f"the plan is for model {self.model}, this is model {model}; make a plan from this model's statistics"
            )

    def summary(self) -> str:
        """Who stays, who goes, and how much routing weight goes with them; one line a layer."""
        total, left = sum(self.num_experts), sum(self.counts)
        about = f" on {self.data['domain']}" if self.data.get("domain") else ""
        tokens = f" ({self.data['tokens']:,.0f} tokens)" if self.data.get("tokens") else ""
        lines = [f"{self.criterion}, {self.budget} budget{about}{tokens}: {left} of {total} experts stay"]
        if self.weight_mass:
            lost = [1 - m for m in self.weight_mass]
            lines[0] += f"; {sum(lost) / len(lost):.1%} of the routing weight went to those that leave"
        for layer, (kept, E) in enumerate(zip(self.kept, self.num_experts)):
            mass = f"  {1 - self.weight_mass[layer]:6.1%} of weight lost" if self.weight_mass else ""
            gone = [e for e in range(E) if e not in set(kept)]
            lines.append(f"  layer {layer:>2}: {len(kept)}/{E}{mass}  out: {' '.join(map(str, gone)) or '-'}")
        lines.extend(self.remarks())
        return "\n".join(lines)

    def remarks(self) -> list[str]:
        """What a reader should know beyond the lists: a smaller K, unrouted and protected experts, uneven counts."""
        K, k = self.num_experts_per_tok, self.experts_per_token
        said = []
        if k < K:
            short = [i for i, n in enumerate(self.counts) if n < K]
            said.append(f"layer {short[0]} keeps fewer than {K} experts: every token now visits {k} in all layers")
        elif full := [i for i, n in enumerate(self.counts) if n == K]:
            said.append(f"{len(full)} layers keep exactly {K}: their routers weigh, and choose no longer")
        if self.never_routed:
            said.append(f"{len(self.never_routed)} experts were never routed to by these tokens")
        if self.protected:
            said.append("protected: " + " ".join(f"{i}:{e}" for i, e in self.protected))
        if not self.is_uniform:
            said.append(
                f"{min(self.counts)} to {max(self.counts)} experts a layer: the native layout holds this as it is, "
                "others only padded to the largest layer"
            )
        return said

    # ------------------------------------------------------------------------------------------------ on disk

    def to_json(self) -> str:
        """The file's text: one line for each layer, so that an edit is a short diff."""
        head = {"schema_version": SCHEMA_VERSION} | {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("kept", "scores")
        }
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
        for name in ("kept", "scores"):
            rows = ",\n".join("    " + json.dumps(row) for row in getattr(self, name))
            lines.append(f'  "{name}": [\n{rows}\n  ]' if rows else f'  "{name}": []')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write plan.json."""
        with new_file(path, overwrite) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read a plan; a ConfigError says what is wrong with it, since people edit these files."""
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"plan {path} does not exist; scripts/compress.py plan makes one")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise ConfigError(f"plan {path} is no JSON: {e}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"plan {path} is no JSON object; expected what compress.py plan writes")
        if (version := content.pop("schema_version", None)) != SCHEMA_VERSION:
            raise ConfigError(f"plan {path} has schema_version {version!r}; expected {SCHEMA_VERSION}")
        known = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := [k for k in content if k not in known]:
            raise ConfigError(f"plan {path}: unknown key {unknown[0]!r}; keys: {', '.join(known)}")
        needed = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [n for n in needed if n not in content]:
            raise ConfigError(f"plan {path} lacks {', '.join(missing)}")
        try:
            for name in ("kept", "protected", "never_routed"):
                rows = content.get(name, ())
                if not all(type(e) is int for row in rows for e in row):
                    raise TypeError(f"{name} must list whole numbers")
            nested = {n: tuple(tuple(row) for row in content.get(n, ())) for n in _NESTED}
            plain = {n: tuple(content.get(n, ())) for n in ("num_experts", "weight_mass")}
            return cls(**{**content, **nested, **plain})
        except TypeError as e:
            raise ConfigError(f"plan {path} is malformed: {e}") from None
        except ConfigError as e:
            raise ConfigError(f"{path}: {e}") from None


_NESTED = ("kept", "scores", "protected", "never_routed")


def _layers(counts: Sequence[int]) -> str:
    few, many = min(counts), max(counts)
    return f"{len(counts)} layers of {few if few == many else f'{few} to {many}'} experts"


def plan_pruning(
    stats: RoutingStats | None = None,
    criterion: str = "reap",
    keep: int | float | None = None,
    *,
    budget: str = "uniform",
    protect: Sequence[Place] = (),
    remove: Sequence[Place] = (),
    model: Transformer | StoredModel | None = None,
    ranking: Sequence[Sequence[int]] | None = None,
    guard: bool = True,
    seed: int = 0,
    command: str = "",
) -> PrunePlan:
    """Judge every expert and decide who stays.

    Args:
        stats: what :func:`~xmoe.compression.routing.record_routing` returned; criteria that look only at weights, and
            `random` and `ranking`, do without when they have the model.
        criterion: one of :data:`~xmoe.compression.criteria.CRITERIA`; `list` scores nobody and drops what `remove` names.
        keep: experts a layer that stay: a count (8), or a share in (0, 1). None keeps all but `remove`.
        budget: `uniform`, the same count in every layer; `global`, the best scores over all layers, each layer's scaled
            to sum to 1; `sensitivity`, the counts whose summed reconstruction error is least. The last two keep as many
            in all as `uniform` would, and at least K in every layer.
        protect, remove: (layer, expert) that stay or go whatever their score.
        model: needed by criteria that look at weights, and by reconstruction and sensitivity; a checkpoint on disk serves,
            one layer in memory at a time.
        ranking: expert ids best first for each layer, for `ranking`.
        guard: protect super experts (see :func:`~xmoe.compression.criteria.super_experts`).
        seed: of `random`.

    Raises:
        ConfigError: a budget or criterion that cannot work. DataError: statistics that are empty or of another model.
    """
    criterion = criterion_name(criterion)
    if budget not in BUDGETS:
        raise ConfigError(f"unknown budget {budget!r}; there are {', '.join(BUDGETS)}")
    num_experts, K, identity = _subject(stats, model)
    kept_per_layer = uniform_counts(num_experts, keep, remove)
    must_stay = _places(protect, num_experts, "protect")
    must_go = _places(remove, num_experts, "remove")
    if both := must_stay & must_go:
        raise ConfigError("expert {}:{} is both protected and removed".format(*min(both)))
    if guard and stats is not None and criterion not in ("random", "ranking", "list"):
        must_stay |= set(super_experts(stats)) - must_go
    if criterion == "list" and (keep is not None or budget != "uniform"):
        raise ConfigError("criterion list keeps all experts but those to remove; leave out keep and budget")
    scores, curves = _judge(criterion, budget, stats, model, ranking, num_experts, kept_per_layer, seed)
    counts, total = kept_per_layer, sum(kept_per_layer)
    if budget != "uniform":
        limits = layer_limits(num_experts, total, K, must_stay, must_go)
        if budget == "global":
            counts = counts_globally(scores, total, limits)
        else:
            counts = counts_by_sensitivity([c.errors for c in curves], total, limits)
    kept = []
    for layer, (row, n) in enumerate(zip(scores, counts)):
        kept.append(_choose(layer, ranked(row), n, must_stay, must_go))
    return PrunePlan(
        criterion=criterion,
        budget=budget,
        num_experts=num_experts,
        num_experts_per_tok=K,
        kept=tuple(kept),
        scores=tuple(tuple(row.tolist()) for row in scores),
        protected=tuple(sorted(must_stay)),
        never_routed=tuple(stats.never_routed()) if stats is not None and "count" in stats.moments else (),
        weight_mass=_weight_mass(stats, kept),
        data={} if stats is None else {"domain": stats.domain, "tokens": stats.tokens, "hashes": list(stats.data)},
        model=identity,
        command=command,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _subject(stats: RoutingStats | None, model: Transformer | StoredModel | None) -> tuple[tuple[int, ...], int, str]:
    """Experts of each layer, K and hash of the model the plan is for, checked where both sources speak."""
    if stats is None and model is None:
        raise ConfigError("a plan needs routing statistics, a model, or both")
    identity = ""
    if model is not None:
        config = model.config
        counts = tuple(config.experts_in_layer(i) for i in range(config.num_hidden_layers))
        K, identity = config.num_experts_per_tok, model.hash if isinstance(model, StoredModel) else model_hash(model)
    if stats is None:
        return counts, K, identity
    if not stats.tokens:
        raise DataError("the statistics hold no tokens; record some text first")
    if model is not None and (counts != stats.num_experts or (stats.model and stats.model != identity)):
        raise DataError(
            f"the statistics are of another model: {_layers(stats.num_experts)}, hash {stats.model or 'unknown'}; "
            f"this one has {_layers(counts)}, hash {identity}"
        )
    return stats.num_experts, stats.num_experts_per_tok, stats.model or identity


def _places(places: Sequence[Place], num_experts: Sequence[int], flag: str) -> set[Place]:
    for layer, e in places:
        if not 0 <= layer < len(num_experts) or not 0 <= e < num_experts[layer]:
            raise ConfigError(f"{flag} {layer}:{e}: there is no such expert; the model has {_layers(num_experts)}")
    return {(int(layer), int(e)) for layer, e in places}


def _judge(criterion, budget, stats, model, ranking, num_experts, counts, seed):
    """Scores of every layer, and error curves where the budget wants them."""
    problems = None
    if criterion in RECONSTRUCTION or budget == "sensitivity":
        if model is None or stats is None:
            raise ConfigError(
                "reconstruction and the sensitivity budget run every expert on a sample of tokens: they need the model "
                "(--checkpoint) and statistics with a sample (record --sample 256)"
            )
        problems = model_problems(model, stats.sample)
    if criterion in RECONSTRUCTION:
        curves = [greedy(p) for p in problems]
        scores = [curve_scores(c) for c in curves]
        if criterion == "reconstruction_exact":
            if budget != "uniform":
                raise ConfigError("reconstruction_exact knows one count a layer; take the uniform budget")
            scores = [_exactly(p, s, n) for p, s, n in zip(problems, scores, counts)]
        return scores, curves
    if criterion in ACTIVATION:
        if stats is None:
            raise ConfigError(f"criterion {criterion} judges by routing statistics; record some (--stats)")
        scores = activation_scores(stats, criterion)
    elif criterion in WEIGHTS:
        if model is None:
            raise ConfigError(f"criterion {criterion} looks at the weights; it needs the model (--checkpoint)")
        scores = weight_scores(model, criterion)
    elif criterion == "random":
        scores = random_scores(num_experts, seed)
    elif criterion == "list":
        scores = [torch.zeros(E, dtype=torch.float64) for E in num_experts]
    else:
        if ranking is None:
            raise ConfigError("criterion ranking needs a ranking: expert ids best first for each layer (--ranking)")
        scores = ranking_scores(ranking, num_experts)
    return scores, None if problems is None else curves_for(problems, scores)


def _exactly(problem, scores: torch.Tensor, n: int) -> torch.Tensor:
    """Greedy scores, those of the best subset of n raised above all others."""
    best, _ = exact(problem, n)
    raised = scores.clone()
    raised[best] += float(scores.max()) + 1.0
    return raised


def _choose(layer: int, order: list[int], n: int, must_stay: set[Place], must_go: set[Place]) -> tuple[int, ...]:
    stay = [e for e in order if (layer, e) in must_stay]
    if len(stay) > n:
        raise ConfigError(
            f"layer {layer} protects {len(stay)} experts and keeps {n}; protect fewer or keep more (--no-guard leaves "
            "super experts to their scores)"
        )
    free = [e for e in order if (layer, e) not in must_stay and (layer, e) not in must_go]
    if len(stay) + len(free) < n:
        raise ConfigError(f"layer {layer} cannot keep {n} experts when only {len(stay) + len(free)} are not removed")
    return tuple(sorted(stay + free[: n - len(stay)]))


def _weight_mass(stats: RoutingStats | None, kept: list[tuple[int, ...]]) -> tuple[float, ...]:
    """Per layer the share of routing weight (of counts, where weights are unknown) on experts that stay."""
    if stats is None:
        return ()
    moment = stats.moments.get("weight", stats.moments.get("count"))
    if moment is None:
        return ()
    return tuple(float(moment[i, list(k)].sum() / moment[i].sum().clamp(min=1e-300)) for i, k in enumerate(kept))


def scores_of(plan: PrunePlan) -> Scores:
    """The plan's scores as tensors, NaN where it has none."""
    return [torch.tensor([float("nan") if s is None else s for s in row], dtype=torch.float64) for row in plan.scores]
