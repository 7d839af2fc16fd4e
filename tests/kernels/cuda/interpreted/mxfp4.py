"""Packed expert products against the OCP table in float64, kernels interpreted."""

from __future__ import annotations

import pytest
import torch
from helpers import decode, poisoned, poisoned_outputs, random_packed, relative_error, swiglu

from xmoe.errors import CheckpointError
from xmoe.kernels.cuda import tiles
from xmoe.kernels.cuda.mxfp4 import packed_down, packed_gate_up, packed_input_gradient, packed_linear
from xmoe.kernels.cuda.repack import Repacked, repack, unpack
from xmoe.kernels.cuda.routing import sort_rows

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
TILES = {
    "small": {"BM": 16, "BN": 64, "KB": 2, "SPLIT": 2, "warps": 4, "stages": 2},
    "large": {"BM": 32, "BN": 128, "KB": 1, "SPLIT": 1, "warps": 4, "stages": 2},
}


def poisoned_pack(blocks, scales, paired) -> Repacked:
    packed = repack(blocks, scales, paired=paired)
    from dataclasses import replace

    return replace(packed, codes=poisoned(packed.codes), scales=poisoned(packed.scales))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("shape", [(3, 96, 160), (1, 64, 128), (2, 130, 32), (2, 5760 // 32, 2880 // 10)])
def test_unpack_is_the_inverse_of_repack(shape, paired):
    E, N, K = shape
    blocks, scales = random_packed(E, N, K, 104, 129)
    blocks[0, 3, 0], scales[0, 3, 0] = 0x80, 7  # all zero (with signs) under a scale that fp16 cannot hold
    packed = repack(blocks, scales, paired=paired)
    assert packed.exact and len(packed.odd_scales) == 1
    for mine, theirs in zip(unpack(packed), (blocks, scales)):
        assert torch.equal(mine, theirs)
    ids = list(range(E))[::-1]
    for mine, theirs in zip(unpack(packed.select_experts(ids)), (blocks[ids], scales[ids])):
        assert torch.equal(mine, theirs)
    scales[0, 0, 0], blocks[0, 0, 0, 0] = 3, 1  # a real weight out of fp16's range
    packed = repack(blocks, scales, paired=paired)
    assert not packed.exact
    for mine, theirs in zip(unpack(packed), (blocks, scales)):
        assert torch.equal(mine, theirs)


def test_repack_refuses_nan_scales():
    blocks, scales = random_packed(1, 64, 128)
    scales[0, 5, 1] = 255
    with pytest.raises(CheckpointError, match="255"):
        repack(blocks, scales, paired=False)


def all_codes(scale_bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert [64, 128 * n] in which every scale meets all 16 codes in every place of a byte."""
    n = -(-len(scale_bytes) // 64)
    column = torch.arange(64).view(64, 1, 1)
    codes = ((torch.arange(n * 128).view(1, -1) + 3 * column[:, :, 0]) % 16).to(torch.uint8).view(1, 64, n * 4, 32)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    which = (torch.arange(n * 4).view(1, 1, -1) * 16 + torch.arange(64).view(1, 64, 1) // 4 + 0) % len(scale_bytes)
    return blocks, torch.tensor(list(scale_bytes), dtype=torch.uint8)[which]


@pytest.mark.parametrize("exact", [True, False])
def test_every_code_meets_every_scale(exact):
    """A one-hot input picks single weights, so each is compared exactly: 25 scales as fp16, all
    that leave six times themselves finite through fp32, the subnormal 2^-127 among them."""
    scale_bytes = range(104, 129) if exact else range(0, 253)
    dtype = torch.float16 if exact else torch.float32
    blocks, scales = all_codes(scale_bytes)
    weight = decode(blocks, scales)[0]
    K = weight.shape[1]
    packed = repack(blocks, scales, paired=False)
    assert packed.exact == exact and set(scales.flatten().tolist()) == set(scale_bytes)
    bias = torch.zeros(1, 64)
    with tiles.override({"mxfp4_linear": {"BM": K, "BN": 64, "KB": 1, "SPLIT": 1, "warps": 4, "stages": 2}}):
        if exact:
            rows = sort_rows(torch.zeros(K, 1, dtype=torch.int64), 1, K)
            out = packed_linear(torch.eye(K, dtype=dtype), rows, packed, bias)
            assert out.dtype == torch.float16 and torch.equal(out.T.double(), weight)
            return
        for k in range(0, K, 64):
            rows = sort_rows(torch.zeros(64, 1, dtype=torch.int64), 1, K)
            out = packed_linear(torch.eye(K, dtype=dtype)[k : k + 64], rows, packed, bias)
            assert torch.equal(out.T.double(), weight[:, k : k + 64])


def routing(T: int, K: int, E: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(T * 31 + E)
    if T == 0:
        return torch.zeros(0, K, dtype=torch.int64)
    chosen = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    if kind == "one expert":
        chosen = torch.full((T, K), E - 1)
        chosen[:, 1:] = -1
    elif kind == "unused":
        chosen[::3, 0] = -1
        chosen[T // 2] = -1
    elif kind == "empty expert":
        chosen[chosen == 1] = -1
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tile", list(TILES))
@pytest.mark.parametrize(
    "T, kind", [(1, "plain"), (21, "unused"), (40, "one expert"), (19, "empty expert"), (0, "plain")]
)
def test_gate_up_and_down(T, kind, tile, dtype):
    E, D, F, K = 5, 160, 96, 3
    indices = routing(T, K, E, kind)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    up_bytes, down_bytes = random_packed(E, 2 * F, D, seed=2), random_packed(E, D, F, seed=3)
    biases = torch.randn(E, 2 * F), torch.randn(E, D)
    tiles_used = {"mxfp4_gate_up": TILES[tile], "mxfp4_down": TILES[tile]}
    with tiles.override(tiles_used), poisoned_outputs():
        rows = sort_rows(poisoned(indices), E, TILES[tile]["BM"])
        hidden = packed_gate_up(
            poisoned(x), rows, poisoned_pack(*up_bytes, True), poisoned(biases[0]), limit=7.0, alpha=1.702, keep=True
        )
        partial = packed_down(hidden.active, rows, poisoned_pack(*down_bytes, False), poisoned(biases[1]))
    assert hidden.active.dtype == dtype and partial.dtype == torch.float32
    up, down = decode(*up_bytes), decode(*down_bytes)
    flat = indices.flatten()
    order = sorted((i for i in range(T * K) if flat[i] >= 0), key=lambda i: int(flat[i]))
    assert rows.order[: len(order)].tolist() == order
    for row, slot in enumerate(order):
        e = int(flat[slot])
        before = x[slot // K].double() @ up[e].T + biases[0][e].double()
        assert relative_error(hidden.before[row], before) < TOLERANCE[dtype]
        active = swiglu(before)
        assert relative_error(hidden.active[row], active) < TOLERANCE[dtype]
        expected = active.to(dtype).double() @ down[e].T + biases[1][e].double()
        assert relative_error(partial[:, slot].double().sum(0), expected) < TOLERANCE[dtype]


def test_swiglu_clamps_where_the_model_does():
    """Biases alone drive the activation: GPT-OSS's four known points, and the clamp acts after the bias."""
    D, points = 32, [(8.0, -9.0, -41.999719), (-8.0, 0.5, -1.46496e-5), (1.0, 0.0, 0.84579577), (0.5, 10.0, 2.8031075)]
    blocks, scales = torch.zeros(1, 64, 1, 16, dtype=torch.uint8), torch.full((1, 64, 1), 120, dtype=torch.uint8)
    bias = torch.zeros(1, 64)
    for i, (gate, up, _) in enumerate(points):
        bias[0, 2 * i], bias[0, 2 * i + 1] = gate, up
    with tiles.override({"mxfp4_gate_up": TILES["small"]}):
        rows = sort_rows(torch.zeros(1, 1, dtype=torch.int64), 1, 16)
        packed = repack(blocks, scales, paired=True)
        hidden = packed_gate_up(torch.ones(1, D), rows, packed, bias, limit=7.0, alpha=1.702)
    expected = torch.tensor([value for _, _, value in points])
    torch.testing.assert_close(hidden.active[0, :4], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("how", ["rows", "gather", "scatter"])
@pytest.mark.parametrize("exact", [True, False])
def test_input_gradient(paired, how, exact):
    E, N, D, K, T = 4, 160, 96, 2, 19
    indices = routing(T, K, E, "unused")
    blocks, scales = random_packed(E, N, D, *((118, 124) if exact else (80, 90)))
    weight = decode(blocks, scales)
    with tiles.override({"mxfp4_input_gradient": {"BM": 16, "BN": 64, "warps": 4, "stages": 2}}), poisoned_outputs():
        rows = sort_rows(indices, E, 16)
        used = int((indices >= 0).sum())
        dy = torch.randn(T if how == "gather" else used, N)
        packed = poisoned_pack(blocks, scales, paired)
        out = packed_input_gradient(poisoned(dy), rows, packed, gather=how == "gather", scatter=how == "scatter")
    flat = indices.flatten()
    for row, slot in enumerate(rows.order[:used].tolist()):
        expected = dy[slot // K if how == "gather" else row].double() @ weight[flat[slot]]
        assert relative_error(out[slot if how == "scatter" else row], expected) < 2e-6
