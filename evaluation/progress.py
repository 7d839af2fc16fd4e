"""Answers kept while a run goes on, so that a killed one continues where it stopped.

One JSON line an example, flushed as it is written. The first line says which model, and under which rules, gave the
answers; a file of another model is set aside by starting over, never mixed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.task import Answer, Example


class Progress:
    """Known answers of one evaluation. `identity` is whatever must be equal for an answer to be valid again."""

    def __init__(self, path: str | Path, identity: dict[str, Any]):
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        self._known: dict[str, list[Answer]] = {}
        self.started_over = not self._read() and self.path.exists()
        self.resumed = len(self._known)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a" if self._known else "w", encoding="utf-8")  # noqa: SIM115 (held open on purpose)
        if not self._known:
            self._write({"identity": self.identity})

    def answers(self, benchmark: str, example: Example) -> list[Answer] | None:
        """What is known of this example, or None."""
        return self._known.get(_key(benchmark, example))

    def add(self, benchmark: str, example: Example, answers: Sequence[Answer]) -> None:
        """Keep the answers to all requests of an example."""
        key = _key(benchmark, example)
        self._known[key] = list(answers)
        self._write({"key": key, "answers": [list(a) for a in answers]})

    def __len__(self) -> int:
        return len(self._known)

    def close(self, remove: bool) -> None:
        """`remove` when a report has everything that is in here."""
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)

    def _read(self) -> bool:
        """True where the file is of this identity. A last line cut off by a kill is dropped."""
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError):
            return False
        complete, torn = lines[:-1], lines[-1]
        try:
            if not complete or json.loads(complete[0]) != {"identity": self.identity}:
                return False
            for line in complete[1:]:
                entry = json.loads(line)
                self._known[entry["key"]] = [Answer(*a) for a in entry["answers"]]
        except (ValueError, KeyError, TypeError):
            self._known = {}
            return False
        if torn:
            self.path.write_text("".join(f"{line}\n" for line in complete), encoding="utf-8")
        return True

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()


def _key(benchmark: str, example: Example) -> str:
    """Of the benchmark, the row and every byte that is sent: changed data or few-shot examples find nothing."""
    content = json.dumps([benchmark, example.name, example.requests, example.question, example.choices])
    return hashlib.sha256(content.encode()).hexdigest()[:24]
