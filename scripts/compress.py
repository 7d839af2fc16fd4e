"""Make a Mixture-of-Experts checkpoint smaller, and prove it: record, plan, prune, verify, merge, reduce, recover, ..."""

from __future__ import annotations

import argparse
import json
import shlex
import sys

from xmoe import command

EXAMPLE = """python scripts/compress.py record --checkpoint checkpoints/light --data python --tokens 100000 --output r.safetensors
  python scripts/compress.py prune --checkpoint checkpoints/light --stats r.safetensors --criterion reap --keep 12 \\
      --output checkpoints/light-12"""


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__, EXAMPLE)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (flags, _) in COMMANDS.items():
        sub = commands.add_parser(name, help=flags.__doc__, description=flags.__doc__)
        command.add_common(sub, checkpoint=False)
        flags(sub)
    args = p.parse_args(argv)
    args.line = "compress.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    return COMMANDS[args.command][1](args)


def say(args: argparse.Namespace, result: dict, text: str) -> None:
    """The result: one JSON object with --json, else `text`."""
    print(json.dumps(result) if args.json else text)


# ---------------------------------------------------------------------------------------------------- shared flags


def add_checkpoint(p: argparse.ArgumentParser, required: bool = True) -> None:
    p.add_argument("--checkpoint", required=required, metavar="DIR|NAME", help="a folder or a hub name")


def add_output(p: argparse.ArgumentParser, metavar: str) -> None:
    p.add_argument("--output", required=True, metavar=metavar, help="appears complete or not at all")
    p.add_argument("--overwrite", action="store_true", help="replace what stands at --output")


def add_data(p: argparse.ArgumentParser, tokens: int) -> None:
    p.add_argument(
        "--data", required=True, metavar="SOURCE[,...]", help="python, a .txt or .jsonl file, a folder, or a hub name"
    )
    p.add_argument("--tokens", type=int, default=tokens, metavar="N", help=f"tokens to read (default: {tokens:,})")
    p.add_argument("--seq-len", type=int, default=512, metavar="S", help="tokens a row (default: 512)")
    p.add_argument("--batch-size", type=int, default=4, metavar="B", help="rows at a time (default: 4)")


def add_plan(p: argparse.ArgumentParser, required: bool) -> None:
    p.add_argument("--stats", metavar="STATS[,...]", help="what `record` or `import` wrote; several are added up")
    p.add_argument("--criterion", default="reap", metavar="NAME", help="who is worth keeping (default: reap)")
    p.add_argument("--keep", metavar="N|FRACTION", help="experts of each layer that stay: 16, or 0.5")
    p.add_argument("--budget", default="uniform", metavar="uniform|global|sensitivity", help="how layers share")
    p.add_argument(
        "--protect", default="", metavar="L:E,...", help="keep these whatever their score (E: in all layers)"
    )
    p.add_argument("--remove", default="", metavar="E,...", help="drop these whatever their score (E or L:E)")
    p.add_argument("--ranking", metavar="FILE.json", help='for --criterion ranking: {"layer_0": [best, ...], ...}')
    p.add_argument("--no-guard", action="store_true", help="do not protect super experts")


def data_batches(args: argparse.Namespace, tokenizer, seq_len: int | None = None):
    from xmoe.data.calibration import batches
    from xmoe.errors import DataError

    if tokenizer is None:
        raise DataError(f"{args.checkpoint} has no tokenizer, so text cannot be read; put a tokenizer.json beside it")
    return batches(
        args.data, tokenizer, seq_len=seq_len or args.seq_len, tokens=args.tokens, batch_size=args.batch_size
    )


def device_and_dtype(args: argparse.Namespace):
    """--dtype auto is what the checkpoint has."""
    from xmoe.device import pick_device, pick_dtype

    device = pick_device(args.device)
    return device, args.dtype if args.dtype == "auto" else pick_dtype(args.dtype, device)


def tokenizer_of(path: str):
    from xmoe.checkpoint.opened import Checkpoint
    from xmoe.checkpoint.sidecars import load_tokenizer

    checkpoint = Checkpoint(path)
    return checkpoint, load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)


