"""Numbers keep their value on the way from text to the type of a field."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmoe.config.values import convert


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_the_way_through_text(value):
    assert convert(repr(value), float) == value
    assert convert(value, float) == value


@given(st.integers())
def test_whole_numbers_stay_exact(value):
    assert convert(str(value), int) == value and convert(value, int) == value
    with pytest.raises(ValueError):
        convert(value + 0.5 if abs(value) < 2**40 else 0.5, int)
