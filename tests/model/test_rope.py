"""Rotary tables against the published frequencies of GPT-OSS."""

from __future__ import annotations

import math

import pytest
import torch

from xmoe.kernels import reference
from xmoe.model.config import preset
from xmoe.model.rope import concentration, inverse_frequencies, rope_tables, yarn_bounds

# radians a position turns each of the 32 pairs of a 64-wide head by, in gpt-oss-20b and -120b
PUBLISHED = [
    1, 0.6890443, 0.474782, 0.3271459, 0.225418, 0.155323, 0.1070244, 0.07374457, 0.05081327, 0.0317057, 0.019335,
    0.01159205, 0.00679496, 0.003860359, 0.002093792, 0.001052602, 4.564839e-4, 1.293187e-4, 3.830881e-5, 2.639647e-5,
    1.818834e-5, 1.253257e-5, 8.635496e-6, 5.950239e-6, 4.099978e-6, 2.825067e-6, 1.946596e-6, 1.341291e-6, 9.24209e-7,
    6.368209e-7, 4.387979e-7, 3.023511e-7,
]  # fmt: skip


def test_frequencies_of_gpt_oss():
    config = preset("gpt_oss_20b")
    assert yarn_bounds(config) == pytest.approx((8.092779115512402, 17.39802450158856), rel=1e-14)
    torch.testing.assert_close(inverse_frequencies(config), torch.tensor(PUBLISHED), rtol=1e-6, atol=0)
    assert concentration(config) == pytest.approx(1.3465735902799727, rel=1e-12)


def test_no_scaling_is_plain_rope():
    config = preset("light")
    assert concentration(config) == 1.0
    expected = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)])
    torch.testing.assert_close(inverse_frequencies(config), expected)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    config = preset("tiny", rope_scaling_factor=1.0)
    inverse = inverse_frequencies(config)
    q, k = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def dot(i, j):
        turned = [
            reference.rope(x, *rope_tables(torch.tensor([[p]]), inverse, 1.0)).flatten() for x, p in ((q, i), (k, j))
        ]
        return float(turned[0] @ turned[1])

    assert dot(7, 3) == pytest.approx(dot(104, 100), abs=1e-4)
    assert dot(7, 3) != pytest.approx(dot(8, 3), abs=1e-3)
    cos, sin = rope_tables(torch.tensor([[5]]), inverse, 1.0)
    assert reference.rope(q, cos, sin).norm() == pytest.approx(float(q.norm()), rel=1e-6)


def test_halves_form_the_pairs():
    x = torch.zeros(1, 1, 1, 4)
    x[..., 0] = 1.0
    angle = torch.tensor([[[0.3, 0.7]]])
    out = reference.rope(x, angle.cos(), angle.sin()).flatten()
    torch.testing.assert_close(out, torch.tensor([math.cos(0.3), 0.0, math.sin(0.3), 0.0]))
