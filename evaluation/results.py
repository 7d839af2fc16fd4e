"""What an evaluation leaves: numbers with error bars and everything needed to repeat them, as JSON and as a table."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from evaluation import averages, mmlu
from evaluation.averages import Estimate
from evaluation.task import Benchmark, Example
from evaluation.tasks import BENCHMARKS
from xmoe.errors import DataError
from xmoe.outputs import new_file

SCHEMA_VERSION = 1
HEADLINE = {  # what the table shows of each benchmark; everything else is in the JSON
    "hellaswag": ("acc", "acc_norm"),
    "lambada": ("acc", "perplexity"),
    "mmlu": ("micro", "macro", *(f"category/{c}" for c in mmlu.CATEGORIES)),
    "winogrande": ("acc",),
    "arc_easy": ("acc", "acc_norm"),
    "arc_challenge": ("acc", "acc_norm"),
    "wikitext": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "gsm8k": ("exact_match", "flexible_match"),
}
PROPORTIONS = ("acc", "acc_norm", "exact_match", "flexible_match", "answered")


def summarise(
    benchmark: Benchmark, examples: Sequence[Example], values: Sequence[dict[str, float]]
) -> dict[str, Estimate]:
    """Metric -> estimate over all rows. `values` are the rows' own, from Benchmark.score."""
    columns = {name: [v[name] for v in values] for name in values[0]}
    if benchmark.kind == "rolling":
        nats = [-x for x in columns["loglikelihood"]]
        per_word, per_byte = averages.rate(nats, columns["words"]), averages.rate(nats, columns["bytes"])
        return {
            "word_perplexity": averages.exponential(per_word),
            "byte_perplexity": averages.exponential(per_byte),
            "bits_per_byte": averages.scaled(per_byte, 1 / math.log(2)),
        }
    metrics = {name: averages.accuracy(columns[name]) for name in PROPORTIONS if name in columns}
    if benchmark.kind == "cloze":
        metrics["perplexity"] = averages.exponential(averages.mean([-x for x in columns["loglikelihood"]]))
    if benchmark.name == "mmlu":
        metrics = _mmlu_averages([e.group for e in examples], columns["acc"]) | {
            name: estimate for name, estimate in metrics.items() if name == "answered"
        }
    return metrics


def _mmlu_averages(subjects: Sequence[str], right: Sequence[float]) -> dict[str, Estimate]:
    by_subject: dict[str, list[float]] = {}
    for subject, value in zip(subjects, right):
        by_subject.setdefault(subject, []).append(value)
    averaged = {
        "micro": averages.accuracy(right),
        "macro": averages.mean_of_groups(list(by_subject.values())),
    }
    for name, members in mmlu.groupings(by_subject).items():
        averaged[name] = averages.accuracy([value for subject in members for value in by_subject[subject]])
    return averaged


@dataclass
class Report:
    """Everything one evaluation found. The keys of the JSON are the fields' names.

    results: benchmark -> metric -> value, stderr, ci95, n. rows: benchmark -> the rows' names and values, in order, so
    that two reports can be compared row by row. data: benchmark -> path, sha256, number of rows and, where a part was
    chosen, `indices`. failed: benchmark -> why.
    """

    model: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    rows: dict[str, dict[str, list]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    command: str = ""
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    schema_version: int = SCHEMA_VERSION

    def add(self, benchmark: Benchmark, examples: Sequence[Example], values: Sequence[dict[str, float]]) -> None:
        """Enter one benchmark's rows and what they average to."""
        summary = summarise(benchmark, examples, values)
        self.results[benchmark.name] = {metric: asdict(estimate) for metric, estimate in summary.items()}
        self.rows[benchmark.name] = {"name": [e.name for e in examples]} | {
            column: [v[column] for v in values] for column in values[0]
        }

    def table(self) -> str:
        """The headline numbers as a Markdown table, with chance and 95 % intervals."""
        lines = [
            "| benchmark | metric | value | ± stderr | 95 % interval | chance | n |",
            "|---|---|--:|--:|---|--:|--:|",
        ]
        for name, metrics in self.results.items():
            known = BENCHMARKS.get(name)
            for metric in HEADLINE.get(name) or metrics:
                if metric in metrics:
                    chance = known.chance if known and metric in (*PROPORTIONS, "micro", "macro") else None
                    if known and metric.startswith("category/"):
                        chance = known.chance
                    lines.append(_table_row(known.title if known else name, metric, metrics[metric], chance))
        for name, reason in self.failed.items():
            lines.append(f"| {name} | failed: {reason} | | | | | |")
        return "\n".join(lines)

    def to_json(self) -> str:
        """JSON with keys in reading order; infinities become the string "inf", which JSON has no number for."""
        order = ("schema_version", "command", "time")
        fields = asdict(self)
        fields = {k: fields[k] for k in order} | {k: v for k, v in fields.items() if k not in order}
        return json.dumps(_finite(fields), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the JSON, whole or not at all."""
        with new_file(path, overwrite) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report; DataError where there is none or it is of another kind."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                f"no report at {path}: {error.strerror}; expected a report.json of a benchmark run"
            ) from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON; expected a report.json of a benchmark run") from error
        if not isinstance(content, dict) or not isinstance(content.get("results"), dict) or "rows" not in content:
            raise DataError(
                f"{path} holds no benchmark results; expected a report.json written by evaluation/benchmark.py"
            )
        if content.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {content.get('schema_version')}; this code reads {SCHEMA_VERSION}"
            )
        known = {name: value for name, value in content.items() if name in cls.__dataclass_fields__}
        return cls(**known)


def _table_row(title: str, metric: str, numbers: dict[str, Any], chance: float | None) -> str:
    low_high = numbers["ci95"]
    interval = "" if low_high is None else f"{_short(low_high[0])} to {_short(low_high[1])}"
    error = "" if numbers["stderr"] is None else _short(numbers["stderr"])
    shown_chance = "" if chance is None else f"{chance:.2f}"
    name = metric.removeprefix("category/")
    return f"| {title} | {name} | {_short(numbers['value'])} | {error} | {interval} | {shown_chance} | {numbers['n']} |"


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def describe_model(model, checkpoint: str = "") -> dict[str, Any]:
    """What was measured: parameter counts, experts, and a hash over every byte of every weight."""
    from xmoe.model.describe import model_parameter_counts

    config = model.config
    total, active = model_parameter_counts(model)
    return {
        "checkpoint": checkpoint,
        "hash": weights_hash(model),
        "parameters": total,
        "active_parameters": active,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
    }


def weights_hash(model) -> str:
    """sha256 (16 hex digits) over names, types, shapes and bytes of all weights, packed ones as they are stored."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def describe_environment(device, dtype) -> dict[str, Any]:
    """Where it was measured."""
    import torch

    import xmoe
    from xmoe.kernels import dispatch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "xmoe": xmoe.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "kernels": dispatch.describe(device, dtype),
    }


def _commit() -> str | None:
    """The checkout's commit; None where there is no git or no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
