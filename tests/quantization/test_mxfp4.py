"""The format by its definition, written out the slow way; every byte and every scale."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.errors import CheckpointError, ConfigError
from xmoe.quantization import mxfp4

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def nibble_value(nibble: int) -> float:
    return -GRID[nibble - 8] if nibble >= 8 else GRID[nibble]


def nearest_code(x: float) -> int:
    """By exhaustive search, ties to the even code."""
    return min(range(8), key=lambda c: (abs(GRID[c] - abs(x)), c % 2)) | (8 if x < 0 else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode_every_byte_under_every_scale(dtype):
    scales = torch.arange(255, dtype=torch.uint8)
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(255, 16, 16)
    got = mxfp4.decode(blocks, scales.view(255, 1).expand(255, 16).contiguous(), dtype)
    pairs = [[nibble_value(b % 16), nibble_value(b // 16)] for b in range(256)]
    values = torch.tensor(pairs, dtype=torch.float64).flatten()
    exact = values * torch.tensor([2.0 ** (s - 127) for s in range(255)], dtype=torch.float64)[:, None]
    assert torch.equal(got.view(BITS[dtype]), exact.to(dtype).view(BITS[dtype]))
    assert torch.equal(got[:253].double(), exact[:253])  # all finite and none of them rounded


def test_decode_of_the_published_example():
    blocks = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2], dtype=torch.uint8)
    got = mxfp4.decode(blocks, torch.tensor([127], dtype=torch.uint8), torch.float32)
    assert got[:16].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert math.copysign(1, got[8].item()) == -1


def test_decode_goes_on_beyond_one_chunk(monkeypatch):
    blocks = torch.randint(0, 256, (3, 5, 7, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 5, 7), dtype=torch.uint8)
    whole = mxfp4.decode(blocks, scales)
    monkeypatch.setattr(mxfp4, "_CHUNK", 4)
    assert torch.equal(mxfp4.decode(blocks, scales), whole)
    assert whole.shape == (3, 5, 224)
    assert torch.equal(mxfp4.decode(blocks[1, 2], scales[1, 2]), whole[1, 2])


def test_decode_of_strided_and_meta_tensors():
    blocks = torch.randint(0, 256, (6, 4, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (6, 4, 2), dtype=torch.uint8)
    assert torch.equal(mxfp4.decode(blocks[::2], scales[::2]), mxfp4.decode(blocks, scales)[::2])
    assert mxfp4.decode(blocks.to("meta"), scales.to("meta"), torch.float32).shape == (6, 4, 64)


@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_encoding_decoded_values_changes_no_value(rule):
    torch.manual_seed(1)
    blocks = torch.randint(0, 256, (11, 3, 16), dtype=torch.uint8)
    scales = torch.randint(2, 252, (11, 3), dtype=torch.uint8)
    values = mxfp4.decode(blocks, scales, torch.float32)
    again = mxfp4.decode(*mxfp4.encode(values, rule), torch.float32)
    assert torch.equal(again, values)


@pytest.mark.parametrize(("rule", "error"), [("ceil", 0.1186), ("ocp", 0.1141), ("best", 0.1114)])
def test_gaussian_error(rule, error):
    """At the width 0.02 of initialised weights; the error depends on where amax falls between powers of two."""
    weight = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    decoded = mxfp4.decode(*mxfp4.encode(weight, rule), torch.float32)
    relative = ((decoded - weight).norm() / weight.norm()).item()
    assert abs(relative - error) < 0.001


def test_best_is_never_worse_than_its_three_candidates():
    weight = torch.randn(500, 32, generator=torch.Generator().manual_seed(2)) * torch.logspace(-30, 30, 500)[:, None]

    def errors(rule):
        decoded = mxfp4.decode(*mxfp4.encode(weight, rule), torch.float32).double()
        return (decoded - weight).square().sum(-1)

    assert (errors("best") <= errors("ocp")).all()
    assert (errors("best") < errors("ocp")).any()
    # ceil first rounds to bfloat16, so it may win by a hair of that rounding, never by more
    assert (errors("best") <= errors("ceil") * 1.02).all()


@given(
    st.lists(
        st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32, allow_subnormal=False), min_size=32, max_size=32
    )
)
@settings(max_examples=150, deadline=None)
def test_ocp_encoding_by_search(values):
    weight = torch.tensor([values], dtype=torch.float32)
    blocks, scales = mxfp4.encode(weight, "ocp")
    amax = max(map(abs, values))
    if amax == 0:
        assert scales.tolist() == [[0]] and not blocks.any()
        return
    exponent = max(math.frexp(amax)[1] - 3, -127)
    assert scales.item() == exponent + 127
    nibbles = torch.stack((blocks & 15, blocks >> 4), -1).flatten().tolist()
    for value, nibble in zip(values, nibbles):
        x = float(torch.tensor(value).double()) * 2.0**-exponent
        code = nearest_code(x)
        assert nibble == (0 if code == 8 else code), (x, nibble)  # a zero never carries a sign


@pytest.mark.parametrize(
    ("x", "value"), [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4), (7.9, 6), (-0.25, 0)]
)
def test_ties_go_to_the_even_code(x, value):
    weight = torch.zeros(32)
    weight[0], weight[1] = 4.0, x  # 4 makes the OCP scale 1
    decoded = mxfp4.decode(*mxfp4.encode(weight, "ocp"), torch.float32)
    assert decoded[1].item() == value


@pytest.mark.parametrize("amax", [6.0, 6.03125, 3.0, 2.9, 96.0, 97.0, 0.046875, 1.0])
def test_ceil_never_saturates_and_is_the_least_such_scale(amax):
    weight = torch.zeros(32)
    weight[7] = -amax
    _, scales = mxfp4.encode(weight, "ceil")
    scale = 2.0 ** (scales.item() - 127)
    assert amax <= 6 * scale
    assert amax > 6 * scale / 2


@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_the_ends_of_the_range(rule):
    """Zeros, the smallest and the largest floats: never NaN, never infinite."""
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.bfloat16).max
    weight = torch.stack(
        [torch.zeros(32), torch.full((32,), 2.0**-149), torch.full((32,), tiny), torch.full((32,), -huge)]
    )
    blocks, scales = mxfp4.encode(weight, rule)
    decoded = mxfp4.decode(blocks, scales, torch.float32)
    assert torch.isfinite(decoded).all()
    assert scales[0].item() == 0 and not blocks[0].any()
    assert torch.allclose(decoded[3], weight[3], rtol=0.25)
    assert (decoded[1] == 0).all()


def test_what_cannot_be_encoded_or_decoded():
    with pytest.raises(ConfigError, match="multiple of 32"):
        mxfp4.encode(torch.zeros(4, 33))
    with pytest.raises(ConfigError, match="best, ocp, ceil"):
        mxfp4.encode(torch.zeros(32), "nearest")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            mxfp4.encode(torch.tensor([bad] + [0.0] * 31))
    with pytest.raises(ConfigError, match="float16"):
        mxfp4.decode(torch.zeros(1, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8), torch.float16)
    with pytest.raises(CheckpointError, match="expected"):
        mxfp4.decode(torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8))
    scales = torch.full((2, 3), 127, dtype=torch.uint8)
    mxfp4.check_scales(scales)
    scales[1, 1] = 255
    with pytest.raises(CheckpointError, match=r"w\.scales: 1 scale byte is 255"):
        mxfp4.check_scales(scales, "w.scales")


def test_gguf_order():
    torch.manual_seed(3)
    blocks = torch.randint(0, 256, (5, 3, 16), dtype=torch.uint8)
    scales = torch.randint(2, 252, (5, 3), dtype=torch.uint8)
    gguf = mxfp4.to_gguf(blocks, scales)
    assert gguf.shape == (5, 3, 17)
    assert torch.equal(gguf[..., 0], scales)
    # as ggml reads it: byte j carries element j below and element j + 16 above
    table = torch.tensor([nibble_value(n) for n in range(16)])
    low, high = table[(gguf[..., 1:] & 15).int()], table[(gguf[..., 1:] >> 4).int()]
    values = torch.cat((low, high), -1) * torch.exp2(gguf[..., :1].float() - 127)
    assert torch.equal(values.flatten(-2), mxfp4.decode(blocks, scales, torch.float32))


def test_gguf_order_by_its_own_library():
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(4)
    blocks = torch.randint(0, 256, (3, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 2), dtype=torch.uint8)
    rows = mxfp4.to_gguf(blocks, scales).flatten(-2).numpy()
    values = torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.MXFP4))
    assert torch.equal(values, mxfp4.decode(blocks, scales, torch.float32))
