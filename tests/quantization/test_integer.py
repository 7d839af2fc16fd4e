"""Integer formats against their formula, element by element."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.errors import CheckpointError, ConfigError
from xmoe.quantization import integer

BITS = {8: (integer.encode_int8, integer.decode_int8), 4: (integer.encode_int4, integer.decode_int4)}


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, 32), (4, 64), (4, 128)])
def test_error_is_at_most_half_a_step(bits, group, affine):
    encode, decode = BITS[bits]
    weight = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(bits))
    weight[0, 0] = 0
    weight[1] += 2  # off centre, where an affine grid pays
    tensors = encode(weight, affine=affine) if group is None else encode(weight, group, affine=affine)
    width = group or 256
    assert tensors["scales"].shape == (3, 5, 256 // width) and tensors["scales"].dtype == torch.bfloat16
    assert ("zeros" in tensors) == affine
    assert tensors["values"].shape == (3, 5, 256 * bits // 8)
    decoded = decode(tensors, torch.float32)
    step = tensors["scales"].float().repeat_interleave(width, -1)
    assert ((decoded - weight).abs() <= step * 0.5001).all()
    assert (decoded[0, 0] == 0).all()


def test_affine_beats_symmetric_on_one_sided_weights():
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(5)) + 0.1
    error = {
        a: (integer.decode_int4(integer.encode_int4(weight, affine=a), torch.float32) - weight).norm() for a in (0, 1)
    }
    assert error[1] < 0.6 * error[0]


def test_nibble_order_of_int4():
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([7.0, -7.0, 1.0, 3.0])
    tensors = integer.encode_int4(weight)
    assert tensors["scales"].item() == 1.0
    assert tensors["values"][0, :2].tolist() == [15 | (1 << 4), 9 | (11 << 4)]


@given(st.integers(0, 2**31), st.sampled_from([8, 4]), st.booleans(), st.floats(-60, 60))
@settings(max_examples=60, deadline=None)
def test_reencoding_is_stable_and_zero_stays_zero(seed, bits, affine, magnitude):
    """Symmetric values survive a second trip; under both schemes an exact zero stays an exact zero."""
    encode, decode = BITS[bits]
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    weight[0, 3] = 0
    once = decode(encode(weight, 32, affine=affine), torch.float32)
    assert torch.isfinite(once).all()
    assert once[0, 3] == 0
    if not affine:
        twice = decode(encode(once, 32), torch.float32)
        assert torch.allclose(twice, once, rtol=0.01)


def test_what_cannot_be_encoded():
    with pytest.raises(ConfigError, match="32, 64, 128"):
        integer.encode_int4(torch.zeros(2, 96), 48)
    with pytest.raises(ConfigError, match="do not divide"):
        integer.encode_int8(torch.zeros(2, 100), 32)
    with pytest.raises(CheckpointError, match="NaN"):
        integer.encode_int8(torch.tensor([[float("nan"), 1.0]]))
