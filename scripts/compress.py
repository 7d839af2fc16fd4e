"""Make a Mixture-of-Experts checkpoint smaller, and prove it: record, plan, prune, verify, merge, reduce, recover, ..."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for who loads this file by its path; run as a command, it stands there

from compress_commands.change import merge, merge_flags, recover, recover_flags, reduce, reduce_flags
from compress_commands.cut import prune, prune_flags, verify, verify_flags
from compress_commands.decide import plan, plan_flags, sweep, sweep_flags
from compress_commands.watch import fingerprint, fingerprint_flags, import_flags, import_summaries, record, record_flags

from xmoe import command

EXAMPLE = """python scripts/compress.py record --checkpoint checkpoints/light --data python --tokens 100000 --output r.safetensors
  python scripts/compress.py prune --checkpoint checkpoints/light --stats r.safetensors --criterion reap --keep 12 \\
      --output checkpoints/light-12"""

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


if __name__ == "__main__":
    command.run(main)
