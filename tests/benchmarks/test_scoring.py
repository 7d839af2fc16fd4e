"""The scoring benchmark's comparison of engines: differences, predictions, and the ratio to the peer's best batch size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[2] / "benchmarks" / "scoring.py"
spec = importlib.util.spec_from_file_location("scoring_benchmark", PATH)
scoring = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scoring)


def reading(engine: str, batch: int, seconds: float, answers: list[list[float]]) -> dict:
    return {
        "engine": engine, "batch": batch, "peak_bytes": 2_500_000_000, "seconds": {"mmlu": seconds},
        "rows": {"mmlu": 8}, "answers": {"mmlu": answers},
    }  # fmt: skip


def test_differences_and_predictions():
    ours = reading("xmoe", 8, 1.0, [[-1.0, -2.0], [-3.0, -2.5]])
    theirs = reading("HFLM", 1, 1.0, [[-1.0, -2.25], [-2.5, -3.0]])
    assert scoring._against(ours, theirs) == {"mmlu": {"largest_difference": 0.5, "predictions_differ": 1}}
    assert scoring._against(ours, ours)["mmlu"] == {"largest_difference": 0.0, "predictions_differ": 0}


def test_speed_is_relative_to_the_peers_best_batch_size():
    readings = [reading("xmoe", 8, 1.0, [[0.0]]), reading("HFLM", 1, 6.0, [[0.0]]), reading("HFLM", 8, 9.0, [[0.0]])]
    table = scoring._table(readings, [scoring._against(readings[0], r) for r in readings])
    assert "| xmoe | 8 | 8.00 | 6.00x |" in table and "| HFLM | 8 | 0.89 | 0.67x |" in table
    assert table.endswith("2.50 |")


def test_the_best_round_counts_and_the_largest_memory():
    slow, fast = reading("xmoe", 8, 3.0, [[0.0]]), reading("xmoe", 8, 1.0, [[0.0]]) | {"peak_bytes": 9}
    best = scoring._best((slow, fast))
    assert best["seconds"] == {"mmlu": 1.0} and best["seconds_of_rounds"] == {"mmlu": [3.0, 1.0]}
    assert best["peak_bytes"] == slow["peak_bytes"] and best["answers"] == slow["answers"]
