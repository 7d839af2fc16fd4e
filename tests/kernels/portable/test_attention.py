"""What only portable attention does: queries behind a cache. The rest is in cpu/test_backend.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.kernels import reference
from xmoe.kernels.portable import attention as portable


def attend(module, B: int, S: int, L: int, q_pos, k_pos, window: int | None, sinks: bool = True):
    """What `module` answers, and the gradients of everything."""
    g = torch.Generator().manual_seed(S * L)
    shapes = (B, S, 6, 8), (B, L, 2, 8), (B, L, 2, 8), (6,)
    inputs = [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]
    out = module.attention(*inputs[:3], inputs[3] if sinks else None, window=window, q_pos=q_pos, k_pos=k_pos)
    used = inputs if sinks else inputs[:3]
    return out, *torch.autograd.grad(out, used, torch.randn(out.shape, generator=g))


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 2), S=st.integers(1, 40), past=st.integers(0, 50), first=st.integers(-1, 3), sinks=st.booleans(),
    shuffled=st.booleans(), window=st.one_of(st.none(), st.integers(1, 60)), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_behind_a_cache(B, S, past, first, sinks, shuffled, window, seed):
    """Prompts and tokens behind `past` keys, which a ring may hold in any order, with or without a column of padding."""
    L = past + S
    k_pos = first + torch.arange(L).expand(B, L)
    q_pos = k_pos[:, past:]
    if shuffled:
        k_pos = k_pos[:, torch.randperm(L, generator=torch.Generator().manual_seed(seed))]
    found, expected = (attend(m, B, S, L, q_pos, k_pos, window, sinks) for m in (portable, reference))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("S, past", [(70, 0), (1, 69), (9, 61)])
@pytest.mark.parametrize("window", [None, 16])
def test_no_mask_a_head_is_made_where_every_query_sees_a_key(monkeypatch, S, past, window):
    def refuse(*_):
        raise AssertionError("the slow path")

    monkeypatch.setattr(portable, "_masked_attention", refuse)
    k_pos = torch.arange(past + S).unsqueeze(0)
    attend(portable, 1, S, past + S, k_pos[:, past:], k_pos, window)
