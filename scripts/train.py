"""Train a model from a config file, alone or under torchrun."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from xmoe import command
from xmoe.config import explain, resolve


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__, "python scripts/train.py --config configs/train/quickstart.yaml --set optim.lr=1e-3")
    p.add_argument(
        "--config", metavar="FILE", help="what to train; with --resume, the run folder's own run.yaml by default"
    )
    p.add_argument("--output", metavar="DIR", help="the run folder (default: checkpoints/NAME after the config file)")
    p.add_argument("--resume", action="store_true", help="go on from the newest save in the run folder")
    p.add_argument("--overwrite", action="store_true", help="replace an old run folder")
    p.add_argument("--print-config", action="store_true", help="show every setting and where it comes from, then stop")
    command.add_common(p, checkpoint=False)
    command.add_set(p)
    p.set_defaults(device=None, dtype=None, seed=None)
    args = p.parse_args(argv)

    # Imported late, so that --help and a wrong flag answer at once.
    from xmoe.training.config import RunConfig
    from xmoe.training.trainer import train

    if args.config is None:
        if not (args.resume and args.output):
            p.error("--config FILE is needed (or --resume with --output, the folder of the run to go on with)")
        args.config = str(Path(args.output) / "run.yaml")
    overrides = list(args.set)
    for flag, key in (("device", "train.device"), ("dtype", "train.precision"), ("seed", "train.seed")):
        if getattr(args, flag) is not None:
            overrides.append(f"{key}={getattr(args, flag)}")
    if args.print_config:
        print(explain(*resolve(RunConfig, args.config, overrides)), end="")
        return 0
    run = train(
        args.config,
        overrides,
        output=args.output,
        resume=args.resume,
        overwrite=args.overwrite,
        console=sys.stderr if args.json else sys.stdout,
    )
    if args.json:
        print(json.dumps({**dataclasses.asdict(run), "checkpoint": str(run.checkpoint)}))
    return 0


if __name__ == "__main__":
    command.run(main)
