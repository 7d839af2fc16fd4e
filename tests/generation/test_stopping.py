"""Stop strings: nothing of them is shown, everything before them is."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from xmoe.generation.stopping import StopStrings


def feed(strings, pieces):
    stop = StopStrings(strings)
    shown = [stop.push(piece) for piece in pieces]
    return stop, "".join(shown), shown


def test_a_beginning_is_held_back_until_it_is_clear():
    stop, _, shown = feed(["\nUser:"], ["hi", "\nUs", "ed", "\nUser", ":", "more"])
    assert shown == ["hi", "", "\nUsed", "", "", ""]
    assert stop.found == "\nUser:"
    assert stop.rest() == ""


def test_what_was_held_back_comes_at_the_end():
    stop, shown, _ = feed(["END"], ["xyE", "N"])
    assert (shown, stop.rest(), stop.found) == ("xy", "EN", None)


def test_a_short_string_inside_the_beginning_of_a_long_one_still_ends_the_text():
    stop, shown, _ = feed(["abcd", "bc"], ["xab", "c", "x"])
    assert (shown, stop.found) == ("xa", "bc")


@given(
    text=st.text("ab\n", max_size=30),
    strings=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_any_division_into_pieces_gives_the_text_before_the_first_stop_string(text, strings, cuts):
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    stop, shown, _ = feed(strings, [text[a:b] for a, b in itertools.pairwise(edges)])
    ends = [text.find(s) + len(s) for s in strings if s in text]
    if not ends:
        assert stop.found is None
        assert shown + stop.rest() == text
    else:
        before = text[: min(ends)]
        longest = max((s for s in strings if before.endswith(s)), key=len)
        assert stop.found == longest
        assert shown + stop.rest() == before[: -len(longest)]
