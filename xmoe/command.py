"""The manners that all commands share: common flags, one line for a mistake, exit codes.

Exit codes: 0 done, 1 ran but the answer is no (a verification that failed, a benchmark that broke), 2 a user's
mistake, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable

from xmoe.errors import XmoeError


class _Parser(argparse.ArgumentParser):
    """Prints a wrong flag as every other mistake is printed: one line, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; try {self.prog} --help\n")


def parser(description: str, example: str = "") -> argparse.ArgumentParser:
    """An ArgumentParser whose --help ends with `example`, the command a newcomer would type first."""
    epilog = f"example:\n  {example}" if example else None
    return _Parser(description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_common(p: argparse.ArgumentParser, checkpoint: bool = True) -> None:
    """Add --checkpoint (a folder or a hub name), --device, --dtype, --seed and --json to `p`."""
    if checkpoint:
        p.add_argument("--checkpoint", required=True, metavar="DIR|NAME", help="a folder or a hub name")
    p.add_argument("--device", default="auto", metavar="auto|cpu|mps|cuda[:N]", help="where to run (default: auto)")
    p.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16", help="compute type (default: auto)")
    p.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    p.add_argument("--json", action="store_true", help="print one JSON object on standard output and nothing else")


def add_projections(p: argparse.ArgumentParser) -> None:
    """Add --projections, in which form a model's attention projections and unembedding are held."""
    p.add_argument(
        "--projections",
        choices=("stored", "int8"),
        default="stored",
        help="int8, on the CPU: attention's projections and the unembedding rounded to 8 bits, faster decoding",
    )


def add_set(p: argparse.ArgumentParser) -> None:
    """Add --set section.key=value, which overrides one value of a config and may be repeated."""
    p.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a config value")


def run(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> None:
    """Call `main(argv)` and leave with its exit code; mistakes become one line on standard error."""
    try:
        code = main(argv)
    except XmoeError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as e:
        print(f"stopped: {e or 'nothing was written'}", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `... | head` closed the pipe; nothing is wrong
        sys.stderr.close()
        code = 0
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        print(
            f"error: cannot write {e.filename or 'the output'}: {e.strerror}; nothing was left there", file=sys.stderr
        )
        code = 2
    sys.exit(code or 0)
