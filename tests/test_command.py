"""Mistakes become one line and exit code 2; devices and dtypes are checked; the package is quick to import."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch

import xmoe
from xmoe import command
from xmoe.device import pick_device, pick_dtype
from xmoe.errors import ConfigError


def outcome(main, capsys, argv=()):
    with pytest.raises(SystemExit) as left:
        command.run(main, list(argv))
    return left.value.code, capsys.readouterr()


def raising(error):
    def main(argv):
        raise error

    return main


def test_exit_codes_and_messages(capsys):
    code, out = outcome(raising(ConfigError("found 3; expected 4; try 4")), capsys)
    assert code == 2 and out.err == "error: found 3; expected 4; try 4\n" and out.out == ""
    code, out = outcome(raising(KeyboardInterrupt("step 7 was saved")), capsys)
    assert code == 130 and out.err == "stopped: step 7 was saved\n"
    code, out = outcome(raising(OSError(errno.ENOSPC, "No space left on device", "/out")), capsys)
    assert code == 2 and "No space left on device" in out.err and out.err.count("\n") == 1
    assert outcome(lambda argv: None, capsys)[0] == 0 and outcome(lambda argv: 1, capsys)[0] == 1
    with pytest.raises(ZeroDivisionError):  # our own bugs keep their traceback
        command.run(raising(ZeroDivisionError()), [])


def test_wrong_flags_are_mistakes_too(capsys):
    def main(argv):
        p = command.parser("Does things.", "python scripts/do.py --checkpoint DIR")
        command.add_common(p)
        p.parse_args(argv)

    code, out = outcome(main, capsys, ["--checkpoint", "x", "--colour", "red"])
    assert code == 2 and out.err.startswith("error: unrecognized arguments: --colour red; try")
    code, out = outcome(main, capsys, ["--help"])
    assert code == 0 and out.out.rstrip().endswith("python scripts/do.py --checkpoint DIR")


def test_devices_and_dtypes():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"device 'cuda:99' is not on this machine; it has .*cpu"):
        pick_device("cuda:99")
    with pytest.raises(ConfigError, match="device 'gpu'"):
        pick_device("gpu")
    assert pick_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    with pytest.raises(ConfigError, match="float16 overflows"):
        pick_dtype("float16", torch.device("cpu"))


def test_import_is_light():
    heavy = "triton datasets wandb transformers torch numpy"
    code = f"import sys, xmoe; print(*[m for m in '{heavy}'.split() if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
    code = "import sys, xmoe; xmoe.build; print(*[m for m in 'triton datasets wandb transformers'.split() if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_every_public_name_exists():
    for name in xmoe.__all__:
        assert getattr(xmoe, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'biuld'"):
        xmoe.biuld  # noqa: B018
