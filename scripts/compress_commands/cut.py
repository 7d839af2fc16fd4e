"""prune, verify: the smaller checkpoint, and the proof of it."""

from __future__ import annotations

import argparse

from compress_commands.decide import add_plan, plan_from
from compress_commands.flags import add_checkpoint, add_config, add_output, check_output, say


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
