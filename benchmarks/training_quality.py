"""Does a Mixture of Experts pay, at this size, on this text? The table in docs/training.md, made again by one command.

    python benchmarks/training_quality.py                                     # Python's own source: about an hour on 2 cores
    python benchmarks/training_quality.py --only optimizer,effort --seeds 1
    python benchmarks/training_quality.py --wikitext DIR --shakespeare input.txt

Five questions, each a handful of training runs from configs/train/:

- `python`, `wikitext2`, `shakespeare`: the MoE beside a dense twin of equal active parameters, after equally many steps and after
  equal time (the twin is given as many more steps as its steps are faster, measured in pairs on this machine before the runs);
- `optimizer`: the loss AdamW ends at, and what Muon ends at with 0.6 of its steps;
- `balance`: the MoE with and without balancing: what dies, how uneven the load is;
- `effort`: experts per token drawn at random in training beside K = 2 throughout, both read at K = 1, 2 and 4.

Runs that are finished are not repeated, and one that was stopped goes on from its last save, so the command may be interrupted
and given again. Every finished run is a line in OUTPUT/results.jsonl; the tables end in OUTPUT/tables.md.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from xmoe import command
from xmoe.config import dump_config, load_config
from xmoe.data.cache import digest
from xmoe.errors import ConfigError
from xmoe.outputs import new_file
from xmoe.training.config import RunConfig
from xmoe.training.trainer import Trainer, train

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "train"
QUESTIONS = ("python", "optimizer", "balance", "effort", "wikitext2", "shakespeare")
MUON_SHARE = 0.6  # of AdamW's steps
SPEED_STEPS = 6  # a model, in turns, to compare speeds


@dataclass(frozen=True)
class Plan:
    """One training run: a name for its folder, its config file, and what is set differently."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()


