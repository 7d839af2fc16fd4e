"""Tensors in huge pages are those of the file, read or, where they lie so, mapped; a file cut short is told."""

from __future__ import annotations

import os

import pytest
import torch

from xmoe.checkpoint import huge_pages
from xmoe.checkpoint.huge_pages import HugePageReader
from xmoe.checkpoint.shard_header import ALIGNMENT
from xmoe.checkpoint.shard_reader import ShardReader
from xmoe.checkpoint.shard_writer import SINGLE, ShardWriter
from xmoe.checkpoint.weights import load
from xmoe.errors import CheckpointError
from xmoe.kernels import memory

needs_huge_pages = pytest.mark.skipif(
    memory.empty_in_huge_pages((memory.HUGE,), torch.uint8) is None, reason="a system without huge pages"
)
TENSORS = {"a": (torch.bfloat16, (304, 96)), "b": (torch.uint8, (5, 9001)), "c": (torch.float32, (33,))}


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(tmp_path, TENSORS) as writer:
        for name, (dtype, shape) in TENSORS.items():
            writer.append(name, torch.randint(0, 250, shape, generator=generator).to(dtype))
    return tmp_path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(memory, "HUGE", 4096)  # so that small tensors are moved, too
    monkeypatch.setattr(huge_pages, "_PIECE", 4096 + 17)  # many pieces, none of them a whole page


@needs_huge_pages
def test_they_are_read_and_not_mapped(folder):
    mapped, read = ShardReader(folder), HugePageReader(folder, leave=["b"])
    for name in TENSORS:
        assert torch.equal(read.tensor(name), mapped.tensor(name)) and read.tensor(name).dtype == TENSORS[name][0]
    a = read.tensor("a")
    assert read.settle(a) is a, "it lies there already"
    wide = a.float()
    assert torch.equal(read.settle(wide), wide) and read.settle(wide) is not wide
    with open(folder / SINGLE, "r+b") as f:  # a map sees what is written, a copy does not
        f.seek(ShardReader(folder)["a"].start)
        f.write(b"\xff" * 50)
    assert torch.equal(a.float(), wide)


@needs_huge_pages
def test_a_shard_that_lies_in_huge_pages_stays_mapped(folder, monkeypatch):
    """But for tensors at odd addresses, which would be copied anyway."""
    monkeypatch.setattr(huge_pages, "HUGE", 4096)
    asked = []
    monkeypatch.setattr(huge_pages, "_huge_bytes", lambda address: asked.append(address) or 1 << 40)
    plain, reader, late = ShardReader(folder), HugePageReader(folder), HugePageReader(folder)
    mapped = []
    for name in ("a", "b"):
        found = reader.tensor(name)
        assert torch.equal(found, plain.tensor(name)) and found.dtype == TENSORS[name][0]
        assert reader.settle(found) is found
        if 0 <= found.data_ptr() - asked[0] < os.path.getsize(folder / SINGLE):
            mapped.append(name)
    assert len(set(asked)) == 1, "a shard is mapped once"
    assert mapped == [name for name in ("a", "b") if plain[name].start % ALIGNMENT == 0] and len(mapped) == 1
    os.truncate(folder / SINGLE, os.path.getsize(folder / SINGLE) // 3)
    with pytest.raises(CheckpointError, match="was shortened while"):
        for name in ("a", "b"):
            late.tensor(name)


@needs_huge_pages
def test_it_stays_mapped_only_if_most_of_it_lies_so(folder, monkeypatch):
    """The share is of what is wanted: windows of tensors that are left out are neither touched nor counted."""
    monkeypatch.setattr(huge_pages, "HUGE", 4096)
    info = ShardReader(folder)["a"]
    file, size = folder / SINGLE, os.path.getsize(folder / SINGLE)
    every = size // 4096
    without = sum(1 for i in range(every) if i * 4096 >= info.stop or (i + 1) * 4096 <= info.start)
    assert 0 < without < every - 2
    for left, count in ([], every), ([info], without):
        for share, stays in (0.8, True), (0.7, False):
            monkeypatch.setattr(huge_pages, "_huge_bytes", lambda _, n=share * count * 4096: n)
            assert (huge_pages._mapped_in_huge_pages(file, left) is not None) == stays
    assert huge_pages._mapped_in_huge_pages(folder / "absent", []) is None


def test_memory_that_is_no_file_has_no_huge_pages_of_one():
    assert huge_pages._huge_bytes(torch.ones(5).data_ptr()) == 0 and huge_pages._huge_bytes(1) == 0


@needs_huge_pages
def test_a_file_cut_short_or_gone_is_one_clear_line(folder):
    reader = HugePageReader(folder)
    os.truncate(folder / SINGLE, os.path.getsize(folder / SINGLE) // 2)
    with pytest.raises(CheckpointError, match="was shortened while"):
        for name in ("a", "b"):
            reader.tensor(name)
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        reader.tensor("a")


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"experts": "dense"}])
def test_converted_weights_are_the_same(published, settings):
    mapped, moved = (load(published("hf-mxfp4"), huge_pages=h, **settings)[0].state_dict() for h in (False, True))
    assert all(torch.equal(t, mapped[n]) and t.dtype == mapped[n].dtype for n, t in moved.items())
