"""Which experts does a domain use? Rankings, their overlap and coverage; and the published data of gpt-oss-20b.

The fingerprint format (github.com/AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting) is a folder with `map.json`
({dataset: {category: {"<Finished>_<Repetition>": {"sample_count", "summary_file_path"}}}}) and one summary for each entry:
`sample_count` and, for the thinking and perhaps the answer, {"layer_L": {"E": {"prob_density", "count_frequency"}}}, means
over samples of what a token of the span chose. Experts that were never chosen are absent.

Score of an expert in a domain, as published: sum over files of w (f_think + f_answer) / 2 over sum of w * parts, where w is
the number of samples and parts 1 or 2. Imported statistics hold the two sums (doubled) as `count` and `tokens`, so they
add up over domains like recorded ones; count / tokens is how often an average token chose the expert.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from xmoe.compression.criteria import activation_scores, ranked
from xmoe.compression.routing import RoutingStats
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import DataError
from xmoe.model.transformer import Transformer

PARTS = ("think_expert_analytics", "answer_expert_analytics")
Ranking = list[list[int]]
"""Expert ids, best first, for each layer."""


def import_fingerprint(
    folder: str | Path,
    categories: Sequence[str] | None = None,
    *,
    domain: str = "",
    num_experts: int = 32,
    num_experts_per_tok: int = 4,
) -> RoutingStats:
    """Statistics of the summaries in `folder` (that with map.json), or of some "dataset/category" of it.

    They hold `count` alone, so they serve frequency and share; other criteria say what they lack.

    Raises:
        DataError: no map, an unknown category, a summary that is missing or malformed.
    """
    folder = Path(folder)
    index = _read(folder / "map.json")
    known = {f"{dataset}/{category}": groups for dataset, some in index.items() for category, groups in some.items()}
    wanted = list(known) if categories is None else list(categories)
    if unknown := [c for c in wanted if c not in known]:
        raise DataError(f"{folder / 'map.json'} has no {unknown[0]!r}; it has {', '.join(sorted(known)[:6])}, ...")
    total: Tensor | None = None
    weight = 0.0
    for entry in (entry for c in wanted for entry in known[c].values()):
        summary = _read(folder / entry["summary_file_path"])
        samples = summary.get("sample_count")
        parts = [summary[name] for name in PARTS if summary.get(name)]
        if not isinstance(samples, int) or not parts:
            raise DataError(f"{folder / entry['summary_file_path']} has no sample_count or no expert analytics")
        table = sum(_frequencies(part, num_experts, folder / entry["summary_file_path"]) for part in parts)
        total = samples * table if total is None else _add(total, samples * table, folder)
        weight += samples * len(parts)
    if total is None:
        raise DataError(f"{folder} holds no summaries to import")
    layers = total.shape[0]
    return RoutingStats(
        moments={"count": total},
        num_experts=(num_experts,) * layers,
        num_experts_per_tok=num_experts_per_tok,
        tokens=weight,
        domain=domain or (categories[0] if categories and len(categories) == 1 else "all"),
    )


def _add(a: Tensor, b: Tensor, folder: Path) -> Tensor:
    if a.shape != b.shape:
        raise DataError(f"{folder} mixes summaries of {a.shape[0]} and {b.shape[0]} layers")
    return a + b


def _frequencies(part: dict, num_experts: int, file: Path) -> Tensor:
    """count_frequency of one span as float64 [layers, experts], 0 where a file is silent."""
    table = torch.zeros(len(part), num_experts, dtype=torch.float64)
    try:
        for layer, experts in part.items():
            for e, values in experts.items():
                table[int(layer.removeprefix("layer_")), int(e)] = values["count_frequency"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise DataError(f"{file} is no fingerprint summary of {num_experts} experts: {type(e).__name__} {e}") from None
    return table


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(f"cannot read {file}: {e.strerror}; expected a folder of fingerprint summaries") from None
    except ValueError as e:
        raise DataError(f"{file} is no JSON: {e}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} is no JSON object")
    return content


# ----------------------------------------------------------------------------------------------------------- rankings


def ranking_of(stats: RoutingStats, criterion: str = "frequency") -> Ranking:
    """Experts of each layer, best first."""
    return [ranked(row) for row in activation_scores(stats, criterion)]


def interleave(first: Ranking, second: Ranking) -> Ranking:
    """first[0], second[0], first[1], second[1], ... without repeats: how the published topic rankings mix in the general
    one. A "topic top 20" of theirs is therefore about half topic and half general.
    """
    mixed = []
    for a, b in zip(first, second):
        mixed.append(list(dict.fromkeys(e for pair in zip(a, b) for e in pair)))
    return mixed


def load_ranking(file: str | Path) -> Ranking:
    """A published ranking: {"layer_L": [ids, best first]}."""
    content = _read(Path(file))
    try:
        return [[int(e) for e in content[f"layer_{i}"]] for i in range(len(content))]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{file} is no ranking; expected layer_0, layer_1, ... with lists of expert ids") from None


def overlap(first: Ranking, second: Ranking, top: int) -> float:
    """Mean over layers of the share of the first `top` experts that two rankings have in common."""
    return sum(len(set(a[:top]) & set(b[:top])) / top for a, b in zip(first, second)) / len(first)


def coverage(stats: RoutingStats, ranking: Ranking, top: int) -> float:
    """Share of a domain's routings that the first `top` experts of a ranking serve, mean over layers."""
    shares = []
    for layer, order in enumerate(ranking):
        count = stats.layer(layer).count
        shares.append(float(count[order[:top]].sum() / count.sum().clamp(min=1e-300)))
    return sum(shares) / len(shares)


