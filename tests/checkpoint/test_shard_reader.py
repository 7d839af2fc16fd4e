"""Reading a folder of safetensors files; whatever is in it, the answer is its tensors or a CheckpointError."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.small_tensors import TENSORS, one_file
from xmoe.checkpoint.shard_reader import INDEX, ShardReader
from xmoe.errors import CheckpointError


def index_of(folder, **weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_writing_into_a_view_never_reaches_the_file(tmp_path):
    save_file({"x": torch.ones(8)}, tmp_path / "model.safetensors")
    ShardReader(tmp_path).tensor("x").zero_()
    assert load_file(tmp_path / "model.safetensors")["x"].eq(1).all()


def test_shards_and_index_that_disagree(tmp_path):
    one_file(tmp_path)
    right = dict.fromkeys("abcd", "model.safetensors")
    index_of(tmp_path, **right)
    assert len(ShardReader(tmp_path)) == 4
    index_of(tmp_path, **right, z="model.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors that are not in the shard it says: z"):
        ShardReader(tmp_path)
    index_of(tmp_path, **right, z="model-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards: model-00002\.safetensors"):
        ShardReader(tmp_path)
    index_of(tmp_path, a="model.safetensors")
    with pytest.raises(CheckpointError, match=r"3 tensors in its shards of which the index knows nothing: [bcd]"):
        ShardReader(tmp_path)
    for elsewhere in ("../model.safetensors", "/etc/passwd", "model.bin"):
        index_of(tmp_path, a=elsewhere)
        with pytest.raises(CheckpointError, match="of the same folder"):
            ShardReader(tmp_path)
    index_of(tmp_path, **{"a\nb": "model.safetensors"})
    with pytest.raises(CheckpointError, match=r"names a tensor 'a\\nb'"):
        ShardReader(tmp_path)
    for text in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff", "[" * 100_000):
        (tmp_path / INDEX).write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError):
            ShardReader(tmp_path)


def test_a_numbered_shard_that_is_missing_without_an_index(tmp_path):
    for number, name in ((1, "a"), (3, "c")):
        save_file({name: TENSORS[name]}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="lacks 1 of 00003 shards: numbers 2"):
        ShardReader(tmp_path)
    save_file({"a": TENSORS["a"]}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="a stands both in"):
        ShardReader(tmp_path)


def test_files_of_another_kind_may_lie_beside_the_weights(tmp_path):
    save_file({"count": TENSORS["a"]}, tmp_path / "routing.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "model.safetensors")
    assert set(ShardReader(tmp_path)) == {"a"}
    (tmp_path / "model.safetensors").unlink()
    assert set(ShardReader(tmp_path)) == {"count"}  # nothing is named model*, so everything counts


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_pickled_weights_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        CheckpointError, match=r"pickled weights \(model\.pt, pytorch_model\.bin\), which are never opened"
    ):
        ShardReader(tmp_path)


def test_folders_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="has no weights; expected"):
        ShardReader(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        ShardReader(tmp_path / "nowhere")
    one_file(tmp_path / "original")
    with pytest.raises(CheckpointError, match="original, pass that folder"):
        ShardReader(tmp_path)
