"""Writing and copying safetensors files: what is written is what the safetensors library reads."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.small_tensors import TENSORS
from xmoe.checkpoint import shard_writer
from xmoe.checkpoint.shard_reader import INDEX, ShardReader
from xmoe.checkpoint.shard_writer import ShardWriter


def announced(tensors):
    return {name: (t.dtype, t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize("limit", [10**9, 100, 1])
def test_written_files_are_read_by_the_safetensors_library(tmp_path, limit):
    with ShardWriter(tmp_path, announced(TENSORS), max_shard_bytes=limit) as writer:
        for name in reversed(TENSORS):
            writer.append(name, TENSORS[name])
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 100: 2, 1: 5}[limit]
    assert files[0] == ("model.safetensors" if limit > 1000 else f"model-00001-of-0000{len(files)}.safetensors")
    found = {}
    for file in files:
        found |= load_file(tmp_path / file)
    assert found.keys() == TENSORS.keys()
    reader = ShardReader(tmp_path)
    assert reader.total_bytes == sum(t.nbytes for t in TENSORS.values())
    for name, tensor in TENSORS.items():
        for got in (found[name], reader.tensor(name)):
            assert got.dtype == tensor.dtype and torch.equal(got, tensor)
    if limit < 1000:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == reader.total_bytes
        assert index["weight_map"].keys() == TENSORS.keys()


def test_pieces_along_dimension_zero(tmp_path):
    big = torch.randn(6, 3, 2)
    with ShardWriter(tmp_path, {"x": (big.dtype, big.shape), "y": (big.dtype, (2, 2))}) as writer:
        writer.append("x", big[:2])
        writer.append("y", torch.eye(2))
        for row in big[2:]:
            writer.append("x", row)
    assert torch.equal(ShardReader(tmp_path).tensor("x"), big)
    assert torch.equal(ShardReader(tmp_path).tensor("y"), torch.eye(2))


def test_what_fills_whole_units_is_aligned(tmp_path):
    sizes = {"odd": (torch.uint8, (65,)), "wide": (torch.float32, (48,)), "packed": (torch.uint8, (640,))}
    with ShardWriter(tmp_path, sizes) as writer:
        for name, (dtype, shape) in sizes.items():
            writer.append(name, torch.zeros(shape, dtype=dtype))
    reader = ShardReader(tmp_path)
    assert {n: reader.tensor(n).data_ptr() % 64 for n in ("wide", "packed")} == {"wide": 0, "packed": 0}


def test_an_incomplete_tensor_is_noticed(tmp_path):
    with (
        pytest.raises(AssertionError, match="never completed: x"),
        ShardWriter(tmp_path, {"x": (torch.float32, (3, 2))}) as writer,
    ):
        writer.append("x", torch.zeros(2, 2))


@pytest.mark.parametrize("buffer", [1 << 20, 5])
def test_rows_are_copied_byte_for_byte(tmp_path, monkeypatch, buffer):
    monkeypatch.setattr(shard_writer, "_COPY_BUFFER", buffer)
    source = {"blocks": torch.randint(0, 256, (9, 4, 16), dtype=torch.uint8), "bias": torch.randn(9, 3).bfloat16()}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_file(source, tmp_path / "a/model.safetensors")
    reader = ShardReader(tmp_path / "a")
    rows = [1, 2, 3, 7, 0]
    goal = {"blocks": (torch.uint8, (5, 4, 16)), "bias": (torch.bfloat16, (9, 3))}
    digest = hashlib.sha256()
    with ShardWriter(tmp_path / "b", goal) as writer:
        writer.copy_rows("blocks", reader, "blocks", rows, digest)
        writer.copy_rows("bias", reader, "bias")
    copied = load_file(tmp_path / "b/model.safetensors")
    assert torch.equal(copied["blocks"], source["blocks"][rows])
    assert torch.equal(copied["bias"], source["bias"])
    assert digest.hexdigest() == hashlib.sha256(source["blocks"][rows].numpy().tobytes()).hexdigest()
