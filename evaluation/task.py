"""What a benchmark is: rows become examples with requests to a model, and the model's answers become metrics.

The draws of few-shot examples and the metrics are those of the lm-evaluation-harness 0.4.13. Tasks know no model and no
tokenizer. The benchmarks themselves are in :mod:`evaluation.tasks`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from evaluation import gsm8k
from evaluation.rows import Location, Row

Kind = Literal["choice", "cloze", "rolling", "generate"]

HARNESS_SEED = 1234  # with which the harness draws few-shot examples unless told otherwise


class Request(NamedTuple):
    """Score `continuation` after `context`. Rolling: the context is empty and the continuation a whole page.
    Generation: continue `context`; the continuation is empty."""

    context: str
    continuation: str


class Answer(NamedTuple):
    """What a model says to a request: log-likelihood in nats (a sum over tokens) and whether greedy decoding would
    have produced exactly these tokens; or `text`, where it was asked to generate."""

    loglikelihood: float = 0.0
    is_greedy: bool = False
    text: str = ""


@dataclass(frozen=True)
class Example:
    """One row, ready to be scored.

    name: unique within the benchmark, `17` or `anatomy/17`. gold: number of the right choice, or the right text.
    question, choices: the bare texts, from which chat modes make their own prompts; empty where there is no choice.
    sizes: characters of each choice (acc_norm), or words and bytes of a page.
    """

    name: str
    group: str
    requests: tuple[Request, ...]
    gold: int | str
    question: str = ""
    choices: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. `build(row, shots)` gives requests, gold and so on; `shots` is the text before the row's own.

    shot: a few-shot example as text, or None where the benchmark is zero-shot only. shots_default: K when none is given.
    shots_first: the examples are the first K of the row's group, not K drawn for each row.
    chance: accuracy of guessing.
    """

    name: str
    title: str
    kind: Kind
    location: Location
    chance: float | None
    build: Callable[[Row, str], dict[str, Any]]
    shot: Callable[[Row], str] | None = None
    shots_default: int = 0
    shots_first: bool = False
    group: Callable[[Row], str] = lambda row: ""
    opening: Callable[[str], str] = lambda group: ""
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256

    def few_shot(self, rows: Sequence[Row], k: int) -> Callable[[Row], str]:
        """row -> the text of its k examples, taken from `rows`; to be asked for every row once, in file order.

        MMLU has the first k of its subject before every question (`shots_first`). Elsewhere each row gets k of its own,
        drawn one row after the other from one generator: the harness's draws, so the strings are its strings.
        """
        by_group: dict[str, list[Row]] = {}
        for row in rows:
            by_group.setdefault(self.group(row), []).append(row)
        for group, members in by_group.items():
            if len(members) < k:
                raise members[0].error(
                    f"only {len(members)} few-shot rows for {self.name} {group}".rstrip() + f"; expected {k}"
                )
        if not self.shots_first:
            generator, pool = random.Random(HARNESS_SEED), list(rows)
            return lambda row: self._shots(generator.sample(pool, k))
        texts = {group: self._shots(members[:k]) for group, members in by_group.items()}

        def of_group(row: Row) -> str:
            group = self.group(row)
            if group not in texts:
                raise row.error(f"no few-shot rows for {self.name} {group}; expected them beside the test rows")
            return texts[group]

        return of_group

    def _shots(self, rows: Sequence[Row]) -> str:
        return "".join(self.shot(row) + "\n\n" for row in rows)

    def examples(self, rows: Sequence[Row], few_shot: Callable[[Row], str] | None = None) -> list[Example]:
        """All rows as examples, in order. `few_shot` comes from :meth:`few_shot`."""
        seen: dict[str, int] = {}
        examples = []
        for row in rows:
            group = self.group(row)
            number = seen.get(group, 0)
            seen[group] = number + 1
            shots = self.opening(group)
            if few_shot is not None:
                shots += few_shot(row)
            name = f"{group}/{number}" if group else str(number)
            examples.append(Example(name=name, group=group, **self.build(row, shots)))
        return examples

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Per-row values: 0/1 metrics, log-likelihoods, and the weights that aggregates need."""
        if self.kind == "choice":
            return score_choice(example, [a.loglikelihood for a in answers])
        if self.kind == "cloze":
            return {"acc": float(answers[0].is_greedy), "loglikelihood": answers[0].loglikelihood}
        if self.kind == "rolling":
            words, size = example.sizes
            return {"loglikelihood": answers[0].loglikelihood, "words": float(words), "bytes": float(size)}
        return gsm8k.score_number(example.gold, answers[0].text)


def score_choice(example: Example, loglikelihoods: Sequence[float]) -> dict[str, float]:
    """acc: the likeliest choice is right; acc_norm: the likeliest per *character* of the choice. Ties go to the first."""
    plain = _argmax(loglikelihoods)
    values = {"acc": float(plain == example.gold), "prediction": float(plain)}
    if example.sizes:
        normed = _argmax([ll / size for ll, size in zip(loglikelihoods, example.sizes)])
        values |= {"acc_norm": float(normed == example.gold), "prediction_norm": float(normed)}
    return values


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))
