"""The door for quality: HellaSwag, LAMBADA, MMLU, WinoGrande, ARC, WikiText, GSM8K -> one JSON report."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xmoe import command
from xmoe.errors import ConfigError
from xmoe.outputs import check_free, new_file

EXAMPLE = "python evaluation/benchmark.py --checkpoint checkpoints/light --benchmark hellaswag,mmlu --limit 500 --data-dir data"
# flag -> how its text becomes a value of EvalConfig; None leaves a field to --config and the default
FLAGS: tuple[tuple[str, type, str, str], ...] = (
    ("--num-fewshot", int, "K", "few-shot examples (default: MMLU and GSM8K 5, others 0)"),
    ("--limit", int, "N", "rows of each benchmark (of each MMLU subject), a seeded random choice; -1 is all"),
    ("--data-dir", str, "DIR", "holds <benchmark>/ folders of JSONL, CSV or Parquet; without it: the datasets library"),
    ("--mode", str, "raw|letter|generate", "log-likelihood; letter after a Harmony final channel; generated answer"),
    ("--engine", str, "native|lm-eval", "lm-eval hands the model to the harness, for every other task"),
    ("--batch-size", int, "B", "rows of a batch at most (default: 8)"),
    ("--max-length", int, "N", "tokens the model sees at once (default: what it was made for, 4096 at most)"),
    ("--prefix-token", str, "auto|bos|eos|none|ID", "what an empty context begins with"),
    ("--max-new-tokens", int, "N", "when generating (default: the benchmark's custom)"),
    ("--temperature", float, "T", "when generating; 0, the default, is argmax"),
    ("--num-experts-per-tok", int, "K", "experts each token visits, in place of the model's own"),
    ("--reasoning-effort", str, "low|medium|high", "of chat models, or of a small variant's table of experts"),
)


def main(argv: list[str] | None = None) -> int:
    """Parse, load, score, write. Exit 0, or 1 where a benchmark failed (the others' results are saved)."""
    args = _parser().parse_args(argv)
    if args.compare:
        return _compare(args)
    from evaluation.settings import EvalConfig
    from xmoe.config import load_config

    try:
        config = load_config(EvalConfig, args.config, [*_overrides(args), *args.set])
    except ConfigError as error:  # flags travel as overrides; who gave no --set should not read of one
        raise ConfigError(str(error).removeprefix("" if args.set else "--set: ")) from error
    if not args.checkpoint:
        raise ConfigError("--checkpoint is missing; name a folder or a hub name (or --compare A.json B.json)")
    for path in (args.output, args.save_samples, args.record):
        if path:
            check_free(path, args.overwrite)
    if args.record and config.mode == "generate":
        raise ConfigError(
            "--record sees scored text only; leave --mode generate out, or use scripts/compress.py record --generate"
        )
    report = _evaluate(args, config)
    if args.adapter:
        report.model["adapter"] = args.adapter
    if args.projections != "stored":
        report.model["projections"] = args.projections
    report.command = shlex.join(["python", "evaluation/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    if args.output:
        report.save(args.output, args.overwrite)
    print(report.to_json() if args.json else report.table())
    for name, reason in report.failed.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    return 1 if report.failed else 0


def _parser():
    p = command.parser("Score a checkpoint on benchmarks.", EXAMPLE)
    command.add_common(p, checkpoint=False)
    command.add_set(p)
    p.set_defaults(seed=None)
    p.add_argument("--checkpoint", metavar="DIR|NAME", help="a folder or a hub name")
    p.add_argument(
        "--benchmark",
        metavar="NAME[,...]|all",
        help="hellaswag, lambada, mmlu, winogrande, arc_easy, arc_challenge, wikitext, gsm8k",
    )
    p.add_argument("--subjects", metavar="NAME[,...]", help="of MMLU (default: all 57)")
    for flag, kind, metavar, text in FLAGS:
        p.add_argument(flag, type=kind, metavar=metavar, help=text)
    p.add_argument(
        "--first", action="store_true", help="the first --limit rows, as the harness takes them, not a random choice"
    )
    p.add_argument("--config", metavar="FILE", help="settings from YAML; flags win")
    command.add_projections(p)
    p.add_argument("--adapter", metavar="DIR", help="evaluate with an adapter trained beside the checkpoint")
    p.add_argument("--plan", metavar="PLAN.json", help="evaluate a pruning plan by masking")
    p.add_argument("--record", metavar="STATS.safetensors", help="save the run's routing statistics")
    p.add_argument(
        "--output", metavar="report.json", help="where the report goes; a killed run continues from <it>.progress.jsonl"
    )
    p.add_argument("--save-samples", metavar="FILE.jsonl", help="one line a row: what was asked, what the model said")
    p.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="paired differences of two reports")
    p.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    return p


def _overrides(args) -> list[str]:
    """The flags that were given, as overrides of the config file."""
    given: dict[str, Any] = {
        flag[2:].replace("-", "_"): getattr(args, flag[2:].replace("-", "_")) for flag, *_ in FLAGS
    }
    given |= {"seed": args.seed, "first": True if args.first else None}
    for name in ("benchmark", "subjects"):
        text = getattr(args, name)
        given[name] = None if text is None else [part.strip() for part in text.split(",") if part.strip()]
    return [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]


def _evaluate(args, config):
    """Load the model, put the plan in force, record where asked, and run the engine."""
    import xmoe
    from xmoe.device import pick_device, pick_dtype, seed_everything

    seed_everything(config.seed)
    device = pick_device(args.device)
    dtype = "auto" if args.dtype == "auto" else pick_dtype(args.dtype, device)
    model, tokenizer = xmoe.load(
        args.checkpoint, device=device, dtype=dtype, adapter=args.adapter, projections=args.projections
    )
    with contextlib.ExitStack() as stack:
        if args.plan:
            from xmoe.compression.apply import mask
            from xmoe.compression.plan import PrunePlan

            stack.enter_context(mask(model, PrunePlan.load(args.plan)))
        if config.engine == "lm-eval":
            from evaluation.harness import evaluate_with_harness

            return evaluate_with_harness(model, tokenizer, config, checkpoint=args.checkpoint, plan=args.plan)
        return _evaluate_natively(args, config, model, tokenizer, stack)


def _evaluate_natively(args, config, model, tokenizer, stack: contextlib.ExitStack):
    from dataclasses import asdict

    from evaluation.runner import evaluate

    settings = asdict(config)
    tasks = settings.pop("benchmark")
    stats = _empty_statistics(model, config) if args.record else None
    samples = stack.enter_context(_samples(args))
    report = evaluate(
        model,
        tokenizer,
        tasks,
        progress=f"{args.output}.progress.jsonl" if args.output and stats is None else None,
        observe=None if stats is None else stats.observe,
        checkpoint=args.checkpoint,
        plan=args.plan,
        on_example=samples,
        **settings,
    )
    if stats is not None:
        stats.domain = "+".join(report.results)
        stats.data = tuple(report.data[name]["sha256"] for name in report.results)
        stats.tokens = float(report.protocol["tokens_computed"])
        stats.save(args.record, args.overwrite, command="evaluation/benchmark.py --record")
    return report


def _empty_statistics(model, config):
    from xmoe.compression.identity import model_hash
    from xmoe.compression.routing import RoutingStats

    counts = [model.config.experts_in_layer(i) for i in range(model.config.num_hidden_layers)]
    return RoutingStats.empty(
        counts, config.num_experts_per_tok or model.config.num_experts_per_tok, model=model_hash(model)
    )


@contextlib.contextmanager
def _samples(args):
    """A function that writes one JSON line an example, or None where no file was asked for."""
    if not args.save_samples:
        yield None
        return
    with new_file(args.save_samples, args.overwrite) as partial, open(partial, "w", encoding="utf-8") as f:

        def write(benchmark, example, answers: Sequence, values: dict[str, float]) -> None:
            said = [
                {"text": a.text} if a.text else {"loglikelihood": a.loglikelihood, "is_greedy": a.is_greedy}
                for a in answers
            ]
            asked = [list(request) for request in example.requests]
            entry = {
                "benchmark": benchmark.name,
                "name": example.name,
                "gold": example.gold,
                "requests": asked,
                "answers": said,
            }
            f.write(json.dumps(entry | {"values": values}, ensure_ascii=False) + "\n")

        yield write


def _compare(args) -> int:
    from evaluation.compare import as_dicts, compare, table
    from evaluation.results import Report

    found = compare(*map(Report.load, args.compare), seed=args.seed or 0)
    if args.output:
        with new_file(args.output, args.overwrite) as partial:
            Path(partial).write_text(json.dumps(as_dicts(found), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(as_dicts(found)) if args.json else table(found))
    return 0


if __name__ == "__main__":
    command.run(main)
