from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmoe.data.documents import cut_file, cut_into_pieces, cut_rows, fraction_that_holds_out, is_held_out, place_of
from xmoe.errors import DataError

LINES = st.lists(st.sampled_from(["a line\n", "\n", "  \n", "zeile é\r\n", "x" * 50 + "\n", "no end"]), max_size=60)


def cut(text: str, separator: str, *, size: int = 1000, alone: bool = False) -> list[str]:
    return list(cut_file(text.splitlines(keepends=True), separator, size=size, alone=alone))


@given(LINES, st.integers(1, 200))
def test_pieces_are_the_text_again(lines, size):
    pieces = list(cut_into_pieces(lines, size))
    assert "".join(pieces) == "".join(lines)
    for piece in pieces[:-1]:
        assert len(piece.encode()) >= size
    for piece in pieces:
        assert len(piece.encode()) <= 4 * size + max(len(line.encode()) for line in lines)


def test_pieces_end_behind_blank_lines():
    text = ("word " * 30 + "\n") * 5 + "\n"
    pieces = cut(text * 40, "pieces")
    assert len(pieces) > 5
    assert all(piece.endswith("\n\n") for piece in pieces)


def test_text_without_blank_lines_is_cut_behind_lines():
    pieces = cut(("word " * 30 + "\n") * 400, "pieces")
    assert len(pieces) > 2
    assert all(piece.endswith("word \n") for piece in pieces)


TITLED = " = One = \n\n = = Part = = \n\ntext = text \n\n = Two = \nmore\n"


def test_titles_begin_documents():
    expected = [" = One = \n\n = = Part = = \n\ntext = text \n\n", " = Two = \nmore\n"]
    assert cut(TITLED, "heading") == expected
    assert cut(TITLED, "auto") == expected
    assert cut("\n" + TITLED, "auto") == ["\n", *expected]


@pytest.mark.parametrize("separator", ["auto", "<|endoftext|>"])
def test_end_of_text_marks_separate_documents(separator):
    text = "one\n\nstill one\n<|endoftext|>\ntwo\n<|endoftext|>three<|endoftext|>\n"
    assert [d for d in cut(text, separator, alone=True) if d.strip()] == ["one\n\nstill one", "two", "three"]


def test_any_string_may_separate():
    assert cut("a -- b\nc -- d", "--") == ["a ", " b\nc ", " d"]


def test_auto_keeps_small_files_whole_and_cuts_lone_and_long_ones():
    text = ("word " * 30 + "\n\n") * 100
    assert cut(text, "auto") == [text]
    assert cut(text, "file", alone=True, size=10**9) == [text]
    assert len(cut(text, "auto", alone=True)) > 2
    assert cut(text, "auto", size=10**6) == cut(text, "auto", alone=True) == cut(text, "pieces")


def test_a_row_is_a_document_unless_rows_are_lines():
    rows = ["one", " = Not a title", "", "two"]
    assert list(cut_rows(rows, "auto")) == rows
    lines = ["", " = One = \n", "", " text \n", " = Two = \n", " = = Part = = \n"]
    expected = ["\n", " = One = \n\n text \n", " = Two = \n = = Part = = \n"]
    assert list(cut_rows(lines, "auto")) == list(cut_rows(lines, "heading")) == expected
    assert list(cut_rows(lines, "file")) == lines
    assert list(cut_rows(["a|b", "c"], "|")) == ["a", "b", "c"]
    assert list(cut_rows([], "auto")) == []
    assert list(cut_rows(["", " "], "auto")) == ["", " "]


@given(st.lists(st.text(), unique=True), st.floats(0, 1), st.randoms())
def test_the_content_of_a_document_alone_decides(documents, fraction, rng):
    held = {d for d in documents if is_held_out(d, fraction)}
    rng.shuffle(documents)
    assert {d for d in documents if is_held_out(d, fraction)} == held
    assert all(0 <= place_of(d) < 1 for d in documents)
    assert all(is_held_out(d, 1.0) and not is_held_out(d, 0.0) for d in documents)


def test_about_the_asked_for_fraction_is_held_out():
    rng = random.Random(0)
    documents = [f"document {rng.random()}" for _ in range(4000)]
    assert 0.08 < sum(is_held_out(d, 0.1) for d in documents) / 4000 < 0.12


def test_of_few_documents_one_is_held_out():
    documents = [f"document {i}" for i in range(7)]
    places = sorted(map(place_of, documents))
    assert fraction_that_holds_out(documents, 0.9) == 0.9
    small = fraction_that_holds_out(documents, places[0] / 2)
    assert [place_of(d) for d in documents if is_held_out(d, small)] == places[:1]
    with pytest.raises(DataError, match=r"single document.*validation_fraction=0.*pieces.*validation_source"):
        fraction_that_holds_out(["one"], place_of("one") / 2)


def test_the_search_stops_at_the_first_held_out_document():
    def documents():
        yield "first"
        raise AssertionError("no need to read on")

    assert fraction_that_holds_out(documents(), 1.0) == 1.0