class Bench:
    """Runs plans, or remembers what they gave."""

    def __init__(self, output: Path, shared: tuple[str, ...], scale: float) -> None:
        self.output, self.shared, self.scale = output, shared, scale
        # A copy, so that an hour of runs does not change under the hands of someone who edits a config meanwhile.
        self._copied = tempfile.TemporaryDirectory()
        self.configs = Path(shutil.copytree(CONFIGS, Path(self._copied.name) / "train"))
        output.mkdir(parents=True, exist_ok=True)
        self.file = output / "results.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.known = {line["key"]: line for line in map(json.loads, lines)}

    def config(self, plan: Plan, *more: str) -> RunConfig:
        """The plan's resolved config, with all numbers of steps scaled."""
        given = [*self.shared, *plan.overrides, *more]
        config = load_config(RunConfig, self.configs / f"{plan.config}.yaml", given)
        steps = max(1, round(config.train.steps * self.scale))
        warmup = min(config.optim.warmup_steps, steps // 2)
        return load_config(
            RunConfig,
            self.configs / f"{plan.config}.yaml",
            [*given, f"train.steps={steps}", f"optim.warmup_steps={warmup}"],
        )

    def run(self, plan: Plan) -> dict:
        """What came of the plan: losses, and the health of its routers over the run."""
        config = self.config(plan)
        key = f"{plan.name} {digest(dump_config(config))}"
        if key in self.known:
            print(f"{plan.name}: known", file=sys.stderr)
            return self.known[key]
        print(f"\n=== {plan.name}", file=sys.stderr)
        folder = self.output / digest(key)
        run = train(config, output=folder, resume=True, console=sys.stderr)
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        windows = [line for line in lines if "expert_load" in line]
        judged = [window for window in windows if window["dead_experts"] is not None]
        found = {
            "key": key,
            "name": plan.name,
            "loss": run.loss,
            "bits_per_byte": run.bits_per_byte,
            "loss_by_effort": run.loss_by_effort,
            "steps": run.steps,
            "tokens_per_second": statistics.median(line["tokens_per_second"] for line in windows),
            "max_violation": windows[-1]["max_violation"],
            "load_entropy": windows[-1]["load_entropy"],
            "dead_at_end": next((w["dead_experts"] for w in reversed(judged)), None),
            "windows_with_dead": [sum(any(w["dead_experts"]) for w in judged), len(judged)],
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with open(self.file, "a") as file:
            file.write(json.dumps(found) + "\n")
        self.known[key] = found
        return found

    def speed_ratio(self, fast: Plan, slow: Plan) -> float:
        """How many steps of `fast` fit into one of `slow`: steps in turns, medians, so that a busy machine harms both alike."""
        key = f"speed {digest(dump_config(self.config(fast)), dump_config(self.config(slow)))}"
        if key not in self.known:
            with tempfile.TemporaryDirectory() as empty:
                pair = [Trainer(self.config(plan), Path(empty) / "run") for plan in (fast, slow)]
                seconds: list[list[float]] = [[], []]
                for i in range(SPEED_STEPS + 2):
                    for trainer, times in zip(pair, seconds):
                        began = time.perf_counter()
                        trainer.step(i)
                        times.append(time.perf_counter() - began)
            ratio = statistics.median(seconds[1][2:]) / statistics.median(seconds[0][2:])
            self.known[key] = {"key": key, "name": f"speed of {fast.name} over {slow.name}", "ratio": ratio}
            with open(self.file, "a") as file:
                file.write(json.dumps(self.known[key]) + "\n")
        return self.known[key]["ratio"]


def compare_dense(bench: Bench, text: str, seeds: int, overrides: tuple[str, ...] = ()) -> str:
    """The MoE, its dense twin, and the twin with as much time."""
    rows = []
    for seed in range(seeds):
        own = (*overrides, f"train.seed={seed}")
        moe, dense = Plan(f"{text} moe {seed}", f"{text}_moe", own), Plan(f"{text} dense {seed}", f"{text}_dense", own)
        if not rows:
            ratio = bench.speed_ratio(dense, moe)
        steps = round(bench.config(dense).train.steps / bench.scale * ratio)
        longer = Plan(f"{text} dense, equal time {seed}", f"{text}_dense", (*own, f"train.steps={steps}"))
        rows.append([bench.run(moe), bench.run(dense), bench.run(longer)])
    lines = [
        f"### {text}: MoE beside its dense twin ({len(rows)} seeds)",
        "",
        "| seed | MoE | dense, equal steps | MoE - dense | dense, equal time | MoE - dense | MoE bits per byte |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, (moe, dense, longer) in enumerate(rows):
        lines.append(_row(seed, moe["loss"], dense["loss"], longer["loss"], moe["bits_per_byte"]))
    if len(rows) > 1:
        means = [statistics.mean(found[i]["loss"] for found in rows) for i in range(3)]
        lines.append(_row("mean", *means, statistics.mean(found[0]["bits_per_byte"] for found in rows)))
        differences = [moe["loss"] - dense["loss"] for moe, dense, _ in rows]
        lines.append(
            f"\nMoE - dense over seeds: {statistics.mean(differences):+.4f} ± {statistics.stdev(differences):.4f} (sd)"
        )
    lines.append(
        f"\nNats a token after {rows[0][0]['steps']} steps; equal time gives the twin {ratio:.2f} times as many "
        f"({rows[0][2]['steps']})."
    )
    return "\n".join(lines)


def _row(name, moe: float, dense: float, longer: float, bits: float) -> str:
    return (
        f"| {name} | {moe:.4f} | {dense:.4f} | {moe - dense:+.4f} | {longer:.4f} | {moe - longer:+.4f} | {bits:.4f} |"
    )


def compare_optimizers(bench: Bench) -> str:
    """AdamW at several rates with all steps, Muon with 0.6 of them."""
    steps = bench.config(Plan("", "python_moe")).train.steps / bench.scale
    lines = [
        "### Muon beside AdamW (python_moe)",
        "",
        "| optimizer | lr | steps | validation loss |",
        "|---|---|---|---|",
    ]
    losses = []
    for lr in ("1e-3", "2e-3", "4e-3"):
        found = bench.run(Plan(f"adamw {lr}", "python_moe", ("optim.name=adamw", f"optim.lr={lr}")))
        losses.append(found["loss"])
        lines.append(f"| AdamW | {lr} | {found['steps']} | {found['loss']:.4f} |")
    found = bench.run(Plan(f"muon {MUON_SHARE}", "python_moe", (f"train.steps={round(steps * MUON_SHARE)}",)))
    optim = bench.config(Plan("", "python_moe")).optim
    lines.append(
        f"| Muon | {optim.lr:g}, matrices {optim.muon_lr or optim.lr:g} | {found['steps']} | {found['loss']:.4f} |"
    )
    lines.append(
        f"\nMuon with {MUON_SHARE} of the steps against AdamW's best: {found['loss'] - min(losses):+.4f} nats."
    )
    return "\n".join(lines)


def compare_balance(bench: Bench) -> str:
    """With the load-balancing loss, without any balancing, and with the selection bias instead."""
    none = ("train.load_balancing_coef=0",)
    plans = {
        "load-balancing loss": Plan("python moe 0", "python_moe", ("train.seed=0",)),
        "selection bias": Plan(
            "selection bias", "python_moe", ("train.seed=0", *none, "train.selection_bias_rate=0.003")
        ),
        "none": Plan("no balancing", "python_moe", ("train.seed=0", *none)),
    }
    lines = [
        "### Balancing (python_moe)",
        "",
        "| balancing | validation loss | MaxVio, mean of layers | worst layer | entropy, worst layer | dead at end | alarms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, plan in plans.items():
        found = bench.run(plan)
        violation, alarms = found["max_violation"], found["windows_with_dead"]
        lines.append(
            f"| {name} | {found['loss']:.4f} | {statistics.mean(violation):.2f} | {max(violation):.2f} "
            f"| {min(found['load_entropy']):.3f} | {sum(map(len, found['dead_at_end'] or ()))} | {alarms[0]} of {alarms[1]} |"
        )
    lines.append(
        "\nMaxVio and entropy are those of the last log window; alarms are log windows in which an expert was dead."
    )
    return "\n".join(lines)


def compare_effort(bench: Bench) -> str:
    """One checkpoint at every K: trained at K = 2, and trained at a K drawn for each step, or each layer of it."""
    plans = {
        "K = 2 throughout": Plan("python moe 0", "python_moe", ("train.seed=0",)),
        "drawn for each step": Plan("effort by step", "python_moe", ("train.seed=0", "train.effort_sampling=step")),
        "drawn for each layer": Plan("effort by layer", "python_moe", ("train.seed=0", "train.effort_sampling=layer")),
    }
    lines = ["### Elastic effort (python_moe)", "", "| trained with | k = 1 | k = 2 | k = 4 |", "|---|---|---|---|"]
    for name, plan in plans.items():
        by = bench.run(plan)["loss_by_effort"]
        lines.append(f"| {name} | {by['low']:.4f} | {by['medium']:.4f} | {by['high']:.4f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__, "python benchmarks/training_quality.py --only python --seeds 3")
    p.add_argument(
        "--only",
        default=None,
        metavar="QUESTION,...",
        help=f"some of {', '.join(QUESTIONS)} (default: all there is text for)",
    )
    p.add_argument("--seeds", type=int, default=3, help="seeds for the Python text (default: 3; other texts have one)")
    p.add_argument("--wikitext", metavar="DIR", help="a folder with WikiText-2's train.txt and valid.txt")
    p.add_argument("--shakespeare", metavar="FILE", help="Tiny Shakespeare's input.txt")
    p.add_argument(
        "--output", default="checkpoints/training_quality", metavar="DIR", help="runs, results.jsonl and tables.md"
    )
    p.add_argument(
        "--scale", type=float, default=1.0, help="multiply all numbers of steps, for a quick trial (default: 1)"
    )
    p.add_argument("--json", action="store_true", help="print the results as one JSON object and nothing else")
    command.add_set(p)
    args = p.parse_args(argv)
    questions = args.only.split(",") if args.only else [q for q in QUESTIONS if q not in ("wikitext2", "shakespeare")]
    if not args.only:
        questions += [q for q, given in (("wikitext2", args.wikitext), ("shakespeare", args.shakespeare)) if given]
    for question in questions:
        if question not in QUESTIONS:
            raise ConfigError(f"--only {question}: expected some of {', '.join(QUESTIONS)}")
    if args.seeds < 1 or not args.scale > 0:
        raise ConfigError(f"--seeds {args.seeds} --scale {args.scale}: expected 1 or more seeds and a scale above 0")

    bench = Bench(Path(args.output), tuple(args.set), args.scale)
    wikitext, shakespeare = (), ()
    if args.wikitext:
        local = ("data.subset=null", "data.validation_split=null")
        files = (f"data.source={args.wikitext}/train.txt", f"data.validation_source={args.wikitext}/valid.txt")
        wikitext = (*local, *files)
    if args.shakespeare:
        shakespeare = (f"data.source={args.shakespeare}",)
    answers = {
        "python": lambda: compare_dense(bench, "python", args.seeds),
        "optimizer": lambda: compare_optimizers(bench),
        "balance": lambda: compare_balance(bench),
        "effort": lambda: compare_effort(bench),
        "wikitext2": lambda: compare_dense(bench, "wikitext2", 1, wikitext),
        "shakespeare": lambda: compare_dense(bench, "shakespeare", 1, shakespeare),
    }
    tables = "\n\n".join(answers[question]() for question in questions) + "\n"
    with new_file(bench.output / "tables.md", overwrite=True) as file:
        file.write_text(tables)
    if args.json:
        print(json.dumps({"results": list(bench.known.values()), "tables": tables}))
    else:
        print(tables)
    return 0


if __name__ == "__main__":
    command.run(main)
