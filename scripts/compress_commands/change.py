"""merge, reduce, recover: weights that were not in the source."""

from __future__ import annotations

import argparse
import sys

from compress_commands.flags import add_checkpoint, add_data, add_output, check_output, say
from compress_commands.inputs import data_batches, device_and_dtype, load_stats, tokenizer_of


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


def places(text: str, layers: int, flag: str) -> list[tuple[int, int]]:
    """`3:7` is expert 7 of layer 3, `7` is expert 7 of all layers."""
    from xmoe.compression.recipe import places as resolved
    from xmoe.compression.recipe import read_places

    return resolved(read_places(text, flag), layers)


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
