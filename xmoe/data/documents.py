"""Documents: how text is cut into pieces that belong together, and which of them are held out for validation.

A document is what belongs together: its tokens follow one another, an end-of-text token closes it, and it is trained on
or held out as a whole. How a file is cut is the `separator`:

- `auto`: at `<|endoftext|>` where the file has it (TinyStories); at titles ` = Title = ` where the first line is one
  (WikiText); else a file that is the only one, or longer than 256 KiB, into pieces; else a file is one document;
- `pieces`: about 4 KB each, cut behind a blank line, so that a part of a single long file can be held out;
- `heading`: a document begins with each title ` = Title = `;
- `file`: a file is one document, a row is one document;
- anything else: a string that stands between documents and is dropped.

Rows (of JSONL files and hub datasets) are one document each, but with `heading`, or in `auto` where the first row is such
a title, rows are lines of text, as the WikiText rows on the hub are.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator

from xmoe.errors import DataError

PIECE_BYTES = 4096
WHOLE_FILE_BYTES = 256 * 1024  # a longer file is cut into pieces in `auto`
END_OF_TEXT = "<|endoftext|>"
HEAD_LINES = 2000  # how far `auto` looks for a mark
_TITLE = re.compile(r" ?= [^=\s].* = ?\s*")  # but not " = = Section = = "


def place_of(document: str) -> float:
    """A number in [0, 1) that a hash of the text decides; equal documents have the same."""
    return int.from_bytes(hashlib.blake2b(utf8(document), digest_size=6).digest(), "big") / 2**48


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to validation: its content decides, so neither order nor neighbours matter."""
    return place_of(document) < fraction


def fraction_that_holds_out(documents: Iterable[str], fraction: float) -> float:
    """`fraction`, or, where that leaves few documents all on one side, just enough to hold out the lowest of them.

    Reads only as far as the first document that is held out.

    Raises:
        DataError: there is only one document.
    """
    places = []
    for document in documents:
        places.append(place_of(document))
        if places[-1] < fraction:
            return fraction
    if len(set(places)) < 2:
        raise DataError(
            "the text is a single document, so no part of it can be held out; set data.validation_fraction=0, try "
            "data.document_separator=pieces, or name a data.validation_source"
        )
    return math.nextafter(min(places), 1.0)


def utf8(text: str) -> bytes:
    """The bytes of a text; a lone surrogate (JSON may hold one) takes three, as the U+FFFD that replaces it does."""
    return text.encode("utf-8", "surrogatepass")


def cut_file(lines: Iterable[str], separator: str, *, size: int, alone: bool) -> Iterator[str]:
    """The documents of one file of `size` bytes; `alone` where it is the only file of its source."""
    if separator == "auto":
        lines = iter(lines)
        head = list(itertools.islice(lines, HEAD_LINES))
        lines = itertools.chain(head, lines)
        first = next((line for line in head if line.strip()), "")
        if any(END_OF_TEXT in line for line in head):
            separator = END_OF_TEXT
        elif _TITLE.fullmatch(first):
            separator = "heading"
        else:
            separator = "pieces" if alone or size > WHOLE_FILE_BYTES else "file"
    return _cut(lines, separator)


def cut_rows(texts: Iterable[str], separator: str) -> Iterator[str]:
    """The documents of a table's rows."""
    if separator == "auto":
        texts = iter(texts)
        head: list[str] = []
        while not (head and head[-1].strip()) and (text := next(texts, None)) is not None:
            head.append(text)
        texts = itertools.chain(head, texts)
        first = head[-1] if head else ""
        separator = "heading" if _TITLE.fullmatch(first) else "file"
    if separator == "file":
        yield from texts
    elif separator == "heading":
        yield from _cut((text if text.endswith("\n") else text + "\n" for text in texts), separator)
    else:
        for text in texts:
            yield from _cut(text.splitlines(keepends=True), separator)


def cut_into_pieces(lines: Iterable[str], piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """Pieces of at least `piece_bytes` that end behind a blank line (behind any line from four times that size on).

    Joined, the pieces are the text again. The last one may be short.
    """
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(utf8(line))
        if size >= piece_bytes and (not line.strip() or size >= 4 * piece_bytes):
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _cut(lines: Iterable[str], separator: str) -> Iterator[str]:
    if separator == "file":
        yield "".join(lines)
    elif separator == "pieces":
        yield from cut_into_pieces(lines)
    elif separator == "heading":
        yield from _cut_before_titles(lines)
    else:
        yield from _cut_at(lines, separator)


def _cut_before_titles(lines: Iterable[str]) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if document and _TITLE.fullmatch(line):
            yield "".join(document)
            document = []
        document.append(line)
    yield "".join(document)


def _cut_at(lines: Iterable[str], mark: str) -> Iterator[str]:
    """What stands between the marks; the line ends that only set a mark apart go with it."""
    document: list[str] = []
    for line in lines:
        first, *rest = line.split(mark)
        document.append(first)
        for part in rest:
            yield "".join(document).strip("\r\n")
            document = [part]
    yield "".join(document).strip("\r\n")
