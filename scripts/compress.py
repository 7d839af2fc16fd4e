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

CRITERIA = (  # written out, so that --help need not wait for torch; a test holds it to xmoe.compression.criteria
    "frequency, share, soft, soft_all, ean, man, msan, reap, reap_sum, reap_l2, weight_norm, aimer, reconstruction, "
    "reconstruction_exact, random, ranking, list"
)


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__, EXAMPLE)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (flags, _, example) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=flags.__doc__,
            description=flags.__doc__,
            epilog=f"example:\n  python scripts/compress.py {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
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


def add_data(p: argparse.ArgumentParser, tokens: int, required: bool = True) -> None:
    p.add_argument(
        "--data",
        required=required,
        metavar="SOURCE[,...]",
        help="python, a .txt or .jsonl file, a folder, or a hub name",
    )
    p.add_argument("--tokens", type=int, default=tokens, metavar="N", help=f"tokens to read (default: {tokens:,})")
    p.add_argument("--seq-len", type=int, default=512, metavar="S", help="tokens a row (default: 512)")
    p.add_argument("--batch-size", type=int, default=4, metavar="B", help="rows at a time (default: 4)")


def check_output(args: argparse.Namespace) -> None:
    """Nothing stands at --output, or it may be replaced; a source never may."""
    from pathlib import Path

    from xmoe.errors import ConfigError
    from xmoe.outputs import check_free

    check_free(args.output, args.overwrite)
    goal = Path(args.output).resolve()
    for name in ("checkpoint", "teacher"):
        if (given := getattr(args, name, None)) and goal in ((source := Path(given).resolve()), *source.parents):
            raise ConfigError(f"--output {args.output} would replace --{name}, which must stay; choose another name")


def add_config(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--config", metavar="FILE.yaml", help="a recipe, such as those in configs/compress; flags override it"
    )
    command.add_set(p)


def add_record(p: argparse.ArgumentParser) -> None:
    """Flags that stand in for fields of RecordConfig; not given is None."""
    p.add_argument("--data", metavar="SOURCE[,...]", help="python, a .txt or .jsonl file, a folder, or a hub name")
    p.add_argument("--tokens", type=int, metavar="N", help="tokens to read (default: 100,000)")
    p.add_argument("--seq-len", type=int, metavar="S", help="tokens a row (default: 512)")
    p.add_argument("--batch-size", type=int, metavar="B", help="rows at a time (default: 4)")
    p.add_argument("--domain", metavar="NAME", help="what the text is, in a word (default: its name)")
    p.add_argument("--sample", type=int, metavar="N", help="also keep N tokens' inputs, for reconstruction and merging")
    p.add_argument(
        "--generate", action="store_true", default=None, help="let the model answer each row, and record that too"
    )
    p.add_argument("--new-tokens", type=int, metavar="N", help="with --generate: length of an answer (default: 128)")


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


def settings(args: argparse.Namespace):
    """The recipe that --config, --set and flags ask for, later ones winning."""
    from xmoe.compression.recipe import CompressConfig, read_places, with_flags
    from xmoe.config import load_config

    recipe = load_config(CompressConfig, args.config, args.set)
    flags = dict(vars(args))
    for name in ("protect", "remove"):
        if isinstance(flags.get(name), str):
            flags[name] = read_places(flags[name], name)
    return CompressConfig(with_flags(recipe.record, flags), with_flags(recipe.plan, flags))


def data_batches(args, tokenizer, folder=None, prompts: bool = False):
    """Batches of what `args` (flags, or a RecordConfig) names; the model's folder tells whether it was taught Harmony."""
    from xmoe.compression.calibration import calibration
    from xmoe.errors import DataError
    from xmoe.generation.harmony import speaks_harmony

    if tokenizer is None:
        raise DataError("the checkpoint has no tokenizer, so text cannot be read; put a tokenizer.json beside it")
    sizes = {"seq_len": args.seq_len, "tokens": args.tokens, "batch_size": args.batch_size}
    return calibration(args.data, tokenizer, harmony=speaks_harmony(tokenizer, folder), prompts=prompts, **sizes)


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


def amount(text: str) -> int | float:
    """16 -> 16, 0.5 -> 0.5."""
    from xmoe.compression.recipe import PlanConfig

    return PlanConfig(keep=text).amount


def places(text: str, layers: int, flag: str) -> list[tuple[int, int]]:
    """`3:7` is expert 7 of layer 3, `7` is expert 7 of all layers."""
    from xmoe.compression.recipe import places as resolved
    from xmoe.compression.recipe import read_places

    return resolved(read_places(text, flag), layers)


