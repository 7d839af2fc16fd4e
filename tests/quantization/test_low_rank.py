"""Factors against the spectrum they discard, in float64; the container around them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.errors import CheckpointError, ConfigError
from xmoe.quantization.low_rank import factor
from xmoe.quantization.packed import PackedWeight, matrices


def matrix(out: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(width: int, count: int, seed: int = 1) -> torch.Tensor:
    """Far from even: standard deviations from 1 down to 0.001 in rotated directions."""
    rotation = torch.linalg.qr(matrix(width, width, seed + 7)).Q
    return matrix(count, width, seed) * torch.logspace(0, -3, width, dtype=torch.float64) @ rotation


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_the_error_is_the_discarded_spectrum(out, width, data):
    rank = data.draw(st.integers(1, min(out, width)))
    w = matrix(out, width, out * 31 + width)
    found = factor(w, rank)
    singular = torch.linalg.svdvals(w)
    discarded = float(singular[rank:].square().sum().sqrt())
    error = float((w - found.left @ found.right).norm())
    assert found.left.shape == (out, rank) and found.right.shape == (rank, width)
    assert error == pytest.approx(discarded, rel=1e-6, abs=1e-6)
    assert found.lost == pytest.approx(discarded, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(found.left.norm(dim=0), found.right.norm(dim=1))


@pytest.mark.parametrize(("out", "width"), [(40, 24), (24, 40), (30, 30)])
@pytest.mark.parametrize("rank", [1, 9, 23])
def test_fitted_to_inputs_the_output_error_is_the_discarded_spectrum_and_no_more_than_plain(out, width, rank):
    w, x = matrix(out, width), inputs(width, 500)
    moment = x.T @ x / len(x)
    fitted, plain = factor(w, rank, moment), factor(w, rank)
    rms = len(x) ** 0.5
    error = [float((x @ (w - f.left @ f.right).T).norm()) / rms for f in (fitted, plain)]
    singular = torch.linalg.svdvals(w @ torch.linalg.cholesky(moment))
    assert error[0] == pytest.approx(float(singular[rank:].square().sum().sqrt()), rel=1e-6)
    assert fitted.lost == pytest.approx(error[0], rel=1e-6)
    assert error[0] < 0.95 * error[1]
    # SVD-LLM's own way to write it
    low = torch.linalg.cholesky(moment)
    U, s, V = torch.linalg.svd(w @ low, full_matrices=False)
    theirs = (U[:, :rank] * s[:rank]) @ V[:rank] @ torch.linalg.inv(low)
    torch.testing.assert_close(fitted.left @ fitted.right, theirs, rtol=1e-6, atol=1e-6)


def test_a_matrix_of_lower_rank_is_kept_whole():
    w = matrix(20, 3) @ matrix(3, 14)
    for rank in (3, 8):
        found = factor(w, rank)
        torch.testing.assert_close(found.left @ found.right, w, rtol=1e-9, atol=1e-9)
        assert found.lost < 1e-6
    nothing = factor(torch.zeros(5, 7), 2)
    assert not nothing.right.any() and bool(nothing.left.isfinite().all())


def test_the_container_holds_selects_and_counts():
    w = torch.stack([matrix(12, 20, seed) for seed in range(5)]).float()
    packed = PackedWeight.encode(w, "low-rank", rank=4)
    assert packed.shape == (5, 12, 20) and packed.count == 5 * 4 * (12 + 20) and packed.nbytes == 4 * packed.count
    assert not list(packed.parameters()) and set(packed.state_dict()) == {"left", "right"}
    for e in range(5):
        best = torch.linalg.svdvals(w[e].double())[4:].square().sum().sqrt()
        assert float((packed.decode([e], torch.float32)[0] - w[e]).norm()) == pytest.approx(float(best), rel=1e-4)
        left, right = matrices(packed, e, torch.float32)
        torch.testing.assert_close(left @ right, packed.decode(dtype=torch.float32)[e])
    chosen = packed.select_experts([3, 0])
    assert torch.equal(chosen.left, packed.left[[3, 0]]) and torch.equal(chosen.right, packed.right[[3, 0]])
    assert packed.decode().dtype == torch.bfloat16
    assert matrices(w, 2, torch.bfloat16)[0].equal(w[2].bfloat16())
    assert PackedWeight.encode(torch.zeros(2, 4, 32)).count == 2 * 4 * 32


def test_mistakes():
    for rank in (0, 13):
        with pytest.raises(ConfigError, match=f"rank {rank} of a 12 x 20 matrix: expected 1 to 12"):
            factor(matrix(12, 20), rank)
    with pytest.raises(CheckpointError, match="NaN"):
        factor(torch.full((3, 3), float("nan")), 1)
    left, right = torch.zeros(2, 6, 3), torch.zeros(2, 3, 8)
    for a, b in ((left, right[:, :2]), (left[..., 0], right), (left, right.to(torch.bfloat16)), (left, right.long())):
        with pytest.raises(CheckpointError, match=r"factors \[experts|begin with|long"):
            PackedWeight("low-rank", {"left": a, "right": b})
    with pytest.raises(CheckpointError, match=r"begin with \[experts\]"):
        PackedWeight("low-rank", {"left": left, "right": right[:1]})
    with pytest.raises(CheckpointError, match="missing right"):
        PackedWeight("low-rank", {"left": left})
