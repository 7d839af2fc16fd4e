"""Two reports on the same rows, row against row.

Two runs share their rows, so most of the luck of the draw cancels: the paired error of a difference is several times
smaller than the two separate error bars suggest, and a point of accuracy can be real where free bars overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation import averages
from evaluation.averages import Estimate
from evaluation.results import PROPORTIONS, Report
from xmoe.errors import DataError


@dataclass(frozen=True)
class Difference:
    """One metric of two runs. change: b - a with its paired bootstrap error; for 0/1 metrics McNemar's counts and p."""

    benchmark: str
    metric: str
    a: float
    b: float
    change: Estimate
    only_a: int | None = None
    only_b: int | None = None
    p_value: float | None = None


def compare(a: Report, b: Report, seed: int = 0) -> list[Difference]:
    """Every metric of every benchmark that both reports have, over the same rows.

    Raises:
        DataError: no common benchmark; or one that was run on other rows, data or rules.
    """
    shared = [name for name in a.results if name in b.results]
    if not shared:
        raise DataError(f"the reports share no benchmark: {', '.join(a.results)} against {', '.join(b.results)}")
    return [d for name in shared for d in _compare_benchmark(name, a, b, seed)]


def _compare_benchmark(name: str, a: Report, b: Report, seed: int) -> list[Difference]:
    _check_same(name, a, b)
    rows_a, rows_b = a.rows[name], b.rows[name]
    found = []
    for metric in PROPORTIONS:
        if metric in rows_a and metric in rows_b:
            x, y = rows_a[metric], rows_b[metric]
            only_a, only_b, p = averages.mcnemar(x, y)
            change = averages.paired_bootstrap(x, y, seed=seed)
            found.append(Difference(name, metric, _mean(x), _mean(y), change, only_a, only_b, p))
    if "loglikelihood" in rows_a and "loglikelihood" in rows_b:
        found += _compare_likelihoods(name, rows_a, rows_b, seed)
    return found


def _check_same(name: str, a: Report, b: Report) -> None:
    if not a.rows[name]["name"]:
        raise DataError(f"{name}: the reports hold no rows to pair; those of --engine lm-eval cannot be compared")
    if a.rows[name]["name"] != b.rows[name]["name"]:
        raise DataError(
            f"{name}: the reports are on different rows; run both with the same --limit, --seed and --first"
        )
    if a.data[name].get("sha256") != b.data[name].get("sha256"):
        raise DataError(f"{name}: the reports are on different data ({a.data[name]['path']}, {b.data[name]['path']})")
    for key in ("mode", "max_length"):
        if a.protocol.get(key) != b.protocol.get(key):
            raise DataError(
                f"{name}: {key} is {a.protocol.get(key)} in one report and {b.protocol.get(key)} in the other"
            )
    shots = [r.protocol.get("benchmarks", {}).get(name, {}).get("num_fewshot") for r in (a, b)]
    if shots[0] != shots[1]:
        raise DataError(f"{name}: {shots[0]}-shot in one report and {shots[1]}-shot in the other")


def _compare_likelihoods(name: str, rows_a: dict[str, list], rows_b: dict[str, list], seed: int) -> list[Difference]:
    """Nats a row, word and byte; their difference is the logarithm of the ratio of perplexities."""
    x, y = ([-float(v) for v in rows["loglikelihood"]] for rows in (rows_a, rows_b))
    found = []
    units: dict[str, Sequence[float]] = {"nats_per_word": [1.0] * len(x)}
    if "words" in rows_a:
        units = {"nats_per_word": rows_a["words"], "nats_per_byte": rows_a["bytes"]}
    for metric, weights in units.items():

        def change(rows: Sequence[int], weights: Sequence[float] = weights) -> float:
            return math.fsum(y[i] - x[i] for i in rows) / math.fsum(weights[i] for i in rows)

        total = math.fsum(weights)
        found.append(
            Difference(
                name, metric, math.fsum(x) / total, math.fsum(y) / total, averages.bootstrap(len(x), change, seed=seed)
            )
        )
    return found


def table(differences: Sequence[Difference]) -> str:
    """A Markdown table; `right only in` counts the rows behind McNemar's p."""
    lines = [
        "| benchmark | metric | A | B | B - A | 95 % interval | right only in A, B | p |",
        "|---|---|--:|--:|--:|---|---|--:|",
    ]
    for d in differences:
        interval = "" if d.change.ci95 is None else f"{d.change.ci95[0]:+.4f} to {d.change.ci95[1]:+.4f}"
        counts = "" if d.only_a is None else f"{d.only_a}, {d.only_b}"
        p = "" if d.p_value is None else f"{d.p_value:.2g}"
        lines.append(
            f"| {d.benchmark} | {d.metric} | {d.a:.4f} | {d.b:.4f} | {d.change.value:+.4f} | {interval} | {counts} | {p} |"
        )
    return "\n".join(lines)


def as_dicts(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """For --json."""
    return [asdict(d) for d in differences]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