def recorded(args: argparse.Namespace, recipe):
    """Statistics of what the recipe's `record` section names, one layer in memory at a time unless answers are wanted."""
    from xmoe.checkpoint.weights import load
    from xmoe.compression.calibration import with_answers
    from xmoe.compression.routing import record_checkpoint, record_routing

    device, dtype = device_and_dtype(args)
    options = {"domain": recipe.domain or recipe.data, "sample": recipe.sample, "seed": args.seed}
    checkpoint, tokenizer = tokenizer_of(args.checkpoint)
    text = data_batches(recipe, tokenizer, checkpoint.folder, prompts=recipe.generate)
    if not recipe.generate:
        return record_checkpoint(checkpoint, text, device=device, dtype=dtype, **options)
    model, _ = load(args.checkpoint, device, dtype)
    ends = [tokenizer.special("<|return|>"), tokenizer.special("<|call|>"), tokenizer.eos_id]
    ends = [i for i in ends if i is not None]
    return record_routing(model, with_answers(model, text, recipe.new_tokens, args.seed, ends), **options)


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


# -------------------------------------------------------------------------------------------------------- commands


def record_flags(p: argparse.ArgumentParser) -> None:
    """routing statistics of texts and conversations, one layer in memory at a time"""
    add_checkpoint(p)
    add_config(p)
    add_record(p)
    add_output(p, "STATS.safetensors")


def record(args: argparse.Namespace) -> int:
    from xmoe.errors import ConfigError
    from xmoe.outputs import check_free

    check_free(args.output, args.overwrite)
    recipe = settings(args).record
    if not recipe.data:
        raise ConfigError(
            "--data is missing: python, a .txt or .jsonl file, a folder, a hub name, or several by commas"
        )
    stats = recorded(args, recipe)
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


def fingerprint_flags(p: argparse.ArgumentParser) -> None:
    """which experts each domain uses: rankings, overlap, coverage and token-level traces, as data for a report page"""
    p.add_argument("--stats", metavar="STATS[,...]", help="one file a domain, by `record --domain` or `import`")
    p.add_argument("--top", default="8,16,20,24", metavar="N,...", help="experts of a ranking (default: 8,16,20,24)")
    add_checkpoint(p, required=False)
    p.add_argument("--text", action="append", default=[], metavar="TEXT", help="trace this, token by token; repeatable")
    add_output(p, "FILE.json")


def fingerprint(args: argparse.Namespace) -> int:
    from xmoe.checkpoint.weights import load
    from xmoe.compression.fingerprint import report, trace_text
    from xmoe.compression.routing import RoutingStats
    from xmoe.errors import ConfigError
    from xmoe.outputs import check_free, new_file

    check_free(args.output, args.overwrite)
    if bool(args.text) != bool(args.checkpoint) or not (args.stats or args.text):
        raise ConfigError("give --stats STATS[,...], or --checkpoint with --text to trace, or both")
    if not all(part.isdigit() and int(part) for part in args.top.split(",")):
        raise ConfigError(f"--top {args.top}: expected counts of experts, such as 8,16")
    content = {"command": args.line}
    if args.stats:
        stats = [RoutingStats.load(part) for part in args.stats.split(",") if part]
        content |= report(stats, [int(part) for part in args.top.split(",")])
    if args.text:
        device, dtype = device_and_dtype(args)
        model, tokenizer = load(args.checkpoint, device, dtype)
        content["traces"] = [trace_text(model, tokenizer, text) for text in args.text]
    with new_file(args.output, args.overwrite) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = f"wrote {args.output}: {len(content.get('rankings', {}))} domains, {len(content.get('traces', []))} traces"
    for top, table in content.get("overlap", {}).items():
        pairs = [(a, b, share) for a, row in table.items() for b, share in row.items() if a < b]
        text += "".join(f"\n  top {top}: {a} and {b} share {share:.0%} of their experts" for a, b, share in pairs)
    say(args, {"output": args.output, **content}, text)
    return 0


def plan_flags(p: argparse.ArgumentParser) -> None:
    """who stays: a file a person can read and edit"""
    add_checkpoint(p, required=False)
    add_config(p)
    add_plan(p)
    add_output(p, "PLAN.json")


def plan(args: argparse.Namespace) -> int:
    from xmoe.outputs import check_free

    check_free(args.output, args.overwrite)
    made = plan_from(args)
    made.save(args.output, args.overwrite)
    say(args, {"output": args.output, "kept": made.kept, "remarks": made.remarks()}, made.summary())
    return 0


