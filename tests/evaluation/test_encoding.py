"""Where a context ends in ids, the windows of a page, and what is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.encoding import encode_requests, prefix_token, windows
from evaluation.task import Request
from xmoe.errors import ConfigError, DataError


class Pairs:
    """Two equal letters in a row are one token (the capital), so the seam between two strings matters."""

    eos_id, vocab_size = 0, 256

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def encode(self, text):
        ids, i = [], 0
        while i < len(text):
            double = text[i : i + 2] == text[i] * 2
            ids.append(ord(text[i].upper() if double else text[i]))
            i += 2 if double else 1
        return ids

    def special(self, name):
        return 7 if name == "<s>" else None


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def encode(context: str, continuation: str, prefix: int | None = 0, max_length: int = 100):
    return encode_requests([Request(context, continuation)], Pairs(), prefix, max_length)[0]


def test_the_ids_of_the_whole_string_decide():
    assert encode("ab", "cd")[:2] == (ids("ab"), ids("cd"))
    # 'bb' is one token across the seam: what follows the context's two ids is 'd' alone, as in the harness
    assert encode("ab", "bd")[:2] == (ids("ab"), ids("d"))


def test_trailing_white_space_of_a_context_moves_to_the_continuation():
    assert encode("ab \n", "cd")[:2] == (ids("ab"), ids(" \ncd"))


def test_an_empty_context_becomes_the_prefix_token():
    assert encode("", "xyz")[:2] == ([0], ids("xyz"))
    assert encode("", "xyz", prefix=ord("x"))[:2] == (ids("x"), ids("yz"))  # it begins with it already
    assert encode("", "xyz", prefix=None)[:2] == (ids("x"), ids("yz"))
    assert encode("  ", "x")[:2] == ([0], [*ids(" ".upper()), ord("x")])


def test_a_long_request_loses_its_left_end():
    whole = encode("abcdef", "gh", max_length=7)
    assert (whole.context, whole.cut) == (ids("abcdef"), 0)  # 'h' is a target only
    assert encode("abcdef", "gh", max_length=4) == (ids("def"), ids("gh"), 3)
    with pytest.raises(DataError, match="3 tokens, more than --max-length 2"):
        encode("a", "bcd", max_length=2)
    with pytest.raises(DataError, match="no tokens of its own"):
        encode("ab", "b")


def test_which_token_is_the_prefix():
    assert [prefix_token(Pairs(), choice) for choice in ("auto", "bos", "eos", "none", "12")] == [7, 7, 0, None, 12]
    for wrong in ("256", "-1", "start"):
        with pytest.raises(ConfigError, match="expected auto, bos, eos, none or an id below 256"):
            prefix_token(Pairs(), wrong)


def test_windows_by_hand():
    assert windows([1, 2, 3, 4, 5], 9, 2) == [([9], [1, 2], 0), ([2], [3, 4], 0), ([3, 4], [5], 0)]
    assert windows([1, 2, 3], 9, 5) == [([9], [1, 2, 3], 0)]
    assert windows([1, 2, 3], None, 2) == [([1], [2, 3], 0)]
    assert windows([], 9, 2) == []


@given(st.integers(1, 40), st.integers(1, 12))
def test_windows_score_every_token_once_and_are_as_long_as_they_may_be(count, max_length):
    page = list(range(100, 100 + count))
    found = windows(page, 0, max_length)
    assert [t for w in found for t in w.targets] == page
    for window in found:
        assert len(window.context) + len(window.targets) - 1 == min(max_length, count)
        joined = window.context + window.targets
        assert joined == ([0, *page, None])[([0, *page]).index(joined[0]) :][: len(joined)]


def test_windows_equal_the_harness():
    utils = pytest.importorskip("lm_eval.utils")
    for count, max_length in itertools.product(range(1, 40), range(1, 13)):
        page = list(range(100, 100 + count))
        theirs = [
            utils.make_disjoint_window(pair)
            for pair in utils.get_rolling_token_windows(page, prefix_token=0, max_seq_len=max_length, context_len=1)
        ]
        assert [(w.context, w.targets) for w in windows(page, 0, max_length)] == [(list(c), list(t)) for c, t in theirs]
