"""One container over all formats: decode, rows of experts, bytes, and its behaviour as a module."""

import pytest
import torch
from torch import nn

from xmoe.errors import CheckpointError, ConfigError
from xmoe.quantization import mxfp4
from xmoe.quantization.packed import PackedWeight

CASES = [
    ("mxfp4", {}, 5 * 6 * 96 * 17 // 32),
    ("int8", {}, 5 * 6 * (96 + 2)),
    ("int8", {"group_size": 32, "affine": True}, 5 * 6 * (96 + 3 * 3)),
    ("int4", {"group_size": 32}, 5 * 6 * (48 + 3 * 2)),
    ("int4", {"group_size": 32, "affine": True}, 5 * 6 * (48 + 3 * 3)),
]


@pytest.fixture
def weight():
    return torch.randn(5, 6, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("format", "options", "nbytes"), CASES)
def test_decode_select_and_bytes(weight, format, options, nbytes):
    packed = PackedWeight.encode(weight, format, **options)
    assert packed.shape == (5, 6, 96) and packed.nbytes == nbytes
    dense = packed.decode(dtype=torch.float32)
    assert dense.shape == weight.shape
    assert (dense - weight).norm() < 0.15 * weight.norm()
    assert packed.decode().dtype == torch.bfloat16
    for ids in ([3, 0], torch.tensor([4]), [2, 2], []):
        rows = torch.as_tensor(ids, dtype=torch.long)
        assert torch.equal(packed.decode(ids, torch.float32), dense[rows])
        chosen = packed.select_experts(ids)
        assert chosen.shape == (len(rows), 6, 96) and chosen.format == format
        for name, tensor in chosen.tensors.items():
            assert torch.equal(tensor, packed.tensors[name][rows])


def test_selected_experts_share_no_memory(weight):
    packed = PackedWeight.encode(weight)
    chosen = packed.select_experts([1])
    chosen.blocks.zero_()
    assert packed.blocks[1].any()


@pytest.mark.parametrize(("format", "options", "_"), CASES)
def test_as_a_submodule(weight, format, options, _):
    """Its tensors stand in the state dict under its name, are no parameters, and survive a change of dtype."""
    owner = nn.Module()
    owner.gate_up = nn.Parameter(torch.empty(5, 6, 96, device="meta"))
    del owner.gate_up
    owner.gate_up = PackedWeight.encode(weight, format, **options)
    assert {"gate_up." + n for n in owner.gate_up.tensors} == set(owner.state_dict())
    assert not list(owner.parameters())
    before = owner.gate_up.decode(dtype=torch.float32)
    owner.float().bfloat16()
    assert torch.equal(owner.gate_up.decode(dtype=torch.float32), before)
    assert owner.gate_up.device == torch.device("cpu")


@pytest.mark.parametrize(("format", "options", "_"), CASES)
def test_encoded_again_like_itself(weight, format, options, _):
    """Same groups; values that did not change keep their codes, also beside some that did."""
    packed = PackedWeight.encode(weight * torch.logspace(-3, 3, 5).view(5, 1, 1), format, **options)
    dense = packed.decode(dtype=torch.float32)
    again = packed.encode_like(dense)
    assert {n: (t.dtype, t.shape) for n, t in again.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in packed.tensors.items()
    }
    dense[3] *= 1.7
    other = packed.encode_like(dense)
    if "affine" not in options:
        assert torch.equal(again.decode(dtype=torch.float32), packed.decode(dtype=torch.float32))
        rest = [0, 1, 2, 4]
        assert torch.equal(other.decode(rest, torch.float32), packed.decode(rest, torch.float32))
    assert (other.decode([3], torch.float32)[0] - dense[3]).norm() < 0.16 * dense[3].norm()


@pytest.mark.parametrize(("format", "options", "_"), CASES)
def test_values_snap_to_what_the_scales_can_hold(weight, format, options, _):
    """Each to the nearest of all values that a code gives at the scale of its group; and these are what is encoded."""
    packed = PackedWeight.encode(weight * torch.logspace(-3, 3, 5).view(5, 1, 1), format, **options)
    dense = packed.decode(dtype=torch.float32)
    assert torch.equal(packed.snap(dense), dense)
    moved = dense + 0.3 * weight * dense.abs().amax(-1, keepdim=True)
    moved[2, 3, :40] = 0.0
    found = packed.snap(moved)
    group = packed.group if format != "mxfp4" else 32
    codes = {"mxfp4": [s * v for v in mxfp4.VALUES for s in (1, -1)]}.get(format)
    if codes is None:
        top = 127 if format == "int8" else 7
        codes = range(top * 2 + 2) if "affine" in options else range(-top, top + 1)
    scales = packed.scales.float() if format != "mxfp4" else torch.exp2(packed.scales.double() - 127).float()
    zeros = packed.zeros.float() if "affine" in options else torch.zeros_like(scales)
    values = (torch.tensor(list(codes), dtype=torch.float32) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    distance = (moved.unflatten(-1, (-1, group)).unsqueeze(-1) - values.unsqueeze(-2)).abs().amin(-1).flatten(-2)
    torch.testing.assert_close((found - moved).abs(), distance, rtol=1e-5, atol=0)
    again = packed.encode_at(moved)
    assert torch.equal(again.decode(dtype=torch.float32), found)
    assert all(torch.equal(a, packed.tensors[n]) for n, a in again.tensors.items() if n in ("scales", "zeros"))
    same = packed.encode_at(dense)
    assert all(torch.equal(a, b) for a, b in zip(same.tensors.values(), packed.tensors.values(), strict=True))


def test_on_the_meta_device():
    packed = PackedWeight(
        "mxfp4",
        {
            "blocks": torch.empty(32, 5760, 90, 16, dtype=torch.uint8, device="meta"),
            "scales": torch.empty(32, 5760, 90, dtype=torch.uint8, device="meta"),
        },
    )
    assert packed.shape == (32, 5760, 2880)
    assert packed.nbytes == 32 * 5760 * 2880 * 17 // 32
    assert packed.decode().shape == packed.shape


def test_rules_reach_the_encoder(weight):
    packed = PackedWeight.encode(weight, "mxfp4", rule="ceil")
    assert torch.equal(packed.scales, mxfp4.encode(weight, "ceil")[1])


def test_mistakes(weight):
    packed = PackedWeight.encode(weight)
    for ids in ([5], [-1], [0, 9]):
        with pytest.raises(ConfigError, match=r"0\.\.4"):
            packed.decode(ids)
    with pytest.raises(ConfigError, match="mxfp4, int8, int4, low-rank"):
        PackedWeight.encode(weight, "fp8")
    with pytest.raises(CheckpointError, match="missing scales"):
        PackedWeight("mxfp4", {"blocks": packed.blocks})
    with pytest.raises(CheckpointError, match="no tensor zeros"):
        PackedWeight("mxfp4", packed.tensors | {"zeros": packed.scales})
    with pytest.raises(CheckpointError, match="begin with"):
        PackedWeight("mxfp4", {"blocks": packed.blocks, "scales": packed.scales[:4]})
    with pytest.raises(CheckpointError, match=r"\[\.\.\., G, 16\]"):
        PackedWeight("mxfp4", {"blocks": packed.blocks, "scales": packed.scales[..., :2]})
