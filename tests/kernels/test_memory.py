"""Freed memory stays with the process, so that the second step does not fault its pages in again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from xmoe.kernels import memory

PROGRAM = """
import resource, sys, torch
from xmoe.kernels import memory

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.empty(mb << 20, dtype=torch.uint8).fill_(1) for mb in (40, 3, 70, 9, 50)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert memory.keep_freed_pages() and memory.keep_freed_pages()
counts = [step() for _ in range(8)]
print(sum(counts[4:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting belongs to glibc")
def test_later_steps_fault_hardly_any_pages():
    counts = {}
    for mode in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counts[mode] = int(done.stdout)
    assert counts["keep"] < counts["default"] / 4


def test_another_c_library_is_left_alone(monkeypatch):
    from xmoe.kernels import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed_pages.__wrapped__() is False


def test_a_copy_in_huge_pages_has_the_same_values():
    for shape, dtype in ((3, 5, 300_000), torch.uint8), ((1_100, 1_003), torch.bfloat16):
        x = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        copy = memory.in_huge_pages(x[1:])
        assert torch.equal(copy, x[1:]) and copy.dtype == dtype and copy.is_contiguous()
    small = torch.ones(7)
    assert memory.in_huge_pages(small) is small


def test_room_in_huge_pages_is_zero_and_of_the_asked_kind():
    room = memory.empty_in_huge_pages((3, 700_001), torch.float32)
    if room is not None:  # Linux
        assert room.shape == (3, 700_001) and room.dtype == torch.float32 and not room.any()
    assert memory.empty_in_huge_pages((7, 5), torch.float32) is None, "smaller than a page"
