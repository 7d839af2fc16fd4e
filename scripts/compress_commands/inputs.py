"""What the shared flags name, opened: recipe, text, statistics, tokenizer, device."""

from __future__ import annotations

import argparse


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


def load_stats(text: str):
    from xmoe.compression.routing import RoutingStats

    first, *rest = [RoutingStats.load(part) for part in text.split(",") if part]
    for other in rest:
        first = first + other
    return first


def tokenizer_of(path: str):
    from xmoe.checkpoint.opened import Checkpoint
    from xmoe.checkpoint.sidecars import load_tokenizer

    checkpoint = Checkpoint(path)
    return checkpoint, load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)


def device_and_dtype(args: argparse.Namespace):
    """--dtype auto is what the checkpoint has."""
    from xmoe.device import pick_device, pick_dtype

    device = pick_device(args.device)
    return device, args.dtype if args.dtype == "auto" else pick_dtype(args.dtype, device)
