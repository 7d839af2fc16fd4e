"""RMSNorm, the combine of experts and rotary embedding against `reference`, values and gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import poisoned, poisoned_outputs, relative_error

from xmoe.kernels import reference
from xmoe.kernels.cuda.norm import Experts, add_and_norm, combine, rms_norm, sum_slots
from xmoe.kernels.cuda.rope import rope, rope_into_cache


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 6e-4)])
@pytest.mark.parametrize("shape", [(1, 96), (2, 7, 130), (0, 64), (300, 33)])
def test_rms_norm(shape, dtype, tolerance):
    x, weight, dy = randn(*shape, dtype=dtype), randn(shape[-1], seed=1), randn(*shape, seed=2, dtype=dtype)
    mine = [poisoned(x).requires_grad_(), poisoned(weight).requires_grad_()]
    theirs = [x.float().requires_grad_(), weight.clone().requires_grad_()]
    with poisoned_outputs():
        y = rms_norm(*mine, 1e-5)
        assert y.dtype == dtype
        got = torch.autograd.grad(y, mine, dy)
    expected = reference.rms_norm(*theirs, 1e-5)
    assert relative_error(y, expected) < tolerance
    for g, e in zip(got, torch.autograd.grad(expected, theirs, dy.float())):
        assert relative_error(g, e) < tolerance


def test_rms_norm_of_a_slice_of_wider_rows():
    wide, weight = randn(6, 100), randn(40, seed=1)
    expected = reference.rms_norm(wide[:, 20:60], weight, 1e-5)
    torch.testing.assert_close(rms_norm(wide[:, 20:60], weight, 1e-5), expected)
    torch.testing.assert_close(add_and_norm(wide[:, 20:60], weight, 1e-5, delta=wide[:, :40] * 0).normed, expected)


@pytest.mark.parametrize("splits, K", [(1, 1), (3, 4)])
def test_combine_skips_unused_slots(splits, K):
    T, D = 6, 70
    partial, weights = randn(splits, T * K, D), randn(T, K, seed=1).softmax(-1)
    indices = torch.arange(T * K).view(T, K) % 5
    indices[1], indices[3, 0] = -1, -1
    used = (indices >= 0).flatten()
    partial[:, ~used] = float("nan")  # never written
    each = partial.sum(0).masked_fill(~used[:, None], 0.0).view(T, K, D)
    weights = weights.masked_fill(indices < 0, float("nan"))
    with poisoned_outputs():
        y, lengths = combine(Experts(poisoned(partial), indices, weights), torch.float32, norms=True)
        summed = sum_slots(partial[0], indices)
    torch.testing.assert_close(y, (each * weights.nan_to_num()[..., None]).sum(1))
    torch.testing.assert_close(lengths, each.norm(dim=-1))
    first = partial[0].masked_fill(~used[:, None], 0.0).view(T, K, D)
    torch.testing.assert_close(summed, first.sum(1))


def test_add_and_norm():
    T, D, K, S = 5, 130, 3, 2
    residual, delta, partial = randn(T, D), randn(T, D, seed=1), randn(S, T * K, D, seed=2)
    weights, indices = randn(T, K, seed=3).softmax(-1), torch.arange(T * K).view(T, K)
    weight = randn(D, seed=4)
    with poisoned_outputs():
        out = add_and_norm(
            poisoned(residual), weight, 1e-5, delta=delta, experts=Experts(partial, indices, weights), half=True
        )
        plain = add_and_norm(residual, weight, 1e-5)
    total = residual + delta + (partial.sum(0).view(T, K, D) * weights[..., None]).sum(1)
    torch.testing.assert_close(out.total, total)
    torch.testing.assert_close(out.normed, reference.rms_norm(total, weight, 1e-5))
    assert torch.equal(out.half, out.normed.half())
    torch.testing.assert_close(plain.total, residual)
    torch.testing.assert_close(plain.normed, reference.rms_norm(residual, weight, 1e-5))
    assert plain.half is None


def tables(B, S, half, seed=5):
    angle = randn(B, S, half, seed=seed)
    return 1.3 * angle.cos(), 1.3 * angle.sin()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 6e-4)])
@pytest.mark.parametrize("table_rows", [1, 3])
def test_rope(table_rows, dtype, tolerance):
    B, S, N, Dh = 3, 5, 6, 24
    fused = poisoned(randn(B, S, N + 4, Dh, dtype=dtype))
    cos, sin = tables(table_rows, S, Dh // 2)
    x = fused[:, :, 1 : N + 1]  # a view with strides, as attention passes
    mine, theirs = x.detach().requires_grad_(), x.detach().float().requires_grad_()
    dy = randn(B, S, N, Dh, seed=9, dtype=dtype)
    with poisoned_outputs():
        y = rope(mine, poisoned(cos), poisoned(sin))
        (got,) = torch.autograd.grad(y, mine, dy)
    expected = reference.rope(theirs, cos, sin)
    assert relative_error(y, expected) < tolerance
    assert relative_error(got, torch.autograd.grad(expected, theirs, dy.float())[0]) < tolerance


def test_rope_into_cache():
    """A ring of 7: position 12 lands in slot 5; nothing else in the cache changes."""
    B, H, G, Dh, L = 3, 6, 2, 16, 7
    qkv, (cos, sin) = randn(B, (H + 2 * G) * Dh), tables(1, 20, Dh // 2)
    positions = torch.tensor([0, 12, 6])
    k_cache, v_cache = randn(B, L, G, Dh, seed=1), randn(B, L, G, Dh, seed=2)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    heads = qkv.view(B, 1, H + 2 * G, Dh)
    turned = reference.rope(heads[:, :, : H + G], cos[0][positions].unsqueeze(1), sin[0][positions].unsqueeze(1))[:, 0]
    for b, position in enumerate(positions.tolist()):
        want_k[b, position % L], want_v[b, position % L] = turned[b, H:], heads[b, 0, H + G :]
    k_mine, v_mine = poisoned(k_cache), poisoned(v_cache)
    with poisoned_outputs():
        q = rope_into_cache(poisoned(qkv), poisoned(cos[0]), poisoned(sin[0]), positions, H, k_mine, v_mine)
    torch.testing.assert_close(q, turned[:, :H])
    torch.testing.assert_close(k_mine, want_k)
    torch.testing.assert_close(v_mine, want_v)
