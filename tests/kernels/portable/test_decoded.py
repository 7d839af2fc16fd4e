"""Decoded experts: the same matrices, within the limit; tokens displace what was used least recently, prompts nothing."""

from __future__ import annotations

import gc

import pytest
import torch

from xmoe.errors import ConfigError
from xmoe.kernels import dispatch, memory
from xmoe.kernels.portable import decoded, experts
from xmoe.kernels.portable.decoded import DecodedExperts
from xmoe.quantization.compound import MixedWeight, PackedFactors
from xmoe.quantization.packed import PackedWeight


def packed(experts: int = 6, out: int = 10, width: int = 64, seed: int = 0) -> PackedWeight:
    return PackedWeight.encode(torch.randn(experts, out, width, generator=torch.Generator().manual_seed(seed)))


def same(kept: DecodedExperts, weight: PackedWeight, e: int) -> bool:
    """Whether the matrix comes out of `kept` a second time, after having been right the first time."""
    (first,) = kept.matrices(weight, e, torch.float32, keep="always")
    assert torch.equal(first, weight.decode([e], torch.float32)[0])
    return kept.matrices(weight, e, torch.float32, keep="never")[0] is first


def test_a_matrix_is_kept_by_weight_expert_and_dtype():
    kept, one, two = DecodedExperts(1 << 20), packed(seed=1), packed(seed=2)
    assert same(kept, one, 3) and same(kept, two, 3) and same(kept, one, 4)
    assert kept.matrices(one, 3, torch.bfloat16, keep="never")[0].dtype == torch.bfloat16
    assert kept.nbytes == 3 * 10 * 64 * 4


def test_nothing_is_kept_unless_asked_for():
    kept, weight = DecodedExperts(1 << 20), packed()
    first, second = (kept.matrices(weight, 0, torch.float32, keep="never")[0] for _ in range(2))
    assert first is not second and torch.equal(first, second) and kept.nbytes == 0


def test_the_least_recently_used_goes_first():
    size = 10 * 64 * 4
    kept, weight = DecodedExperts(3 * size + 1), packed()
    a, b, c = (kept.matrices(weight, e, torch.float32, keep="always")[0] for e in range(3))
    assert kept.matrices(weight, 0, torch.float32, keep="always")[0] is a
    kept.matrices(weight, 3, torch.float32, keep="always")
    assert kept.nbytes == 3 * size
    assert kept.matrices(weight, 1, torch.float32, keep="never")[0] is not b
    assert kept.matrices(weight, 0, torch.float32, keep="never")[0] is a
    assert kept.matrices(weight, 2, torch.float32, keep="never")[0] is c


def test_a_prompt_takes_the_room_there_is_and_displaces_nothing():
    size = 10 * 64 * 4
    kept, weight = DecodedExperts(3 * size), packed()
    tokens = [kept.matrices(weight, e, torch.float32, keep="always")[0] for e in range(2)]
    prompt = [kept.matrices(weight, e, torch.float32, keep="room")[0] for e in range(2, 6)]
    assert kept.nbytes == 3 * size
    found = [kept.matrices(weight, e, torch.float32)[0] for e in range(6)]
    assert [f is m for f, m in zip(found, tokens + prompt)] == [True, True, True, False, False, False]
    kept.matrices(weight, 5, torch.float32, keep="always")
    assert kept.matrices(weight, 0, torch.float32)[0] is not tokens[0], "a token displaces what was used first"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["mxfp4", "int8", "int4"])
def test_matrices_in_huge_pages_are_the_same(monkeypatch, dtype, format):
    monkeypatch.setattr(memory, "HUGE", 4096)
    weight = PackedWeight.encode(torch.randn(3, 70, 96, generator=torch.Generator().manual_seed(4)), format)
    (matrix,) = DecodedExperts(1 << 20).matrices(weight, 1, dtype, keep="room")
    assert torch.equal(matrix, weight.decode([1], dtype)[0]) and matrix.dtype == dtype and matrix.shape == (70, 96)


def test_forms_within_forms_give_their_own_matrices_and_packed_ones_are_kept():
    g = torch.Generator().manual_seed(5)
    dense = torch.randn(2, 70, 96, generator=g)
    factors = PackedWeight.encode(torch.randn(2, 70, 96, generator=g), "low-rank", rank=32)
    inner = PackedFactors(*(PackedWeight.encode(f, "mxfp4") for f in factors.factors))
    numbers = PackedWeight.encode(torch.randn(2, 70, 96, generator=g), "int8")
    part = torch.tensor([3, 0, 1, 2, 0, 1, 3, 2], dtype=torch.uint8)
    mixed, kept = MixedWeight(part, {0: dense, 1: factors, 2: inner, 3: numbers}), DecodedExperts(1 << 20)
    for e, k in enumerate(part.tolist()):
        first, second = (kept.matrices(mixed, e, torch.float32, keep="room") for _ in range(2))
        torch.testing.assert_close(
            torch.linalg.multi_dot(first) if len(first) > 1 else first[0], mixed.decode([e], torch.float32)[0]
        )
        assert len(first) == (2 if k in (1, 2) else 1)
        assert all(a is b for a, b in zip(first, second)) == (k in (2, 3)), "what is floating point is not kept"
    assert kept.nbytes == 4 * 2 * (32 * (70 + 96) + 70 * 96)


