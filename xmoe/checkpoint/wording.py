"""Words that messages share: a few of many names, the first line of an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def few(names: Sequence[Any], most: int = 4) -> str:
    """The first `most` of them, and how many more there are."""
    shown = ", ".join(str(n) for n in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def first_line(error: BaseException) -> str:
    """What it says, up to 200 characters; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