def load_stats(text: str):
    from xmoe.compression.routing import RoutingStats

    first, *rest = [RoutingStats.load(part) for part in text.split(",") if part]
    for other in rest:
        first = first + other
    return first


def amount(text: str | None) -> int | float | None:
    """16 -> 16, 0.5 -> 0.5."""
    from xmoe.errors import ConfigError

    try:
        return None if text is None else int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ConfigError(f"--keep {text}: expected a count (16) or a share between 0 and 1 (0.5)") from None


def places(text: str, layers: int, flag: str) -> list[tuple[int, int]]:
    """`3:7` is expert 7 of layer 3, `7` is expert 7 of all layers."""
    from xmoe.errors import ConfigError

    found = []
    for part in filter(None, text.split(",")):
        layer, colon, expert = part.rpartition(":")
        try:
            found += [(int(layer), int(expert))] if colon else [(i, int(expert)) for i in range(layers)]
        except ValueError:
            raise ConfigError(f"--{flag} {part}: expected LAYER:EXPERT or EXPERT, such as 3:7") from None
    return found


def plan_from(args: argparse.Namespace, checkpoint: str | None):
    """The plan that the flags ask for; the weights are opened only for criteria that look at them."""
    from xmoe.checkpoint.weights import load
    from xmoe.compression.criteria import RECONSTRUCTION, WEIGHTS, criterion_name
    from xmoe.compression.fingerprint import load_ranking
    from xmoe.compression.plan import plan_pruning
    from xmoe.errors import ConfigError

    criterion = criterion_name(args.criterion)
    stats = load_stats(args.stats) if args.stats else None
    model = None
    if checkpoint and (stats is None or criterion in (*WEIGHTS, *RECONSTRUCTION) or args.budget == "sensitivity"):
        device, dtype = device_and_dtype(args)
        model, _ = load(checkpoint, device, dtype)
    if stats is None and model is None:
        raise ConfigError("give --stats STATS (compress.py record makes one) or --checkpoint")
    layers = stats.num_layers if stats is not None else model.config.num_hidden_layers
    return plan_pruning(
        stats,
        criterion,
        amount(args.keep),
        budget=args.budget,
        protect=places(args.protect, layers, "protect"),
        remove=places(args.remove, layers, "remove"),
        model=model,
        ranking=load_ranking(args.ranking) if args.ranking else None,
        guard=not args.no_guard,
        seed=args.seed,
        command=args.line,
    )


# -------------------------------------------------------------------------------------------------------- commands


def record_flags(p: argparse.ArgumentParser) -> None:
    """routing statistics of a text, one layer in memory at a time"""
    add_checkpoint(p)
    add_data(p, 100_000)
    p.add_argument("--domain", default="", metavar="NAME", help="what the text is, in a word")
    p.add_argument("--sample", type=int, default=0, metavar="N", help="also keep N tokens' inputs, for reconstruction")
    p.add_argument("--generate", action="store_true", help="let the model answer each row, and record the answers too")
    p.add_argument("--new-tokens", type=int, default=128, metavar="N", help="with --generate: length of an answer")
    add_output(p, "STATS.safetensors")


def record(args: argparse.Namespace) -> int:
    from xmoe.compression.routing import record_checkpoint, record_routing
    from xmoe.outputs import check_free

    check_free(args.output, args.overwrite)
    device, dtype = device_and_dtype(args)
    options = {"domain": args.domain or args.data, "sample": args.sample, "seed": args.seed}
    if args.generate:
        from xmoe.checkpoint.weights import load
        from xmoe.compression.answers import with_answers

        model, tokenizer = load(args.checkpoint, device, dtype)
        text = data_batches(args, tokenizer)
        stats = record_routing(model, with_answers(model, text, args.new_tokens, args.seed), **options)
    else:
        checkpoint, tokenizer = tokenizer_of(args.checkpoint)
        stats = record_checkpoint(checkpoint, data_batches(args, tokenizer), device=device, dtype=dtype, **options)
    stats.save(args.output, args.overwrite, args.line)
    never = len(stats.never_routed())
    result = {"output": args.output, "tokens": int(stats.tokens), "layers": stats.num_layers, "never_routed": never}
    say(args, result, f"wrote {args.output}: {stats.tokens:,.0f} tokens; {never} experts were never routed to")
    return 0


