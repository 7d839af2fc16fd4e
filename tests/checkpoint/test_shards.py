"""Reading, copying and writing safetensors files; whatever is done to a header, the answer is a CheckpointError."""

import hashlib
import json
import pickle
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from xmoe.checkpoint import shards
from xmoe.checkpoint.shards import ShardReader, ShardWriter
from xmoe.errors import CheckpointError

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).view(4, 6),
    "b": torch.arange(9, dtype=torch.uint8).view(3, 3, 1),
    "c": torch.randn(5, 7).bfloat16(),
    "d": torch.tensor(3, dtype=torch.int64),
    "e": torch.zeros(0, 4),
}


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
        index = json.loads((tmp_path / shards.INDEX).read_text())
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
    monkeypatch.setattr(shards, "_COPY_BUFFER", buffer)
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


def test_writing_into_a_view_never_reaches_the_file(tmp_path):
    save_file({"x": torch.ones(8)}, tmp_path / "model.safetensors")
    ShardReader(tmp_path).tensor("x").zero_()
    assert load_file(tmp_path / "model.safetensors")["x"].eq(1).all()


# ------------------------------------------------------------------------------------------------------ bad input


def one_file(folder):
    folder.mkdir(exist_ok=True)
    save_file({k: v for k, v in TENSORS.items() if v.numel()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def index_of(folder, **weight_map):
    (folder / shards.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_truncated_file(tmp_path):
    file = one_file(tmp_path)
    data = file.read_bytes()
    for size in (len(data) - 1, len(data) - 100, 40, 8, 7, 0):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"truncated|damaged") as caught:
            ShardReader(tmp_path)
        assert "\n" not in str(caught.value)
    file.write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match="1 bytes follow the last tensor"):
        ShardReader(tmp_path)


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
        (tmp_path / shards.INDEX).write_text(text, encoding="latin-1")
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


def survives(folder) -> bool:
    """Whether the folder reads to the end; anything but a CheckpointError is a crash."""
    try:
        reader = ShardReader(folder)
        for name in reader:
            reader.tensor(name).float().sum()
    except CheckpointError as e:
        assert "\n" not in str(e)
        return False
    return True


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=True) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 60),
)
def test_fuzz_bytes_of_the_header(tmp_path, edits, cut):
    """Any bytes of the header changed, the file's end cut off or not."""
    file = one_file(tmp_path)
    data = bytearray(file.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for at, value in edits:
        data[at % header] = value
    file.write_bytes(data[: len(data) - cut] if cut % 3 == 0 else data)
    survives(tmp_path)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fuzz_values_of_the_header(tmp_path, data):
    """A well-formed JSON header in which any value is replaced by any other."""
    file = one_file(tmp_path)
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()):
        header[name] = data.draw(JSON)
    else:
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "format"]))
        small = st.lists(st.integers(-3, 50), max_size=4)
        dtype = st.sampled_from([*shards.DTYPES, "F4", "bf16"])
        header[name][key] = data.draw(JSON | small | dtype)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    survives(tmp_path)


def test_the_fuzzed_file_is_sound_before_it_is_broken(tmp_path):
    one_file(tmp_path)
    assert survives(tmp_path)
