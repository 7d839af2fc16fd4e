"""Experts decoded lately: the same matrices, within the limit, the least recently used first to go."""

from __future__ import annotations

import gc

import pytest
import torch

from xmoe.kernels import decoded, dispatch
from xmoe.kernels.decoded import DecodedExperts
from xmoe.quantization.packed import PackedWeight


def packed(experts: int = 6, out: int = 10, width: int = 64, seed: int = 0) -> PackedWeight:
    return PackedWeight.encode(torch.randn(experts, out, width, generator=torch.Generator().manual_seed(seed)))


def same(kept: DecodedExperts, weight: PackedWeight, e: int) -> bool:
    """Whether the matrix comes out of `kept` a second time, after having been right the first time."""
    (first,) = kept.matrices(weight, e, torch.float32, keep=True)
    assert torch.equal(first, weight.decode([e], torch.float32)[0])
    return kept.matrices(weight, e, torch.float32, keep=False)[0] is first


def test_a_matrix_is_kept_by_weight_expert_and_dtype():
    kept, one, two = DecodedExperts(1 << 20), packed(seed=1), packed(seed=2)
    assert same(kept, one, 3) and same(kept, two, 3) and same(kept, one, 4)
    assert kept.matrices(one, 3, torch.bfloat16, keep=False)[0].dtype == torch.bfloat16
    assert kept.nbytes == 3 * 10 * 64 * 4


def test_nothing_is_kept_unless_asked_for():
    kept, weight = DecodedExperts(1 << 20), packed()
    first, second = (kept.matrices(weight, 0, torch.float32, keep=False)[0] for _ in range(2))
    assert first is not second and torch.equal(first, second) and kept.nbytes == 0


def test_the_least_recently_used_goes_first():
    size = 10 * 64 * 4
    kept, weight = DecodedExperts(3 * size + 1), packed()
    a, b, c = (kept.matrices(weight, e, torch.float32, keep=True)[0] for e in range(3))
    assert kept.matrices(weight, 0, torch.float32, keep=True)[0] is a
    kept.matrices(weight, 3, torch.float32, keep=True)
    assert kept.nbytes == 3 * size
    assert kept.matrices(weight, 1, torch.float32, keep=False)[0] is not b
    assert kept.matrices(weight, 0, torch.float32, keep=False)[0] is a
    assert kept.matrices(weight, 2, torch.float32, keep=False)[0] is c


@pytest.mark.parametrize("limit", [0, 10 * 64 * 4 - 1])
def test_what_does_not_fit_is_not_kept(limit):
    kept, weight = DecodedExperts(limit), packed()
    assert not same(kept, weight, 0) and kept.nbytes == 0


def test_written_bytes_are_decoded_again():
    kept, weight = DecodedExperts(1 << 20), packed()
    kept.matrices(weight, 2, torch.float32, keep=True)
    weight.blocks[2] = 0x22
    assert torch.equal(kept.matrices(weight, 2, torch.float32, keep=True)[0], weight.decode([2], torch.float32)[0])


def test_a_weight_that_is_gone_takes_its_matrices_along():
    kept, weight, other = DecodedExperts(1 << 20), packed(), packed(seed=1)
    for e in range(4):
        kept.matrices(weight, e, torch.float32, keep=True)
    kept.matrices(other, 0, torch.float32, keep=True)
    del weight
    gc.collect()
    assert kept.nbytes == 10 * 64 * 4 and same(kept, other, 0)


def test_portable_decoding_gives_the_same_bits_with_and_without(monkeypatch):
    from xmoe.kernels import portable

    g = torch.Generator().manual_seed(3)
    up, down = packed(5, 2 * 32, 64), packed(5, 64, 32, seed=1)
    biases = torch.randn(5, 64, generator=g), torch.randn(5, 64, generator=g)
    x, indices = torch.randn(2, 64, generator=g), torch.tensor([[4, 1, 0], [1, 2, 4]])
    weights = torch.rand(2, 3, generator=g)

    def run():
        with torch.no_grad(), dispatch.use("portable"):
            return dispatch.experts(x, indices, weights, up, biases[0], down, biases[1])[0]

    found = []
    for limit in (0, 1 << 20):
        monkeypatch.setattr(portable, "_decoded", DecodedExperts(limit))
        found += [run(), run()]
    assert portable._decoded.nbytes == 4 * (2 * 32 * 64 + 64 * 32) * 4, "four experts of two matrices, fp32"
    assert all(torch.equal(found[0], y) for y in found[1:])
    with dispatch.use("portable"):  # gradients may be wanted: nothing new is kept
        monkeypatch.setattr(portable, "_decoded", DecodedExperts(1 << 20))
        dispatch.experts(x.requires_grad_(), indices, weights, up, biases[0], down, biases[1])
    assert portable._decoded.nbytes == 0


def test_free_memory_is_less_than_the_machine_has():
    assert 0 <= decoded.free_memory() < 1 << 50