def import_flags(p: argparse.ArgumentParser) -> None:
    """the same from published activation summaries"""
    p.add_argument("--format", required=True, choices=["fingerprint"], help="what the folder holds")
    p.add_argument("--data", required=True, metavar="DIR", help="the folder with map.json, or the one above it")
    p.add_argument("--domain", required=True, metavar="NAME", help="of domains.json, a dataset/category, or all")
    add_output(p, "STATS.safetensors")


def import_summaries(args: argparse.Namespace) -> int:
    from pathlib import Path

    from xmoe.compression.fingerprint import import_fingerprint

    folder = Path(args.data)
    categories = None if args.domain == "all" else [args.domain]
    if (folder / "domains.json").is_file():
        categories = json.loads((folder / "domains.json").read_text()).get(args.domain, categories)
    inner = folder / "data" if not (folder / "map.json").is_file() else folder
    stats = import_fingerprint(inner, categories, domain=args.domain)
    stats.save(args.output, args.overwrite, args.line)
    say(
        args,
        {"output": args.output, "layers": stats.num_layers},
        f"wrote {args.output}: how often each expert is chosen in {args.domain}",
    )
    return 0


def plan_flags(p: argparse.ArgumentParser) -> None:
    """who stays: a file a person can read and edit"""
    add_plan(p, required=True)
    add_checkpoint(p, required=False)
    add_output(p, "PLAN.json")


def plan(args: argparse.Namespace) -> int:
    from xmoe.outputs import check_free

    check_free(args.output, args.overwrite)
    made = plan_from(args, args.checkpoint)
    made.save(args.output, args.overwrite)
    say(args, {"output": args.output, "kept": made.kept, "remarks": made.remarks()}, made.summary())
    return 0


def prune_flags(p: argparse.ArgumentParser) -> None:
    """the smaller checkpoint, its manifest and model card; kept weights are copied byte for byte"""
    add_checkpoint(p)
    p.add_argument("--plan", metavar="PLAN.json", help="what `plan` wrote; or give the flags of `plan`")
    add_plan(p, required=False)
    p.add_argument("--pad", action="store_true", help="uneven counts: fill up with dead experts, for stock loaders")
    p.add_argument("--recipe", action="store_true", help="write only plan.json into --output, to be applied elsewhere")
    add_output(p, "DIR")


def prune(args: argparse.Namespace) -> int:
    from xmoe.compression import manifest
    from xmoe.compression.cut import prune_checkpoint
    from xmoe.compression.plan import PrunePlan
    from xmoe.outputs import check_free, new_folder

    check_free(args.output, args.overwrite)
    chosen = PrunePlan.load(args.plan) if args.plan else plan_from(args, args.checkpoint)
    if args.recipe:
        with new_folder(args.output, args.overwrite) as partial:
            chosen.save(partial / "plan.json")
        say(args, {"output": args.output, "kept": chosen.kept}, chosen.summary())
        return 0
    folder = prune_checkpoint(
        args.checkpoint, chosen, args.output, pad=args.pad, command=args.line, overwrite=args.overwrite
    )
    content = manifest.read(folder)
    before, after = content["before"], content["after"]
    text = (
        f"{chosen.summary()}\nwrote {folder}: {before['bytes'] / 1e9:.3f} -> {after['bytes'] / 1e9:.3f} GB, "
        f"{before['parameters']:,} -> {after['parameters']:,} parameters; every kept weight has its source's bytes"
    )
    say(args, {"output": str(folder), "before": before, "after": after, "kept": chosen.kept}, text)
    return 0


def verify_flags(p: argparse.ArgumentParser) -> None:
    """proof that a pruned folder holds its source's bytes; exit 1 and the first tensor that differs if not"""
    p.add_argument("--source", required=True, metavar="DIR")
    p.add_argument("--pruned", required=True, metavar="DIR")


def verify(args: argparse.Namespace) -> int:
    from xmoe.compression.verify import verify as compare

    found = compare(args.source, args.pruned)
    say(args, found._asdict(), ("proved: " if found.ok else "differs: ") + found.message)
    return 0 if found.ok else 1


