"""EvalConfig: what is asked of a quality evaluation. Flags of benchmark.py and files under configs/evaluate/ fill it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from evaluation import mmlu
from evaluation.task import Benchmark
from evaluation.tasks import BENCHMARKS, find
from xmoe.errors import ConfigError

MODES = ("raw", "letter", "generate")
ENGINES = ("native", "lm-eval")


@dataclass(frozen=True)
class EvalConfig:
    """Fields and their flags have the same names.

    benchmark: names, or ("all",). num_fewshot: K; None is each benchmark's custom (MMLU and GSM8K 5, others 0).
    limit: rows of each benchmark (of each subject for MMLU), a seeded random choice unless `first`; None or -1 is all.
    mode: raw (log-likelihood, what the harness does), letter (the letter after a prefilled Harmony final channel) or
    generate (the model thinks, its final channel is parsed); GSM8K is generated in every mode.
    subjects: of MMLU; empty is all 57. max_new_tokens: None is the benchmark's custom. temperature: 0 is argmax.
    prefix_token: auto, bos, eos, none or an id: what an empty context begins with.
    """

    ALIASES: ClassVar[dict[str, str]] = {
        "tasks": "benchmark", "benchmarks": "benchmark", "k_shot": "num_fewshot", "shots": "num_fewshot",
        "num_samples": "limit", "max_tokens": "max_new_tokens", "mmlu_mode": "mode", "prefix": "prefix_token",
    }  # fmt: skip

    benchmark: tuple[str, ...] = ("all",)
    data_dir: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    first: bool = False
    mode: str = "raw"
    engine: str = "native"
    subjects: tuple[str, ...] = ()
    batch_size: int = 8
    max_length: int | None = None
    prefix_token: str = "auto"
    max_new_tokens: int | None = None
    temperature: float = 0.0
    num_experts_per_tok: int | None = None
    reasoning_effort: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("engine", ENGINES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} {getattr(self, name)!r} is unknown; choose {', '.join(allowed)}")
        if not self.benchmark:
            raise ConfigError("no benchmark is named; choose all, or some of " + ", ".join(BENCHMARKS))
        if self.limit is not None and self.limit != -1 and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; expected 1 or more, or -1 for all rows")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot is {self.num_fewshot}; expected 0 or more")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}; expected 0 (argmax) or more")
        for subject in self.subjects:
            if subject not in mmlu.CATEGORY_OF:
                raise ConfigError(f"{_unknown_subject(subject)}")
        if self.engine == "native":
            for benchmark in self.chosen():
                self.shots(benchmark)
                _check_mode(benchmark, self.mode, self.shots(benchmark))

    def chosen(self) -> list[Benchmark]:
        """The benchmarks, each once, in the order given; ConfigError names the nearest where one is unknown."""
        names = [n for name in self.benchmark for n in (BENCHMARKS if name == "all" else [name])]
        if self.benchmark == ("all",) and self.mode != "raw":
            names = [n for n in names if BENCHMARKS[n].kind in ("choice", "generate")]
        return list({b.name: b for b in map(find, names)}.values())

    def shots(self, benchmark: Benchmark) -> int:
        """K for this benchmark; ConfigError where few-shot examples are asked of one that has none."""
        if self.num_fewshot is None or (benchmark.shot is None and len(self.benchmark) + ("all" in self.benchmark) > 1):
            return benchmark.shots_default
        if self.num_fewshot and benchmark.shot is None:
            raise ConfigError(f"{benchmark.name} is zero-shot; leave --num-fewshot out or say 0")
        return self.num_fewshot

    def rows_wanted(self) -> int | None:
        """How many rows at most; None is all."""
        return None if self.limit in (None, -1) else self.limit

    def sent(self) -> dict[str, Any]:
        """The settings on which an answer depends, beside the model: kept answers are valid while these are equal."""
        names = ("mode", "max_length", "prefix_token", "max_new_tokens", "temperature", "num_experts_per_tok",
                 "reasoning_effort")  # fmt: skip
        seed = {"seed": self.seed} if self.temperature else {}
        return {name: getattr(self, name) for name in names} | seed


def _check_mode(benchmark: Benchmark, mode: str, shots: int) -> None:
    if mode == "raw":
        return
    if benchmark.kind not in ("choice", "generate"):
        raise ConfigError(f"{benchmark.name} has no choices to answer with; its only mode is raw")
    if shots and benchmark.name not in ("mmlu", "gsm8k"):
        raise ConfigError(f"{benchmark.name} in mode {mode} is zero-shot; leave --num-fewshot out or say 0")


def _unknown_subject(subject: str) -> str:
    import difflib

    near = difflib.get_close_matches(subject, mmlu.SUBJECTS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"MMLU has no subject {subject!r}{hint}"
