"""StopStrings: end a stream of text at a stop string of which no part was ever shown."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Text in, text out, as soon as it cannot be the beginning of a stop string any more.

    `found` is the stop string that ended the text, or None so far: the one that is complete first, and of several that
    end with the same letter the longest.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = sorted(strings, key=len, reverse=True)
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain now; nothing after a stop string was found."""
        if self.found is not None:
            return ""
        shown = []
        for letter in text if self.strings else ():
            self._held += letter
            shown.append(self._let_go())
            if self.found is not None:
                break
        return "".join(shown) if self.strings else text

    def rest(self) -> str:
        """What is still held back, once no more text will come."""
        held, self._held = self._held, ""
        return "" if self.found is not None else held

    def _let_go(self) -> str:
        """Takes from the held text all that no stop string can begin with; called after every letter."""
        for string in self.strings:
            if self._held.endswith(string):
                self.found = string
                shown, self._held = self._held[: -len(string)], ""
                return shown
        keep = next(
            start
            for start in range(len(self._held) + 1)
            if any(string.startswith(self._held[start:]) for string in self.strings)
        )
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown
