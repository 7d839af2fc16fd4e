"""Decode and flash attention against `reference`: windows, sinks, rings, padding, values and gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import poisoned, poisoned_outputs, relative_error

from xmoe.kernels import reference
from xmoe.kernels.cuda import tiles
from xmoe.kernels.cuda.decode_attention import decode_attention
from xmoe.kernels.cuda.flash_attention import flash_attention

TILES = {
    "decode_attention": {"SPLITS": 3, "BT": 16, "warps": 4, "stages": 1},
    "flash_forward": {"BQ": 32, "BT": 16, "warps": 4, "stages": 1},
    "flash_query_gradient": {"BQ": 16, "BT": 32, "warps": 4, "stages": 1},
    "flash_key_gradient": {"BQ": 32, "BT": 16, "warps": 4, "stages": 1},
}
PRECISION = [(torch.float32, 3e-6), (torch.float16, 2e-3)]


def tensors(B, S, L, H, G, Dh, dtype=torch.float32):
    generator = torch.Generator().manual_seed(B + S + L)
    shapes = [(B, S, H, Dh), (B, L, G, Dh), (B, L, G, Dh), (H,)]
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype, tolerance", PRECISION)
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("S, L, Dh, with_sinks", [(1, 1, 16, True), (1, 53, 24, True), (3, 70, 16, False)])
def test_decode_by_positions(S, L, Dh, with_sinks, window, dtype, tolerance):
    """Keys in ring order, some of them padding, one query that is padding itself and so sees nothing."""
    B, H, G = 2, 6, 2
    q, k, v, sinks = tensors(B, S, L, H, G, Dh, dtype)
    sinks = sinks if with_sinks else None
    k_pos = torch.stack([torch.arange(L).roll(5), torch.arange(L) - 3])
    k_pos[1, : min(3, L - 1)] = -1
    q_pos = torch.arange(L - S, L).repeat(B, 1)
    q_pos[1] -= 3
    q_pos[1].clamp_(min=-1)
    with tiles.override(TILES), poisoned_outputs():
        out = decode_attention(
            *map(poisoned, (q, k, v)), sinks, window=window, q_pos=poisoned(q_pos), k_pos=poisoned(k_pos)
        )
    expected = reference.attention(
        q.float(),
        k.float(),
        v.float(),
        sinks if sinks is None else sinks.float(),
        window=window,
        q_pos=q_pos,
        k_pos=k_pos,
    )
    assert out.dtype == dtype and relative_error(out, expected) < tolerance


@pytest.mark.parametrize("L, lengths", [(64, [0, 63, 30]), (16, [40, 15, 3])])
def test_decode_by_lengths(L, lengths):
    """A full cache that is partly filled, and a ring that has wrapped: what lies beyond the count is never read."""
    B, H, G, Dh = 3, 16, 2, 32
    q, k, v, sinks = tensors(B, 1, L, H, G, Dh)
    count = torch.tensor(lengths)
    k_pos = torch.arange(L).expand(B, L).masked_fill(torch.arange(L) > count[:, None], -1)
    expected = reference.attention(q, k, v, sinks, q_pos=torch.full((B, 1), L), k_pos=k_pos)
    for b in range(B):
        k[b, lengths[b] + 1 :], v[b, lengths[b] + 1 :] = float("nan"), float("nan")
    with tiles.override(TILES), poisoned_outputs():
        out = decode_attention(poisoned(q), poisoned(k), poisoned(v), sinks, lengths=count)
    assert relative_error(out, expected) < 3e-6


@pytest.mark.parametrize("dtype, tolerance", PRECISION)
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("S, G, with_sinks", [(1, 2, True), (53, 2, True), (64, 1, False)])
def test_flash_without_positions(S, G, with_sinks, window, dtype, tolerance):
    check_flash(S, S, G, with_sinks, window, None, None, dtype, tolerance)


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("kind", ["continued", "ring", "padded"])
def test_flash_with_positions(kind, window):
    S, L = 37, 61
    k_pos = torch.arange(L).repeat(2, 1)
    q_pos = torch.arange(L - S, L).repeat(2, 1)
    if kind == "ring":
        k_pos = k_pos.roll(17, 1)
    elif kind == "padded":
        k_pos[1], q_pos[1] = (k_pos[1] - 30).clamp(min=-1), (q_pos[1] - 30).clamp(min=-1)
    check_flash(S, L, 2, True, window, q_pos, k_pos, torch.float32, 3e-6)


def check_flash(S, L, G, with_sinks, window, q_pos, k_pos, dtype, tolerance):
    B, H, Dh = 2, 4, 24
    inputs = tensors(B, S, L, H, G, Dh, dtype)[: 4 if with_sinks else 3]
    mine = [poisoned(t).requires_grad_() for t in inputs]
    theirs = [t.float().requires_grad_() for t in inputs]
    dout = torch.randn(B, S, H, Dh, generator=torch.Generator().manual_seed(3)).to(dtype)
    none = [] if with_sinks else [None]
    options = {"window": window, "q_pos": q_pos, "k_pos": k_pos, "scale": 0.3}
    with tiles.override(TILES), poisoned_outputs():
        out = flash_attention(*mine, *none, **options)
        got = torch.autograd.grad(out, mine, dout)
    expected = reference.attention(*theirs, *none, **options)
    assert out.dtype == dtype and relative_error(out, expected) < tolerance
    for g, e in zip(got, torch.autograd.grad(expected, theirs, dout.float())):
        assert relative_error(g, e) < 2 * tolerance or float((g.float() - e).abs().max()) < 1e-5  # gradients that are 0
