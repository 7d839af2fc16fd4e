"""Adapter to the lm-evaluation-harness: our models, our scorer, its tasks. Optional; imported late.

Worth having twice: for the hundreds of tasks we do not own, and as a referee of those we do. The harness's `LM` asks for
log-likelihoods, rolling log-likelihoods and generated text; each is handed to the same scorer that the native engine uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.averages import NORMAL_95
from evaluation.chat_modes import end_tokens, plain_text
from evaluation.results import Report, describe_environment, describe_model
from evaluation.rows import load_rows
from evaluation.runner import make_scorer
from evaluation.scoring import Scorer
from evaluation.settings import EvalConfig
from evaluation.task import HARNESS_SEED, Benchmark, Request
from evaluation.tasks import ALIASES, find, wikitext_pages
from xmoe.data.tokenizer import check_vocabulary
from xmoe.errors import ConfigError
from xmoe.generation.generate import generate

TESTED_VERSION = "0.4.13"
THEIR_YAML = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "wikitext": "wikitext/wikitext.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
THEIR_NAME = {ours: theirs for theirs, ours in ALIASES.items() if theirs == "lambada_openai"}


def adapter(scorer: Scorer, seed: int = 0):
    """An instance of the harness's `LM` over `scorer`; pass it as `simple_evaluate(model=...)`.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    _require()
    from lm_eval.api.model import LM

    class ScorerLM(LM):
        """Answers the harness's requests; it encodes nothing itself, since the scorer's rules are the harness's own."""

        tokenizer_name = "xmoe"

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            answers = scorer.loglikelihoods([Request(*r.args) for r in requests])
            return [(a.loglikelihood, a.is_greedy) for a in answers]

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            return [a.loglikelihood for a in scorer.rolling([r.args[0] for r in requests])]

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            return _generate(scorer, [r.args for r in requests], seed)

    return ScorerLM()


def _generate(scorer: Scorer, requests: Sequence[tuple[str, dict[str, Any]]], seed: int) -> list[str]:
    """Text for each (context, settings); requests with equal settings share batches, the longest first."""
    groups: dict[str, list[int]] = {}
    for i, (_, settings) in enumerate(requests):
        groups.setdefault(repr(sorted(settings.items(), key=str)), []).append(i)
    texts = [""] * len(requests)
    for members in groups.values():
        settings = requests[members[0]][1]
        until = settings.get("until") or []
        stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
        new_tokens = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256)
        if new_tokens >= scorer.max_length:
            raise ConfigError(
                f"the task generates {new_tokens} tokens, which leaves no room in max_length {scorer.max_length}"
            )
        sampled = bool(settings.get("do_sample")) and float(settings.get("temperature", 1.0)) > 0
        prompts = [scorer.tokenizer.encode(requests[i][0])[-(scorer.max_length - new_tokens) :] for i in members]
        order = sorted(range(len(members)), key=lambda j: -len(prompts[j]))
        completions = generate(
            scorer.model,
            scorer.tokenizer,
            [prompts[j] for j in order],
            batch_size=scorer.batch_size,
            max_new_tokens=new_tokens,
            stop=stop,
            stop_tokens=end_tokens(scorer),
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            seed=seed,
            num_experts_per_tok=scorer.num_experts_per_tok,
        )
        for j, completion in zip(order, completions):
            texts[members[j]] = plain_text(scorer.tokenizer, completion.ids, stop)
    return texts


def evaluate_with_harness(
    model, tokenizer, config: EvalConfig, *, checkpoint: str = "", plan: str | None = None
) -> Report:
    """Run the harness's tasks named in `config.benchmark` and put its numbers into our report.

    `limit` takes the first rows, as the harness does. The harness fetches its own data; `data_dir` is not used.

    Raises:
        ConfigError: lm-eval is not installed, a task it does not have, a setting only the native engine knows.
    """
    _require()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    check_vocabulary(tokenizer, model.config.vocab_size)
    for name in ("data_dir", "subjects"):
        if getattr(config, name):
            raise ConfigError(f"--{name.replace('_', '-')} is for the native engine; the harness finds its own data")
    if config.mode != "raw":
        raise ConfigError(
            f"--mode {config.mode} is for the native engine; the harness has tasks of its own for chat models"
        )
    manager = TaskManager()
    names = [THEIR_NAME.get(name, name) for name in config.benchmark]
    _check_tasks(names, manager.all_tasks)
    scorer = make_scorer(model, tokenizer, config)
    found = simple_evaluate(
        model=adapter(scorer, seed=config.seed),
        tasks=names,
        num_fewshot=config.num_fewshot,
        limit=config.rows_wanted(),
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=HARNESS_SEED,
        task_manager=manager,
        log_samples=False,
    )
    return _report(found, model, scorer, config, checkpoint, plan)


