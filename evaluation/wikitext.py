"""WikiText pages: undoing the corpus's tokenisation, and cutting a file of lines into articles.

WikiText separates punctuation by spaces and marks numbers with `@`. Perplexity is taken on text as people write it, but
per *word of the untouched page*, so that models with different tokenizers can be compared. The rules below give the same
strings as the harness does, oddities included (quotes pair up across words; an apostrophe opens a quotation).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# In this order: each rule sees what the earlier ones left.
_GLUE = (
    ("s '", "s'"),  # the plural possessive
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_ENCLOSED = [
    (re.compile(rf"{re.escape(opening)}\s*([^{re.escape(closing)}]*?)\s*{re.escape(closing)}"), opening, closing)
    for opening, closing in ("()", "[]", "{}", '""', "''")
]
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \u00b0 ", "\u00b0"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
_TITLE = re.compile(r"^ ?= (?!=).*[^=] =\s*$")


def detokenize(page: str) -> str:
    """The page as people write it."""
    for spaced, written in _GLUE:
        page = page.replace(spaced, written)
    for pattern, opening, closing in _ENCLOSED:
        page = pattern.sub(lambda m, o=opening, c=closing: f"{o}{m[1]}{c}", page)
    for spaced, written in _REST:
        page = page.replace(spaced, written)
    return page


def count_words(page: str) -> int:
    """Pieces between runs of white space of the page *before* detokenizing; empty pieces at the ends count, as usual."""
    return len(re.split(r"\s+", page))


def articles(lines: Iterable[str]) -> list[str]:
    """Pages from the lines of WikiText's own files: a page begins at a first-level heading ` = Title = `.

    Lines of the same dress inside an article (a formula broken over two lines) begin a page too: the document-level
    data that the harness reads was cut so, and numbers must agree. The line break between two pages belongs to neither.
    """
    lines = list(lines)
    starts = [i for i, line in enumerate(lines) if _TITLE.match(line)]
    ends = [*starts[1:], len(lines)]
    return ["".join(lines[a:b]).removesuffix("\n") for a, b in zip(starts, ends)]