# -------------------------------------------------------------------------------------------------------------- traces


class Trace(NamedTuple):
    """Routing of one generation, token by token, as decoding saw it.

    indices: int64 [T, layers, K]; weights: float [T, layers, K]; row t is the token at position `first + t`. `length` is
    that of the whole sequence, `answer` the position of the token that ends the thinking, or -1 where there is no answer.
    """

    indices: Tensor
    weights: Tensor
    first: int
    length: int
    answer: int


class Span(NamedTuple):
    """count_frequency and prob_density, float64 [layers, experts], and the span's length in tokens."""

    count_frequency: Tensor
    prob_density: Tensor
    tokens: int


def summarize(trace: Trace, num_experts: int) -> tuple[Span, Span | None]:
    """The thinking's and the answer's summary of a trace, by the published rules.

    The thinking starts two tokens before the first generated one (the role tag, which has no routing) and both are divided
    by their whole length, so a layer's frequencies sum to a little less than K.
    """
    start = trace.first - 2
    think = _span(trace, start, trace.length if trace.answer < 0 else trace.answer, num_experts)
    return think, None if trace.answer < 0 else _span(trace, trace.answer + 1, trace.length, num_experts)


def _span(trace: Trace, start: int, stop: int, num_experts: int) -> Span:
    rows = slice(max(0, start - trace.first), max(0, stop - trace.first))
    indices, weights = trace.indices[rows], trace.weights[rows].double()
    layers = trace.indices.shape[1]
    counts = torch.zeros(layers, num_experts, dtype=torch.float64)
    mass = torch.zeros_like(counts)
    for layer in range(layers):
        chosen = indices[:, layer].reshape(-1)
        counts[layer] = torch.bincount(chosen, minlength=num_experts)
        mass[layer] = torch.bincount(chosen, weights[:, layer].reshape(-1), minlength=num_experts)
    length = stop - start
    return Span(counts / length, mass / length, length)


def trace_text(model: Transformer, tokenizer: Tokenizer, text: str) -> dict:
    """One text through the model, for a file: `tokens` (as text), and each token's experts, best first, and their weights.

    indices and weights are lists [T][layers][K].
    """
    ids = tokenizer.encode(text)
    if not ids:
        raise DataError("there is no text to trace")
    with torch.no_grad():
        routing = model.features(torch.tensor([ids], device=model.device)).routing
    return {
        "text": text,
        "tokens": [tokenizer.decode([i]) for i in ids],
        "indices": torch.stack([r.indices for r in routing], dim=1).tolist(),
        "weights": torch.stack([r.weights for r in routing], dim=1).tolist(),
    }


def report(stats: Sequence[RoutingStats], tops: Sequence[int] = (8, 16, 20, 24)) -> dict:
    """Rankings, overlaps and coverages of several domains, as data that a report page can draw.

    overlap[top][a][b]: share of the first `top` experts that a and b have in common; coverage[top][a][b]: share of a's
    routings that the first `top` of b's ranking serve. Sizes that are no part of a layer are left out.

    Raises:
        DataError: two domains of one name, statistics of different models, or no size that fits.
    """
    named = {s.domain or f"domain {i}": s for i, s in enumerate(stats)}
    if len(named) < len(stats):
        raise DataError("two of the statistics have the same domain; record them with --domain NAME")
    if len({s.num_experts for s in stats}) > 1 or len({s.model for s in stats if s.model}) > 1:
        raise DataError("the statistics are of different models, whose experts have nothing in common")
    fewest = min(stats[0].num_experts)
    tops = [top for top in tops if top <= fewest]
    if not tops:
        raise DataError(f"layers have {fewest} experts, fewer than any size asked for; give --top")
    rankings = {name: ranking_of(s) for name, s in named.items()}
    return {
        "schema_version": 1,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": next((s.model for s in stats if s.model), ""),
        "tokens": {name: s.tokens for name, s in named.items()},
        "rankings": rankings,
        "load": {
            name: (s.moments["count"] / s.moments["count"].sum(1, keepdim=True)).tolist() for name, s in named.items()
        },
        "overlap": {
            str(top): {a: {b: overlap(rankings[a], rankings[b], top) for b in named} for a in named} for top in tops
        },
        "coverage": {
            str(top): {a: {b: coverage(named[a], rankings[b], top) for b in named} for a in named} for top in tops
        },
    }