def sweep_flags(p: argparse.ArgumentParser) -> None:
    """quality against size for many plans, by masking; CSV and plot"""
    add_checkpoint(p)
    p.add_argument("--stats", required=True, metavar="STATS[,...]", help="what `record` wrote")
    p.add_argument("--criterion", default="frequency,reap", metavar="A,B,...", help="(default: frequency,reap)")
    p.add_argument("--keep", required=True, metavar="28,24,...", help="counts or shares")
    p.add_argument("--budget", default="uniform", metavar="uniform|global|sensitivity", help="how layers share")
    add_data(p, 20_000)
    add_output(p, "DIR")


def sweep(args: argparse.Namespace) -> int:
    from xmoe.checkpoint.weights import load
    from xmoe.compression.sweep import draw, write_csv
    from xmoe.compression.sweep import sweep as try_plans
    from xmoe.outputs import check_free, new_folder

    check_free(args.output, args.overwrite)
    device, dtype = device_and_dtype(args)
    model, tokenizer = load(args.checkpoint, device, dtype)
    keeps = [amount(k) for k in args.keep.split(",")]
    text = data_batches(args, tokenizer)
    rows = try_plans(model, load_stats(args.stats), args.criterion.split(","), keeps, text, budget=args.budget)
    with new_folder(args.output, args.overwrite) as partial:
        write_csv(rows, partial / "sweep.csv")
        draw(rows, partial / "sweep.svg")
    lines = [f"{'criterion':<22}{'keep':>7}{'MB':>10}{'perplexity':>13}"]
    lines += [f"{r.criterion:<22}{r.keep or 'all':>7}{r.bytes / 1e6:>10.1f}{r.perplexity:>13.3f}" for r in rows]
    say(args, {"output": args.output, "rows": [r._asdict() for r in rows]}, "\n".join(lines))
    return 0


def merge_flags(p: argparse.ArgumentParser) -> None:
    """experts that are alike become one; MXFP4 experts that changed are encoded anew"""
    add_checkpoint(p)
    p.add_argument("--stats", required=True, metavar="STATS[,...]", help="recorded with --sample")
    p.add_argument("--method", required=True, metavar="hc-smoe|m-smoe|ream")
    p.add_argument("--keep", required=True, type=int, metavar="N", help="experts of each layer afterwards")
    p.add_argument("--tied", action="store_true", help="keep all router rows, members of a group equal (saves nothing)")
    add_output(p, "DIR")


def merge(args: argparse.Namespace) -> int:
    from xmoe.checkpoint.weights import load
    from xmoe.compression.changed import save_changed
    from xmoe.compression.merge import describe
    from xmoe.compression.merge import merge as join
    from xmoe.outputs import check_free

    check_free(args.output, args.overwrite)
    device, dtype = device_and_dtype(args)
    model, _ = load(args.checkpoint, device, dtype)
    small, groups = join(model, load_stats(args.stats), args.method, args.keep, tied=args.tied)
    operation = {"name": "merge", "method": args.method, "keep": args.keep, "tied": args.tied}
    operation["groups"] = describe(groups)
    save_changed(small, args.checkpoint, args.output, [operation], command=args.line, overwrite=args.overwrite)
    joined = sum(len(g.members) > 1 for row in groups for g in row)
    text = (
        f"wrote {args.output}: {joined} groups of experts became one each; not bit-exact, changed experts encoded anew"
    )
    say(args, {"output": args.output, "groups": describe(groups)}, text)
    return 0


def reduce_flags(p: argparse.ArgumentParser) -> None:
    """experts shrunk inside; a table of bytes and errors, stage by stage"""
    add_checkpoint(p)
    p.add_argument("--method", required=True, metavar="magnitude|neurons|int8|int4|mxfp4[,...]", help="in this order")
    p.add_argument("--fraction", type=float, metavar="F", help="of bytes, or of weights where no byte can move")
    p.add_argument("--experts", default="", metavar="L:E,...", help="touch only these (magnitude)")
    p.add_argument("--stats", metavar="STATS[,...]", help="recorded with --sample: scores neurons, measures outputs")
    p.add_argument("--scope", default="tensor", metavar="tensor|expert|layer|global", help="of magnitude")
    p.add_argument("--pattern", metavar="N:M", help="magnitude: keep N of every M along the inputs")
    p.add_argument("--group-size", type=int, default=32, metavar="32|64|128", help="of int4")
    add_output(p, "DIR")


