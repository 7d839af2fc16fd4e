"""verify believes nothing: one flipped bit, two experts exchanged, or a manifest that lies is found."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xmoe.checkpoint.shard_reader import ShardReader
from xmoe.compression.cut import prune_checkpoint
from xmoe.compression.plan import PrunePlan
from xmoe.compression.verify import verify
from xmoe.errors import CheckpointError

KEPT = ((0, 2, 3, 6), (1, 2, 4, 5), (0, 1, 5, 6))


@pytest.fixture(params=["native", "openai"])
def folders(request, checkpoint, tmp_path):
    source = checkpoint(request.param)
    plan = PrunePlan("list", "uniform", (7, 7, 7), 3, kept=KEPT)
    return source, prune_checkpoint(source, plan, tmp_path / "out", max_shard_bytes=60_000)


def test_a_true_copy_is_proved(folders):
    source, pruned = folders
    found = verify(source, pruned)
    reader = ShardReader(pruned)
    assert found.ok and found.tensors == len(reader) and found.bytes == reader.total_bytes
    assert "12 experts and all else equal the source" in found.message


def test_any_single_flipped_bit_is_found(folders):
    source, pruned = folders
    tensors = sorted(ShardReader(pruned).tensors.values())

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, len(tensors) - 1), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
    def flipped(which, where, bit):
        info = tensors[which]
        at = info.start + int(where * info.nbytes)
        data = bytearray(info.file.read_bytes())
        data[at] ^= 1 << bit
        info.file.write_bytes(data)
        try:
            found = verify(source, pruned)
            assert not found.ok and info.name in found.message
        finally:
            data[at] ^= 1 << bit
            info.file.write_bytes(data)

    flipped()
    assert verify(source, pruned).ok


def test_a_swapped_pair_of_experts_is_found(folders):
    source, pruned = folders
    info = next(i for n, i in ShardReader(pruned).tensors.items() if n.endswith("blocks"))
    data = bytearray(info.file.read_bytes())
    rows = [slice(info.start + r * info.row_bytes, info.start + (r + 1) * info.row_bytes) for r in range(4)]
    data[rows[1]], data[rows[2]] = data[rows[2]], data[rows[1]]
    info.file.write_bytes(data)
    found = verify(source, pruned)
    assert not found.ok and f"{info.name}: expert 1 differs from expert" in found.message


def edit(pruned, change):
    content = json.loads((pruned / "manifest.json").read_text())
    change(content)
    (pruned / "manifest.json").write_text(json.dumps(content))


def _wrong_expert(m):
    m["kept"][1] = [1, 2, 4, 6]


def _descending(m):
    m["kept"][1] = [2, 1, 4, 5]


def _out_of_range(m):
    m["kept"][1] = [1, 2, 4, 7]


def _too_few(m):
    m["kept"][1] = [1, 2]


def _lost_layer(m):
    m["kept"].pop()


def _wrong_hash(m):
    name = sorted(m["tensors"])[3]
    m["tensors"][name] = "0" * 64


def _lost_tensor(m):
    m["tensors"].popitem()


def _other_source(m):
    m["source"]["files"][0]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wrong_expert, "differs from expert 6"),
        (_descending, r"manifest: layer 1 keeps \[2, 1, 4, 5\]"),
        (_out_of_range, "expected ascending experts out of 0..6"),
        (_too_few, "2 experts a token|experts a token; expected 2|not dead"),
        (_lost_layer, "lists 2 layers"),
        (_wrong_hash, "the manifest has another hash"),
        (_lost_tensor, "in the manifest and not in the folder"),
        (_other_source, "is not the one this folder was made from"),
    ],
)
def test_a_wrong_manifest_is_found(folders, change, message):
    source, pruned = folders
    edit(pruned, change)
    found = verify(source, pruned)
    assert not found.ok
    import re

    assert re.search(message, found.message), found.message


def test_folders_that_prove_nothing(folders, tmp_path):
    source, pruned = folders
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        verify(source, source)
    edit(pruned, lambda m: m.update(bit_exact=False))
    with pytest.raises(CheckpointError, match="is not bit-exact"):
        verify(source, pruned)
    (pruned / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is malformed"):
        verify(source, pruned)
    shutil.rmtree(pruned)
    with pytest.raises(CheckpointError):
        verify(source, pruned)