def test_the_limit_comes_from_the_environment(monkeypatch):
    weight, size = packed(), 10 * 64 * 4
    monkeypatch.setenv(decoded.LIMIT, str(2.5 * size / 1e9))
    kept = DecodedExperts()
    assert "up to 6.4e-06 GB (XMOE_DECODED_GB)" in kept.describe()
    for e in range(5):
        kept.matrices(weight, e, torch.float32, keep="room")
    assert kept.nbytes == 2 * size and kept.limit == 6400
    monkeypatch.setenv(decoded.LIMIT, "0")
    assert DecodedExperts().describe().startswith("no decoded expert is kept")
    monkeypatch.delenv(decoded.LIMIT)
    assert "half of the memory" in DecodedExperts().describe()
    with dispatch.use("portable"):
        assert decoded.LIMIT in dispatch.describe("cpu", torch.bfloat16)


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf", "4GB"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv(decoded.LIMIT, text)
    with pytest.raises(ConfigError, match=f"XMOE_DECODED_GB is '{text}'; expected gigabytes"):
        DecodedExperts().matrices(packed(), 0, torch.float32, keep="room")


@pytest.mark.parametrize("limit", [0, 10 * 64 * 4 - 1])
def test_what_does_not_fit_is_not_kept(limit):
    kept, weight = DecodedExperts(limit), packed()
    assert not same(kept, weight, 0) and kept.nbytes == 0


def test_written_bytes_are_decoded_again():
    kept, weight = DecodedExperts(1 << 20), packed()
    kept.matrices(weight, 2, torch.float32, keep="always")
    weight.blocks[2] = 0x22
    assert torch.equal(kept.matrices(weight, 2, torch.float32, keep="always")[0], weight.decode([2], torch.float32)[0])


def test_a_weight_that_is_gone_takes_its_matrices_along():
    kept, weight, other = DecodedExperts(1 << 20), packed(), packed(seed=1)
    for e in range(4):
        kept.matrices(weight, e, torch.float32, keep="always")
    kept.matrices(other, 0, torch.float32, keep="always")
    del weight
    gc.collect()
    assert kept.nbytes == 10 * 64 * 4 and same(kept, other, 0)


def test_portable_decoding_gives_the_same_bits_with_and_without(monkeypatch):
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
        monkeypatch.setattr(experts, "_decoded", DecodedExperts(limit))
        found += [run(), run()]
    assert experts._decoded.nbytes == 4 * (2 * 32 * 64 + 64 * 32) * 4, "four experts of two matrices, fp32"
    assert all(torch.equal(found[0], y) for y in found[1:])
    with dispatch.use("portable"):  # gradients may be wanted: nothing new is kept
        monkeypatch.setattr(experts, "_decoded", DecodedExperts(1 << 20))
        dispatch.experts(x.requires_grad_(), indices, weights, up, biases[0], down, biases[1])
    assert experts._decoded.nbytes == 0


def test_what_a_prompt_decoded_serves_the_tokens_behind_it(monkeypatch):
    g = torch.Generator().manual_seed(3)
    up, down = packed(5, 2 * 32, 64), packed(5, 64, 32, seed=1)
    biases = torch.randn(5, 64, generator=g), torch.randn(5, 64, generator=g)
    monkeypatch.setattr(experts, "_decoded", DecodedExperts(1 << 20))
    asked = []
    monkeypatch.setattr(decoded, "_decoded", lambda w, e, dtype: asked.append((w is up, e)) or w.decode([e], dtype)[0])
    with torch.no_grad(), dispatch.use("portable"):
        for rows in (6, 1):  # a prompt, then a token
            x, weights = torch.randn(rows, 64, generator=g), torch.rand(rows, 2, generator=g)
            indices = torch.tensor([[4, 1], [1, 3]] * 3)[:rows]
            dispatch.experts(x, indices, weights, up, biases[0], down, biases[1])
    assert sorted(asked) == [(is_up, e) for is_up in (False, True) for e in (1, 3, 4)]


def test_free_memory_is_less_than_the_machine_has():
    assert 0 <= decoded.free_memory() < 1 << 50