def prune_flags(p: argparse.ArgumentParser) -> None:
    """the smaller checkpoint, its manifest and model card; kept weights are copied byte for byte"""
    add_checkpoint(p)
    p.add_argument("--plan", metavar="PLAN.json", help="what `plan` wrote; or give the flags of `plan`, or a recipe")
    add_config(p)
    add_plan(p)
    p.add_argument("--pad", action="store_true", help="uneven counts: fill up with dead experts, for stock loaders")
    p.add_argument("--recipe", action="store_true", help="write only plan.json into --output, to be applied elsewhere")
    add_output(p, "DIR")


def prune(args: argparse.Namespace) -> int:
    from xmoe.compression import manifest
    from xmoe.compression.cut import prune_checkpoint
    from xmoe.compression.plan import PrunePlan
    from xmoe.errors import ConfigError
    from xmoe.outputs import new_folder

    check_output(args)
    if args.plan:
        given = ("stats", "criterion", "keep", "budget", "protect", "remove", "ranking", "guard", "config")
        if idle := [name for name in given if getattr(args, name) is not None]:
            raise ConfigError(
                f"--plan says who stays already, so --{idle[0]} would not be obeyed; leave one of them out"
            )
    chosen = PrunePlan.load(args.plan) if args.plan else plan_from(args)
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

    check_output(args)
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
    p.add_argument(
        "--method",
        required=True,
        metavar="magnitude|neurons|low-rank|int8|int4|mxfp4[,...]",
        help="any sequence, done in this order",
    )
    p.add_argument("--fraction", type=float, metavar="F", help="of bytes, or of weights where no byte can move")
    p.add_argument(
        "--experts", default="", metavar="L:E,...", help="touch only these; L:* is a layer (neurons takes all or none)"
    )
    p.add_argument(
        "--stats", metavar="STATS[,...]", help="recorded with --sample: what experts are fed, to score and fit"
    )
    p.add_argument("--scope", metavar="row|tensor|expert|layer|global", help="of magnitude (default: tensor; else row)")
    p.add_argument(
        "--score", default="magnitude", metavar="magnitude|wanda|moe-pruner", help="of magnitude: what counts as small"
    )
    p.add_argument("--pattern", metavar="N:M", help="magnitude: keep N of every M along the inputs")
    p.add_argument("--group-size", type=int, default=32, metavar="32|64|128", help="of int4")
    p.add_argument("--rank", metavar="R[,R]", help="of low-rank, in place of --fraction: gate_up and down")
    p.add_argument("--whiten", action="store_true", help="fit low-rank factors to what each expert is fed")
    add_data(p, 16_384, required=False)
    add_output(p, "DIR")


def numbers(text: str | None, flag: str, separator: str, expected: str) -> tuple[int, int] | None:
    """`2:4` with the separator `:` -> (2, 4)."""
    from xmoe.errors import ConfigError

    parts = (text or "").split(separator)
    if text and not (len(parts) == 2 and all(part.isdigit() for part in parts)):
        raise ConfigError(f"--{flag} {text}: expected {expected}")
    return (int(parts[0]), int(parts[1])) if text else None


def whole_layers(text: str, config) -> str:
    """`1:*` written out as all experts of layer 1; anything else stays as it is."""
    written = []
    for part in filter(None, text.split(",")):
        layer = part.removesuffix(":*")
        if layer != part and layer.isdigit() and int(layer) < config.num_hidden_layers:
            written += [f"{layer}:{e}" for e in range(config.experts_in_layer(int(layer)))]
        else:
            written.append(part)
    return ",".join(written)


def reduce(args: argparse.Namespace) -> int:
    from xmoe.compression.reduce_checkpoint import operations, reduce_checkpoint

    check_output(args)
    pattern = numbers(args.pattern, "pattern", ":", "N:M, such as 2:4")
    one_rank = args.rank and args.rank.isdigit()
    rank = numbers(f"{args.rank},{args.rank}" if one_rank else args.rank, "rank", ",", "R or R,R, such as 96,64")
    device, dtype = device_and_dtype(args)
    checkpoint, tokenizer = tokenizer_of(args.checkpoint)
    config = checkpoint.config
    stages = reduce_checkpoint(
        checkpoint,
        args.output,
        args.method.split(","),
        args.fraction,
        experts=places(whole_layers(args.experts, config), config.num_hidden_layers, "experts") or None,
        stats=load_stats(args.stats) if args.stats else None,
        batches=data_batches(args, tokenizer, checkpoint.folder) if args.data else None,
        device=device,
        dtype=dtype,
        command=args.line,
        overwrite=args.overwrite,
        scope=args.scope,
        score=args.score,
        pattern=pattern,
        group_size=args.group_size,
        rank=rank,
        whiten=args.whiten,
    )
    report = {"output": args.output, "stages": operations(stages, args.fraction)}
    say(args, report, "\n".join(stage.line() for stage in stages))
    return 0


