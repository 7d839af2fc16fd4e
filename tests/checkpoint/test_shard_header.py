"""Headers of safetensors files; whatever is done to one, the answer is a CheckpointError."""

import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.small_tensors import one_file
from xmoe.checkpoint.shard_header import DTYPES
from xmoe.checkpoint.shard_reader import ShardReader
from xmoe.errors import CheckpointError


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
        dtype = st.sampled_from([*DTYPES, "F4", "bf16"])
        header[name][key] = data.draw(JSON | small | dtype)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    survives(tmp_path)


def test_the_fuzzed_file_is_sound_before_it_is_broken(tmp_path):
    one_file(tmp_path)
    assert survives(tmp_path)
