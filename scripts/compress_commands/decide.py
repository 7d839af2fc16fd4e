"""plan, sweep: who stays, and what that costs."""

from __future__ import annotations

import argparse

from compress_commands.flags import add_checkpoint, add_config, add_data, add_output, check_output, say
from compress_commands.inputs import data_batches, device_and_dtype, load_stats, settings
from compress_commands.watch import recorded

CRITERIA = (  # written out, so that --help need not wait for torch; a test holds it to xmoe.compression.criteria
    "frequency, share, soft, soft_all, ean, man, msan, reap, reap_sum, reap_l2, weight_norm, aimer, reconstruction, "
    "reconstruction_exact, random, ranking, list"
)


def plan_flags(p: argparse.ArgumentParser) -> None:
    """who stays: a file a person can read and edit"""
    add_checkpoint(p, required=False)
    add_config(p)
    add_plan(p)
    add_output(p, "PLAN.json")


def add_plan(p: argparse.ArgumentParser) -> None:
    """Flags that stand in for fields of PlanConfig; not given is None."""
    p.add_argument("--stats", metavar="STATS[,...]", help="what `record` or `import` wrote; several are added up")
    p.add_argument("--criterion", metavar="NAME", help=f"who is worth keeping (default: reap): {CRITERIA}")
    p.add_argument("--keep", metavar="N|FRACTION", help="experts of each layer that stay: 16, or 0.5")
    p.add_argument("--budget", metavar="uniform|global|sensitivity", help="how layers share (default: uniform)")
    p.add_argument("--protect", metavar="L:E,...", help="keep these whatever their score (E: in all layers)")
    p.add_argument("--remove", metavar="E,...", help="drop these whatever their score (E or L:E)")
    p.add_argument("--ranking", metavar="FILE.json", help='for --criterion ranking: {"layer_0": [best, ...], ...}')
    p.add_argument("--no-guard", dest="guard", action="store_false", default=None, help="do not protect super experts")


def plan(args: argparse.Namespace) -> int:
    from xmoe.outputs import check_free

    check_free(args.output, args.overwrite)
    made = plan_from(args)
    made.save(args.output, args.overwrite)
    say(args, {"output": args.output, "kept": made.kept, "remarks": made.remarks()}, made.summary())
    return 0


def plan_from(args: argparse.Namespace):
    """The plan that flags and recipe ask for; weights are read only for criteria that look at them, layer by layer.

    Where there are no statistics and the criterion needs some, they are recorded as the recipe says.
    """
    from xmoe.checkpoint.opened import Checkpoint
    from xmoe.compression.criteria import ACTIVATION, RECONSTRUCTION, WEIGHTS
    from xmoe.compression.fingerprint import load_ranking
    from xmoe.compression.layerwise import StoredModel
    from xmoe.compression.plan import plan_pruning
    from xmoe.compression.recipe import places as resolved
    from xmoe.errors import ConfigError

    recipe = settings(args)
    chosen = recipe.plan
    needs_text = chosen.criterion in (*ACTIVATION, *RECONSTRUCTION) or chosen.budget == "sensitivity"
    stats = load_stats(args.stats) if args.stats else None
    if stats is None and needs_text and args.checkpoint and recipe.record.data:
        stats = recorded(args, recipe.record)
    looks_at_weights = chosen.criterion in (*WEIGHTS, *RECONSTRUCTION) or chosen.budget == "sensitivity"
    model = None
    if args.checkpoint and (stats is None or looks_at_weights):
        model = StoredModel(Checkpoint(args.checkpoint), *device_and_dtype(args))
    if stats is None and model is None:
        raise ConfigError("give --stats STATS (compress.py record makes one) or --checkpoint")
    layers = stats.num_layers if stats is not None else model.config.num_hidden_layers
    return plan_pruning(
        stats,
        chosen.criterion,
        chosen.amount,
        budget=chosen.budget,
        protect=resolved(chosen.protect, layers),
        remove=resolved(chosen.remove, layers),
        model=model,
        ranking=load_ranking(chosen.ranking) if chosen.ranking else None,
        guard=chosen.guard,
        seed=args.seed,
        command=args.line,
    )


def sweep_flags(p: argparse.ArgumentParser) -> None:
    """quality against size for many plans, by masking; CSV and plot"""
    add_checkpoint(p)
    p.add_argument("--stats", required=True, metavar="STATS[,...]", help="what `record` wrote")
    p.add_argument(
        "--criterion", default="frequency,reap", metavar="A,B,...", help=f"(default: frequency,reap) of {CRITERIA}"
    )
    p.add_argument("--keep", required=True, metavar="28,24,...", help="counts or shares")
    p.add_argument("--budget", default="uniform", metavar="uniform|global|sensitivity", help="how layers share")
    add_data(p, 20_000)
    add_output(p, "DIR")


def sweep(args: argparse.Namespace) -> int:
    from xmoe.checkpoint.weights import load
    from xmoe.compression.sweep import draw, write_csv
    from xmoe.compression.sweep import sweep as try_plans
    from xmoe.outputs import new_folder

    check_output(args)
    device, dtype = device_and_dtype(args)
    model, tokenizer = load(args.checkpoint, device, dtype)
    keeps = [amount(k) for k in args.keep.split(",")]
    text = data_batches(args, tokenizer, model.source.folder)
    rows = try_plans(model, load_stats(args.stats), args.criterion.split(","), keeps, text, budget=args.budget)
    with new_folder(args.output, args.overwrite) as partial:
        write_csv(rows, partial / "sweep.csv")
        draw(rows, partial / "sweep.svg")
    lines = [f"{'criterion':<22}{'keep':>7}{'MB':>10}{'perplexity':>13}"]
    lines += [f"{r.criterion:<22}{r.keep or 'all':>7}{r.bytes / 1e6:>10.1f}{r.perplexity:>13.3f}" for r in rows]
    say(args, {"output": args.output, "rows": [r._asdict() for r in rows]}, "\n".join(lines))
    return 0


def amount(text: str) -> int | float:
    """16 -> 16, 0.5 -> 0.5."""
    from xmoe.compression.recipe import PlanConfig

    return PlanConfig(keep=text).amount
