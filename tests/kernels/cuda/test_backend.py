"""When the Triton kernels are used and when not, and that nothing of them is imported where they are not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from xmoe.kernels.cuda import backend as triton_backend
from xmoe.quantization.packed import PackedWeight


@pytest.fixture
def machine(monkeypatch):
    """Pretend a CUDA device of some capability."""
    triton_backend._machine_reason.cache_clear()

    def pretend(capability=(9, 0), triton=True, hip=None):
        triton_backend._machine_reason.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr(torch.version, "hip", hip)
        return triton_backend.reason(torch.device("cuda", 0), torch.bfloat16)

    yield pretend
    triton_backend._machine_reason.cache_clear()


def test_importing_the_backend_imports_no_kernel():
    check = (
        "import sys, torch; before = set(sys.modules); import xmoe.kernels.dispatch, xmoe.kernels.cuda.backend;"
        "new = set(sys.modules) - before;"
        "print([m for m in new if m.split('.')[0] == 'triton' or 'kernels.triton_' in m])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("['xmoe.kernels.cuda.backend']", "[]")


def test_the_reason_names_what_is_missing(machine):
    assert "not on cpu" in triton_backend.reason(torch.device("cpu"), torch.bfloat16)
    assert "float64" in triton_backend.reason(torch.device("cuda", 0), torch.float64)
    assert machine() is None
    assert machine((8, 0)) is None
    assert "has 7.5" in machine((7, 5))
    assert "triton is not installed" in machine(triton=False)
    assert "ROCm" in machine(hip="6.4")


def test_takes_dense_and_mxfp4():
    dense = torch.randn(2, 32, 64)
    assert triton_backend.takes(dense, PackedWeight.encode(dense))
    assert not triton_backend.takes(dense, PackedWeight.encode(dense, "int8"))


def test_repacked_copies_follow_their_weight():
    """Remembered while nothing changes, made again when the bytes change, never kept beyond the weight."""
    weight = PackedWeight.encode(torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0)))
    first = triton_backend.in_kernel_order(weight, paired=True)
    assert triton_backend.in_kernel_order(weight, paired=True) is first
    assert triton_backend.in_kernel_order(weight, paired=None) is first
    other = triton_backend.in_kernel_order(weight, paired=False)
    assert not other.paired and not torch.equal(other.codes, first.codes)
    weight.blocks.bitwise_xor_(0x11)
    assert not torch.equal(triton_backend.in_kernel_order(weight, paired=False).codes, other.codes)
    held = len(triton_backend._copies)
    del weight
    assert len(triton_backend._copies) == held - 1
    dense = torch.randn(2, 4, 6)
    assert triton_backend.in_kernel_order(dense, paired=True) is dense
