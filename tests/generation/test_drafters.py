"""PromptLookup's guesses and its prudence. That drafts change nothing is tested in test_speculative.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmoe.errors import ConfigError
from xmoe.generation.drafters import PromptLookup


def plain_lookup(text, count, longest, shortest):
    """By looking through the whole text: the latest earlier place where the most of the last tokens stand."""
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        for start in range(len(text) - 1, n - 1, -1):
            if text[start - n : start] == text[-n:]:
                copy = list(text)
                for i in range(count):
                    copy.append(copy[start + i])
                return copy[len(text) :]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 2), st.data())
def test_it_proposes_what_followed_last_time(text, shortest, more, data):
    drafter = PromptLookup(shortest + more, shortest, first=0, each=0.01)
    grown = data.draw(st.integers(1, len(text)))
    for end in range(grown, len(text) + 1):
        drafter._chance = 0.99
        got = drafter.propose(text[:end], 6).ids
        assert got == plain_lookup(text[:end], 6, shortest + more, shortest)


def test_a_loop_is_copied_round_and_round():
    drafter = PromptLookup(first=0, each=0.01)
    drafter._chance = 0.99
    assert drafter.propose([9, 1, 2, 3, 1, 2, 3, 1, 2], 7).ids == [3, 1, 2, 3, 1, 2, 3]


def run(answers, steps=600, count=8):
    """Drafted tokens when a proposal of n is accepted in full or not at all, by turns of `answers`."""
    drafter, text, drafted = PromptLookup(), [1, 2] * 20, 0
    for step in range(steps):
        proposed = len(drafter.propose(text, count).ids)
        accepted = proposed if answers(step) else 0
        drafter.heard(proposed, accepted)
        drafted += proposed
        text += [1, 2][: accepted % 2 + 1]
    return drafted


def test_it_all_but_stops_where_it_is_always_wrong():
    assert run(lambda step: False) <= 25, "over 600 passes this would cost more than two in a hundred"


def test_it_drafts_as_much_as_it_may_where_it_is_always_right():
    assert run(lambda step: True) > 0.95 * 600 * 8


def test_it_comes_back_when_the_text_repeats_again():
    assert run(lambda step: step > 300) > 150 * 8


def test_mistakes_are_one_line():
    with pytest.raises(ConfigError, match="1 <= shortest <= longest"):
        PromptLookup(2, 3)
    with pytest.raises(ConfigError, match="expected positive numbers"):
        PromptLookup(each=0)
