"""Flags that several commands share."""

from __future__ import annotations

import argparse
import json

from xmoe import command


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


def add_config(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--config", metavar="FILE.yaml", help="a recipe, such as those in configs/compress; flags override it"
    )
    command.add_set(p)


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


def say(args: argparse.Namespace, result: dict, text: str) -> None:
    """The result: one JSON object with --json, else `text`."""
    print(json.dumps(result) if args.json else text)