def recover_flags(p: argparse.ArgumentParser) -> None:
    """quality won back by distilling the uncut model into routers, experts (packed ones too) or all"""
    add_checkpoint(p)
    p.add_argument("--teacher", required=True, metavar="DIR|NAME", help="the uncut model")
    p.add_argument(
        "--train",
        default="routers",
        metavar="routers|experts|all",
        help="(default: routers) packed experts are trained in fp32, 24 bytes a weight, and packed again",
    )
    p.add_argument("--steps", type=int, default=200, metavar="N", help="(default: 200)")
    p.add_argument("--lr", type=float, metavar="LR", help="peak learning rate")
    add_data(p, 200_000)
    add_output(p, "DIR")


def recover(args: argparse.Namespace) -> int:
    from xmoe.checkpoint.weights import load
    from xmoe.compression.changed import save_changed
    from xmoe.compression.recover import recover as distil
    from xmoe.compression.unpacked import formats, memory

    check_output(args)
    device, dtype = device_and_dtype(args)
    student, tokenizer = load(args.checkpoint, device, dtype)
    teacher, _ = load(args.teacher, device, dtype)
    packed = formats(student) if args.train != "routers" else []
    if packed:
        room = f"{memory(student) / 1e9:,.2f} GB beside the model"
        print(f"training {' and '.join(packed)} experts in fp32, which takes {room}", file=sys.stderr)
    result = distil(
        student,
        teacher,
        data_batches(args, tokenizer, student.source.folder),
        train=args.train,
        steps=args.steps,
        lr=args.lr,
    )
    operation = {"name": "recover", "train": args.train, "steps": args.steps, "tokens": result.tokens}
    save_changed(student, args.checkpoint, args.output, [operation], command=args.line, overwrite=args.overwrite)
    first, last = result.losses[0], sum(result.losses[-10:]) / len(result.losses[-10:])
    summary = {"output": args.output, "parameters": result.parameters, "tokens": result.tokens}
    text = (
        f"wrote {args.output}: {result.parameters:,} parameters trained on {result.tokens:,} tokens; KL to the teacher "
        f"{first:.4f} -> {last:.4f} nats a token"
    )
    if result.stored is not None:
        summary |= {"before_kl": result.before, "trained_kl": result.trained, "stored_kl": result.stored}
        text += (
            f"; on the first tokens of the text {result.before:.4f} before, {result.trained:.4f} in floating point, "
            f"{result.stored:.4f} stored as {' and '.join(packed)}"
        )
        if result.stored > result.before:
            text += ": MORE than before, so keep the model as it was or try a smaller --lr"
    say(args, summary | {"first_kl": first, "last_kl": last}, text)
    return 0


# name -> its flags, what it does, and the example at the end of its help
COMMANDS = {
    "record": (record_flags, record, "--checkpoint DIR --data python --tokens 100000 --output r.safetensors"),
    "import": (import_flags, import_summaries, "--format fingerprint --data DIR --domain law --output law.safetensors"),
    "fingerprint": (fingerprint_flags, fingerprint, "--stats law.safetensors,math.safetensors --output experts.json"),
    "plan": (plan_flags, plan, "--stats r.safetensors --criterion reap --keep 16 --output plan.json"),
    "prune": (prune_flags, prune, "--checkpoint DIR --plan plan.json --output DIR-16"),
    "verify": (verify_flags, verify, "--source DIR --pruned DIR-16"),
    "sweep": (
        sweep_flags,
        sweep,
        "--checkpoint DIR --stats r.safetensors --criterion frequency,reap --keep 28,24,16 --data python --output swept",
    ),
    "merge": (merge_flags, merge, "--checkpoint DIR --stats r.safetensors --method ream --keep 16 --output DIR-merged"),
    "reduce": (reduce_flags, reduce, "--checkpoint DIR --method neurons,int8 --fraction 0.25 --output DIR-small"),
    "recover": (recover_flags, recover, "--checkpoint DIR-16 --teacher DIR --data python --output DIR-16-recovered"),
}


if __name__ == "__main__":
    command.run(main)
