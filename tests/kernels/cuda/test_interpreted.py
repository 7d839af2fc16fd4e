"""Run the tests in `interpreted/` under Triton's interpreter: kernels as Python, on CPU tensors, in fp32 and fp16.

They need a process of their own, because a kernel is either interpreted or compiled from the moment it is imported.
bf16 is left out: the interpreter computes it wrongly, in silence.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed; its kernels are used on CUDA machines only")


def _version(package) -> tuple[int, ...]:
    return tuple(int(part) for part in package.__version__.split(".")[:2])


if _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
    pytest.skip("the interpreter of Triton 3.6 cannot loop under numpy 2.4 and newer", allow_module_level=True)

HERE = Path(__file__).parent / "interpreted"
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("files", [("mxfp4", "routing", "norm_rope"), ("experts", "attention", "decode")])
def test_interpreted(files):
    path = os.pathsep.join((str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "--tb=short", *(str(HERE / f"{name}.py") for name in files)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_all_interpreted_files_are_run():
    listed = {name for mark in test_interpreted.pytestmark for group in mark.args[1] for name in group}
    assert listed == {path.stem for path in HERE.glob("*.py")} - {"helpers"}
