"""Ctrl-C in the middle of a step would leave half an update; so it is noted, and the loop stops where it is whole."""

from __future__ import annotations

import signal
import sys
import threading


class Interruption:
    """Within it, Ctrl-C and a polite kill (SIGTERM) set `asked` instead of being raised; a second Ctrl-C is raised at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, _number: int, _frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt("stopped at once; the last save stands")
        self.asked = True
        print("\nstopping after this step, then saving (once more to stop at once)", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