def reduce(args: argparse.Namespace) -> int:
    from xmoe.checkpoint.weights import load
    from xmoe.compression.changed import save_changed
    from xmoe.compression.reduce import reduce as shrink
    from xmoe.errors import ConfigError
    from xmoe.outputs import check_free

    check_free(args.output, args.overwrite)
    pattern = None
    if args.pattern:
        if not all(part.isdigit() for part in args.pattern.split(":")) or args.pattern.count(":") != 1:
            raise ConfigError(f"--pattern {args.pattern}: expected N:M, such as 2:4")
        pattern = tuple(int(part) for part in args.pattern.split(":"))
    device, dtype = device_and_dtype(args)
    model, _ = load(args.checkpoint, device, dtype)
    small, stages = shrink(
        model,
        args.method.split(","),
        args.fraction,
        experts=places(args.experts, len(model.blocks), "experts") or None,
        stats=load_stats(args.stats) if args.stats else None,
        scope=args.scope,
        pattern=pattern,
        group_size=args.group_size,
    )
    operations = [{"name": "reduce", "fraction": args.fraction, **stage._asdict()} for stage in stages]
    save_changed(small, args.checkpoint, args.output, operations, command=args.line, overwrite=args.overwrite)
    say(args, {"output": args.output, "stages": operations}, "\n".join(stage.line() for stage in stages))
    return 0


def recover_flags(p: argparse.ArgumentParser) -> None:
    """quality won back by distilling the uncut model into routers, experts or all"""
    add_checkpoint(p)
    p.add_argument("--teacher", required=True, metavar="DIR|NAME", help="the uncut model")
    p.add_argument("--train", default="routers", metavar="routers|experts|all", help="(default: routers)")
    p.add_argument("--steps", type=int, default=200, metavar="N", help="(default: 200)")
    p.add_argument("--lr", type=float, metavar="LR", help="peak learning rate")
    add_data(p, 200_000)
    add_output(p, "DIR")


def recover(args: argparse.Namespace) -> int:
    from xmoe.checkpoint.weights import load
    from xmoe.compression.changed import save_changed
    from xmoe.compression.recover import recover as distil
    from xmoe.outputs import check_free

    check_free(args.output, args.overwrite)
    device, dtype = device_and_dtype(args)
    student, tokenizer = load(args.checkpoint, device, dtype, "mxfp4" if args.train == "routers" else "dense")
    teacher, _ = load(args.teacher, device, dtype)
    result = distil(student, teacher, data_batches(args, tokenizer), train=args.train, steps=args.steps, lr=args.lr)
    operation = {"name": "recover", "train": args.train, "steps": args.steps, "tokens": result.tokens}
    save_changed(student, args.checkpoint, args.output, [operation], command=args.line, overwrite=args.overwrite)
    first, last = result.losses[0], sum(result.losses[-10:]) / len(result.losses[-10:])
    summary = {"output": args.output, "parameters": result.parameters, "tokens": result.tokens}
    text = (
        f"wrote {args.output}: {result.parameters:,} parameters trained on {result.tokens:,} tokens; KL to the teacher "
        f"{first:.4f} -> {last:.4f} nats a token"
    )
    say(args, summary | {"first_kl": first, "last_kl": last}, text)
    return 0


COMMANDS = {
    "record": (record_flags, record),
    "import": (import_flags, import_summaries),
    "plan": (plan_flags, plan),
    "prune": (prune_flags, prune),
    "verify": (verify_flags, verify),
    "sweep": (sweep_flags, sweep),
    "merge": (merge_flags, merge),
    "reduce": (reduce_flags, reduce),
    "recover": (recover_flags, recover),
}


if __name__ == "__main__":
    command.run(main)
