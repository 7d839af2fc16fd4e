"""The keys of config.json: where the file is, which kinds there are, and a key looked up by any of its spellings."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xmoe.errors import CheckpointError

CONFIG = "config.json"
GENERATION = "generation_config.json"

NATIVE_TYPE, HF_TYPE = "xmoe", "gpt_oss"


class Keys:
    """Keys of one file, looked up by any of their spellings, their types checked; `used` remembers what was asked for.

    None counts as absent, as it does in transformers.
    """

    def __init__(self, content: Mapping[str, Any], file: Path):
        self.content, self.file = content, file
        self.used: set[str] = set()

    def find(self, *names: str, default: Any = None) -> Any:
        self.used.update(names)
        values = {n: self.content[n] for n in names if self.content.get(n) is not None}
        if len({json.dumps(v, sort_keys=True) for v in values.values()}) > 1:
            both = ", ".join(f"{n} {str(v)[:60]!r}" for n, v in values.items())
            raise CheckpointError(f"{self.file} contradicts itself: {both}")
        return next(iter(values.values()), default)

    def integer(self, *names: str, default: int | None = None) -> int:
        return self._typed(
            names, default, lambda v: type(v) is int and abs(v) < 10**18, "a whole number of 18 digits at most"
        )

    def number(self, *names: str, default: float | None = None) -> float:
        return float(self._typed(names, default, _is_finite, "a number"))

    def _typed(self, names, default, accept, kind):
        value = self.find(*names, default=default)
        if value is None:
            raise CheckpointError(f"{self.file} lacks {' or '.join(names)}")
        if not accept(value):
            raise CheckpointError(f"{self.file}: {names[0]} is {str(value)[:60]!r}; expected {kind}")
        return value

    def fixed(self, name: str, value: Any) -> None:
        """A key that xmoe has no knob for must have the value that GPT-OSS has, or be absent."""
        found = self.find(name, default=value)
        if found != value:
            raise CheckpointError(f"{self.file}: {name} is {repr(found)[:60]}; only GPT-OSS's {value!r} is supported")


def _is_finite(value: Any) -> bool:
    """A number that a float can hold; a whole number may have more digits than any float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
