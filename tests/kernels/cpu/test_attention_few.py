"""Attention for a handful of queries in C, against the plain reference: every position, window, sink and stride."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.kernels import reference
from xmoe.kernels.cpu import backend as cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.reason() or "C kernels are there")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def check(B, S, G, R, Dh, L, window, dtype, with_sinks=True, seed=0, ordered=False, **options):
    """Keys in a ring's order or not, some of them padding; queries at the end of each sequence, the first padding at times."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, S, G * R, Dh, generator=g).to(dtype)
    k, v = (torch.randn(B, L, G, Dh, generator=g).to(dtype) for _ in range(2))
    sinks = torch.randn(G * R, generator=g) if with_sinks else None
    order = torch.arange(L) if ordered else torch.randperm(L, generator=g)
    k_pos = torch.stack([order - b for b in range(B)])  # row b has b columns of padding
    q_pos = torch.stack([torch.arange(L - S - b, L - b) for b in range(B)]).clamp(min=-1)
    options |= {"window": window, "q_pos": q_pos, "k_pos": k_pos}
    expected = reference.attention(*(t.float() for t in (q, k, v)), sinks, **options)
    with torch.no_grad():
        found = cpu.attention(q, k, v, sinks, **options)
    assert found.dtype == dtype and found.shape == expected.shape
    assert (found.float() - expected).norm() <= BOUNDS[dtype] * expected.norm()


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3), S=st.integers(1, 4), G=st.integers(1, 3), R=st.integers(1, 8), Dh=st.sampled_from([16, 48, 64]),
    more=st.integers(0, 150), window=st.one_of(st.none(), st.integers(1, 130)), with_sinks=st.booleans(),
    dtype=st.sampled_from(list(BOUNDS)), ordered=st.booleans(),
)  # fmt: skip
def test_few_queries_of_any_shape(B, S, G, R, Dh, more, window, with_sinks, dtype, ordered):
    check(B, S, G, R, Dh, S + B + more, window, dtype, with_sinks, ordered=ordered)


def test_a_block_that_only_the_oldest_query_sees_is_not_skipped():
    """Keys in order, 64 a block: of queries 62 to 65 with a window of 2 only the first two look into the first block."""
    check(1, 4, 2, 3, 32, 66, 2, torch.float32, ordered=True)


def test_large_scores_neither_overflow_nor_vanish():
    """Scores of hundreds, of both signs, over three blocks of keys; the largest comes late and early."""
    check(1, 2, 2, 4, 64, 190, None, torch.float32, scale=20.0)
    check(1, 2, 2, 4, 64, 190, None, torch.float32, scale=20.0, seed=5)


def test_every_instruction_set_this_machine_has(instruction_set):
    for dtype in BOUNDS:
        check(2, 3, 2, 5, 48, 77, 20, dtype)
