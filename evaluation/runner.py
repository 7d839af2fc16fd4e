"""evaluate(): rows -> requests -> answers -> a report, benchmark by benchmark."""

from __future__ import annotations

import functools
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.chat_modes import generated_answers, letter_answers, score_chat
from evaluation.progress import Progress
from evaluation.results import Report, describe_environment, describe_model
from evaluation.rows import load_rows
from evaluation.scoring import Observer, Scorer
from evaluation.settings import EvalConfig
from evaluation.task import Answer, Benchmark, Example
from evaluation.tasks import wikitext_pages
from xmoe.data.tokenizer import check_vocabulary
from xmoe.errors import ConfigError, DataError, XmoeError

PROMPT_VERSION = "lm-evaluation-harness 0.4.13"


def evaluate(
    model,
    tokenizer,
    tasks: Sequence[str] = ("all",),
    *,
    progress: str | Path | None = None,
    observe: Observer | None = None,
    checkpoint: str = "",
    plan: str | None = None,
    on_example: Callable[[Benchmark, Example, Sequence[Answer], dict[str, float]], None] | None = None,
    **settings: Any,
) -> Report:
    """Score a model and return a :class:`~evaluation.results.Report`; `report.table()` is its Markdown table.

    Args:
        tasks: names of benchmarks, or ("all",).
        settings: fields of :class:`~evaluation.settings.EvalConfig`: limit, num_fewshot, data_dir, mode, ...
        progress: a file that keeps answers while the run goes on; a later call with the same model continues from it.
        observe: called with (layer, Routing) of real tokens, output norms included.
        checkpoint, plan: names for the report; a plan is expected to be in force already.
        on_example: called with every example, its answers and its values, in row order.

    Raises:
        XmoeError: a mistake that concerns every benchmark, or the only one asked for. When one of several fails, the
            others go on and `report.failed` says why.
    """
    config = EvalConfig(benchmark=(tasks,) if isinstance(tasks, str) else tuple(tasks), **settings)
    if config.engine != "native":
        raise ConfigError(
            "evaluate() runs the native engine; evaluation.harness.evaluate_with_harness runs lm-eval's tasks"
        )
    if tokenizer is None:
        raise ConfigError(
            "the checkpoint has no tokenizer.json, so no text can be scored; put its tokenizer beside the weights"
        )
    check_vocabulary(tokenizer, model.config.vocab_size)
    scorer = make_scorer(model, tokenizer, config, observe)
    report = Report(
        model=describe_model(model, checkpoint) | {"plan": plan},
        environment=describe_environment(model.device, model.embed.weight.dtype),
        protocol=_protocol(config, scorer),
    )
    kept = None
    if progress is not None:
        identity = {"model": report.model["hash"], "plan": plan, "tokenizer": tokenizer.fingerprint}
        dtype = report.environment["dtype"]
        kept = Progress(progress, identity | {"dtype": dtype, "max_length": scorer.max_length} | config.sent())
        if kept.resumed:
            print(f"continuing: {kept.resumed} examples were answered before", file=sys.stderr)
        elif kept.started_over:
            print(f"{progress} is of another model or other settings; starting over", file=sys.stderr)
    errors: list[Exception] = []

    def attempt(benchmark: Benchmark, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            errors.append(error)
            if not isinstance(error, XmoeError):
                traceback.print_exc()
            report.failed[benchmark.name] = str(error) or type(error).__name__
            return None

    try:
        # All rows are read before the first is scored: a missing file shows at once, not after an hour.
        loaded = [(b, attempt(b, functools.partial(load_examples, b, config))) for b in config.chosen()]
        for benchmark, found in loaded:
            if found is not None:
                work = functools.partial(_run, benchmark, *found, config, scorer, kept, report, on_example)
                attempt(benchmark, work)
    except KeyboardInterrupt:
        if kept is None:
            raise
        kept.close(remove=False)
        raise KeyboardInterrupt(
            f"{len(kept)} answers are in {kept.path}; the same command continues from there"
        ) from None
    report.protocol["tokens_computed"] = scorer.tokens_computed
    if kept is not None:
        kept.close(remove=not errors)
    if not report.results and errors and isinstance(errors[0], XmoeError):
        raise errors[0]
    return report


def make_scorer(model, tokenizer, config: EvalConfig, observe: Observer | None = None) -> Scorer:
    """The scorer that the settings ask for."""
    from xmoe.generation.generate import experts_per_token

    has_table = model.config.reasoning_effort is not None  # elsewhere effort is a line of Harmony's system message
    effort = config.reasoning_effort if has_table else None
    return Scorer(
        model,
        tokenizer,
        batch_size=config.batch_size,
        max_length=config.max_length,
        prefix=config.prefix_token,
        num_experts_per_tok=experts_per_token(model.config, config.num_experts_per_tok, effort),
        observe=observe,
        norms=observe is not None,
    )


def load_examples(benchmark: Benchmark, config: EvalConfig) -> tuple[list[Example], dict[str, Any]]:
    """The chosen examples in row order, and the report's entry on their data."""
    rows, source = load_rows(benchmark.name, benchmark.location, "eval", config.data_dir)
    data: dict[str, Any] = source.as_dict()
    if benchmark.kind == "rolling":
        rows = wikitext_pages(rows)
        data["pages"] = len(rows)
    shots = config.shots(benchmark)
    few_shot = None
    if shots:
        shot_rows, shot_source = load_rows(benchmark.name, benchmark.location, "fewshot", config.data_dir)
        few_shot = benchmark.few_shot(shot_rows, shots)
        data["fewshot"] = shot_source.as_dict()
    examples = benchmark.examples(rows, few_shot)
    if benchmark.name == "mmlu" and config.subjects:
        examples = [e for e in examples if e.group in config.subjects]
        if not examples:
            raise DataError(f"{source.path} has no rows of {', '.join(config.subjects)}")
    indices = choose(examples, config.rows_wanted(), config.seed, config.first)
    if len(indices) < len(examples):
        data["indices"] = [examples[i].name for i in indices]
    return [examples[i] for i in indices], data


def choose(examples: Sequence[Example], limit: int | None, seed: int, first: bool) -> list[int]:
    """Which examples to score, ascending: all, the first `limit` of each group, or a random choice of as many.

    Random by default because files are sorted: HellaSwag's first 3,240 rows are all of one source. A group's choice
    depends on the seed and its name only, so adding subjects changes no other subject.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.group, []).append(i)
    chosen: list[int] = []
    for group, members in groups.items():
        if limit is None or limit >= len(members):
            chosen += members
        elif first:
            chosen += members[:limit]
        else:
            chosen += random.Random(f"{seed} {group}").sample(members, limit)
    return sorted(chosen)


def _run(
    benchmark: Benchmark,
    examples: list[Example],
    data: dict[str, Any],
    config: EvalConfig,
    scorer: Scorer,
    kept: Progress | None,
    report: Report,
    on_example,
) -> None:
    answers: list[Sequence[Answer] | None] = [
        None if kept is None else kept.answers(benchmark.name, e) for e in examples
    ]
    missing = [i for i, known in enumerate(answers) if known is None]
    computed, cut, started = scorer.tokens_computed, scorer.requests_cut, time.perf_counter()
    for number, said in answer(benchmark, [examples[i] for i in missing], scorer, config):
        answers[missing[number]] = said
        if kept is not None:
            kept.add(benchmark.name, examples[missing[number]], said)
    seconds = time.perf_counter() - started
    in_chat = config.mode != "raw" and benchmark.kind == "choice"
    values = [(score_chat(e, a, config.mode) if in_chat else benchmark.score(e, a)) for e, a in zip(examples, answers)]
    if on_example is not None:
        for example, said, value in zip(examples, answers, values):
            on_example(benchmark, example, said, value)
    report.add(benchmark, examples, values)
    report.data[benchmark.name] = data
    report.seconds[benchmark.name] = seconds
    if missing:
        report.tokens_per_second[benchmark.name] = (scorer.tokens_computed - computed) / seconds
    entry = report.protocol["benchmarks"][benchmark.name]
    entry |= {
        "examples_per_second": len(missing) / seconds if missing else None,
        "resumed_examples": len(examples) - len(missing),
    }
    entry["requests_cut_on_the_left"] = scorer.requests_cut - cut
    if scorer.requests_cut > cut:
        print(
            f"{benchmark.name}: {scorer.requests_cut - cut} requests were longer than --max-length {scorer.max_length} and "
            "lost their beginning",
            file=sys.stderr,
        )


def answer(
    benchmark: Benchmark, examples: Sequence[Example], scorer: Scorer, config: EvalConfig
) -> Iterator[tuple[int, list[Answer]]]:
    """(number, answers to all its requests) of every example, as they are complete."""
    if benchmark.kind == "generate" or config.mode == "generate":
        yield from generated_answers(benchmark, examples, scorer, config)
    elif config.mode == "letter":
        yield from letter_answers(benchmark, examples, scorer, config)
    elif benchmark.kind == "rolling":
        for number, said in scorer.score_rolling([e.requests[0].continuation for e in examples]):
            yield number, [said]
    else:
        yield from _by_example(
            [len(e.requests) for e in examples], scorer.score([r for e in examples for r in e.requests])
        )


def _by_example(counts: Sequence[int], scored: Iterator[tuple[int, Answer]]) -> Iterator[tuple[int, list[Answer]]]:
    """Collect answers to requests, which come in any order, into answers to examples."""
    owner = [(example, place) for example, count in enumerate(counts) for place in range(count)]
    waiting: dict[int, dict[int, Answer]] = {}
    for number, said in scored:
        example, place = owner[number]
        got = waiting.setdefault(example, {})
        got[place] = said
        if len(got) == counts[example]:
            yield example, [got[i] for i in range(counts[example])]
            del waiting[example]


def _protocol(config: EvalConfig, scorer: Scorer) -> dict[str, Any]:
    """Everything a reader must know to get the same numbers, beside data and model."""
    settings = asdict(config)
    chosen = config.rows_wanted()
    return {
        "engine": config.engine,
        "mode": config.mode,
        "selection": "all rows" if chosen is None else f"first {chosen}" if config.first else f"{chosen} at random",
        "selection_is_per_subject": "mmlu" in [b.name for b in config.chosen()],
        "max_length": scorer.max_length,
        "prefix_token": scorer.prefix,
        "window": scorer.max_length,
        "stride": scorer.max_length,
        "settings": settings,
        "benchmarks": {
            b.name: {
                "prompts": PROMPT_VERSION if config.mode == "raw" else f"xmoe {config.mode} 1",
                "num_fewshot": config.shots(b),
                "normalisation": {"choice": "acc_norm per character", "rolling": "per word and byte of the page"}.get(
                    b.kind
                ),
            }
            for b in config.chosen()
        },
    }
