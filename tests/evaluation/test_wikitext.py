"""WikiText's detokenizer and division into articles, against strings written by hand."""

from __future__ import annotations

import pytest

from evaluation.wikitext import articles, count_words, detokenize


@pytest.mark.parametrize(
    ("spaced", "written"),
    [
        ("a @-@ b 1 @,@ 000 2 @.@ 5", "a-b 1,000 2.5"),
        ("so : a ; b . c ! d ? e , f", "so: a; b. c! d? e, f"),
        ("the dogs ' bowl , red", "the dogs' bowl, red"),
        ("it 's red", "it's red"),
        ("the dogs ' bowl , it 's red", "the dogs'bowl, it's red"),  # two apostrophes pair up: the harness's oddity
        ("( a b ) [ c ] { d }", "(a b) [c] {d}"),
        ('said " yes " and " no "', 'said "yes" and "no"'),
        ("he ' quoted ' it", "he 'quoted' it"),
        (" = T = \n \n = = S = = \n ", " = T =\n\n== S ==\n"),
        ("= = = = x = = =", "==== x ==="),
        ("40 \u00b0 N x N y", "40\u00b0N x 1 y"),
    ],
)
def test_each_rule(spaced, written):
    assert detokenize(spaced) == written


def test_words_are_counted_on_white_space_with_empty_ends():
    assert count_words(" a b\n\nc ") == 5


def test_articles_begin_at_first_level_headings_only():
    lines = [" \n", " = A = \n", " \n", " = = B = = \n", " x = y \n", " = C D = \n", " end \n"]
    assert articles(lines) == [" = A = \n \n = = B = = \n x = y ", " = C D = \n end "]
    assert articles(["nothing\n"]) == []