def task_on_files(name: str, data_dir: str, max_new_tokens: int | None = None):
    """The harness's built-in task of benchmark `name`, with the rows under `data_dir` in place of its download.

    name: of one of our benchmarks, or `mmlu/SUBJECT`. max_new_tokens: in place of the task's own. For checks of the two
    engines against each other; uses parts of the harness that are not its public interface.
    """
    _require()
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    name, _, subject = name.partition("/")
    benchmark = find(name)
    yaml = f"mmlu/default/mmlu_{subject}.yaml" if subject else THEIR_YAML[benchmark.name]
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / yaml)
    split = config.get("test_split") or config["validation_split"]
    # A task that is zero-shot by custom may come without the rows to draw examples from.
    shots = benchmark.shots_default
    roles = {split: "eval"} | ({"dev" if subject else "train": "fewshot"} if shots else {})
    tables = datasets.DatasetDict(
        {s: datasets.Dataset.from_list(_their_rows(benchmark, role, data_dir, subject)) for s, role in roles.items()}
    )
    config |= {
        "dataset_path": None,
        "dataset_name": None,
        "training_split": None,
        "validation_split": None if config.get("test_split") else split,
        "fewshot_split": list(roles)[1] if shots else None,
        "num_fewshot": shots,
        "custom_dataset": lambda **_: tables,
    }
    if benchmark.kind == "generate" and max_new_tokens is not None:
        config["generation_kwargs"] = config["generation_kwargs"] | {"max_gen_toks": max_new_tokens}
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(HARNESS_SEED)
    return task


def _their_rows(benchmark: Benchmark, role: str, data_dir: str, subject: str) -> list[dict[str, Any]]:
    """Rows of our files with the fields of the hub's tables, which the harness expects."""
    rows, _ = load_rows(benchmark.name, benchmark.location, role, data_dir)
    if benchmark.kind == "rolling":
        return [{"page": row.text("page")} for row in wikitext_pages(rows)]
    if not subject:
        return [{k: str(v) if k == "label" else v for k, v in row.fields.items()} for row in rows]
    return [
        {"question": e.question, "choices": list(e.choices), "answer": e.gold}
        for e in benchmark.examples(rows)
        if e.group == subject
    ]


def _report(found: dict, model, scorer: Scorer, config: EvalConfig, checkpoint: str, plan: str | None) -> Report:
    report = Report(
        model=describe_model(model, checkpoint) | {"plan": plan},
        environment=describe_environment(model.device, model.embed.weight.dtype) | {"lm_eval": _version()},
        protocol={
            "engine": "lm-eval",
            "mode": "raw",
            "selection": f"first {config.limit}" if config.rows_wanted() else "all rows",
            "max_length": scorer.max_length,
            "prefix_token": scorer.prefix,
            "num_fewshot": dict(found.get("n-shot", {})),
            "task_versions": dict(found.get("versions", {})),
            "requests_cut_on_the_left": scorer.requests_cut,
            "tokens_computed": scorer.tokens_computed,
        },
    )
    counts = found.get("n-samples", {})
    for task, numbers in found["results"].items():
        n = counts.get(task, {}).get("effective") or numbers.get("sample_len")
        report.results[task] = harness_metrics(numbers, n)
        report.data[task] = {"path": "the harness's own", "sha256": None, "rows": n}
        report.rows[task] = {"name": []}
    return report


def harness_metrics(numbers: dict[str, Any], n: int | None) -> dict[str, dict[str, Any]]:
    """`acc,none`: .3, `acc_stderr,none`: .01 -> acc: value, stderr, ci95, n; a filter other than `none` joins the name."""
    metrics = {}
    for key, value in numbers.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = numbers.get(f"{metric}_stderr,{filter_}")
        error = float(error) if isinstance(error, (int, float)) else None
        ci = None if error is None else (value - NORMAL_95 * error, value + NORMAL_95 * error)
        name = metric if filter_ == "none" else f"{metric}/{filter_}"
        metrics[name] = {"value": float(value), "stderr": error, "ci95": ci, "n": n}
    return metrics


def _check_tasks(names: Sequence[str], known: Sequence[str]) -> None:
    import difflib

    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"; did you mean {', '.join(near)}?" if near else "; `lm-eval ls tasks` lists them"
            raise ConfigError(f"the harness has no task {name!r}{hint}")


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--engine lm-eval needs the harness; pip install lm-eval=={TESTED_VERSION}") from error


def _version() -> str:
    from importlib.metadata import version

    return version("lm-eval")
