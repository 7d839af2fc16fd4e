"""Sampling: from logits to the next token.

The order is that of Hugging Face: repetition penalty, temperature, top-k, top-p, min-p, then one draw. `distribution`
gives the probabilities a draw is made from; speculative decoding compares two of them.

A draw uses one uniform number a row: the token at which the cumulative probability passes it. So a seed consumes the same
random numbers on every device and under every filter, and a row of a batch draws what it would have drawn alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xmoe.errors import ConfigError

TOP_P_FIRST_LOOK = 1024  # nuclei are small: try the largest probabilities before sorting a vocabulary of 200,000


@dataclass(frozen=True)
class SamplingConfig:
    """How to choose among tokens. The defaults draw from the model's own distribution.

    temperature: logits are divided by it; 0 means argmax, exactly, and no filter matters then.
    top_k: only the k largest logits stay (and those equal to the k-th); 0 is off.
    top_p: the smallest set of most probable tokens that together reach p stays (and those equal to its last); 1 is off.
    min_p: only tokens with at least min_p times the largest probability stay; 0 is off.
    repetition_penalty: logits of tokens already in the text are divided by it where positive, multiplied where
        negative; 1 is off.
    seed: None draws differently each time; row i of a batch is seeded with seed + i.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {rule}")

        need(_number(self.temperature) and self.temperature >= 0, "temperature", "0 (argmax) or a positive number")
        need(_whole(self.top_k) and self.top_k >= 0, "top_k", "0 (off) or a positive whole number")
        need(_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1 (off)")
        need(_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number from 0 (off) to 1")
        need(
            _number(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "a positive number; 1 is off",
        )
        need(self.seed is None or (_whole(self.seed) and self.seed >= 0), "seed", "a whole number from 0, or nothing")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def but(self, **changes) -> SamplingConfig:
        """The same with some fields changed; ConfigError where a field is unknown."""
        unknown = set(changes) - set(self.__dataclass_fields__)
        if unknown:
            raise ConfigError(
                f"unknown sampling setting {sorted(unknown)[0]!r}; known: {', '.join(self.__dataclass_fields__)}"
            )
        return replace(self, **changes)


def penalised(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """Logits [..., V] in fp32 with the repetition penalty applied where `seen` (bool, same shape) is true."""
    logits = logits.float()
    if seen is None or penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def distribution(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Probabilities fp32 [..., V] from which a token is drawn; one-hot at the argmax when temperature is 0.

    logits: [..., V]. seen: bool, same shape: tokens already in the text, for the repetition penalty.
    """
    logits = penalised(logits, seen, config.repetition_penalty)
    if config.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # The largest logit is taken away first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    vocab = logits.shape[-1]
    if 0 < config.top_k < vocab:
        smallest_kept = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    probabilities = logits.softmax(-1)
    if config.top_p < 1:
        least = _nucleus_threshold(probabilities, config.top_p)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if config.min_p > 0:
        # A ratio of two probabilities, so it does not matter that those cut by top-p are not yet made up for.
        least = config.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def _nucleus_threshold(probabilities: Tensor, p: float) -> Tensor:
    """The probability [..., 1] of the last token that the smallest set reaching `p` needs."""
    vocab = probabilities.shape[-1]
    for look in (min(TOP_P_FIRST_LOOK, vocab), vocab):
        largest = probabilities.topk(look, dim=-1).values
        mass = largest.cumsum(-1)
        if look == vocab or bool((mass[..., -1] >= p).all()):
            break
    # A token belongs to the set while the mass before it has not reached p; rounding must not empty or overrun the row.
    needed = (mass - largest < p).sum(-1, keepdim=True).clamp(1, look)
    return largest.gather(-1, needed - 1)


def uniform(generator: torch.Generator) -> float:
    """One number in [0, 1)."""
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def draw(probabilities: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Ids int64 [B] drawn from rows of probabilities [B, V] (they need not sum to 1), one uniform number a row."""
    device = probabilities.device
    if device.type == "mps":  # no float64 there, and fp32 sums over a vocabulary are too rough to draw by
        probabilities = probabilities.cpu()
    cumulative = probabilities.double().cumsum(-1)
    numbers = torch.tensor([[uniform(g)] for g in generators], dtype=torch.float64).to(cumulative.device)
    # The first token whose cumulative probability lies above the number: one with probability 0 is never it.
    return torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True).squeeze(-1).to(device)


class Sampler:
    """Chooses tokens for the rows of a batch and remembers what a row's next choice depends on.

    That is a source of randomness each (on the CPU whatever the model's device, so that a seed means the same everywhere)
    and, where a repetition penalty asks for it, the tokens the row already has.
    """

    def __init__(self, config: SamplingConfig, rows: int, *, first_row: int = 0) -> None:
        """first_row: the number of the first row among all prompts, where a batch holds only some of them."""
        self.config = config
        self.generators = [torch.Generator() for _ in range(rows)]
        for row, generator in enumerate(self.generators):
            if config.seed is None:
                generator.seed()
            else:
                generator.manual_seed(config.seed + first_row + row)
        self._seen: list[set[int]] | None = [set() for _ in range(rows)] if config.repetition_penalty != 1.0 else None

    def note(self, row: int, ids: Iterable[int]) -> None:
        """These ids stand in the text of `row`; `choose` and `distribution` do not note by themselves."""
        if self._seen is not None:
            self._seen[row].update(ids)

    def seen(self, logits: Tensor, rows: Sequence[int], extra: Sequence[int] = ()) -> Tensor | None:
        """Bool [len(rows), V]: the ids noted for each row and `extra` ones; None where no penalty needs it."""
        if self._seen is None:
            return None
        mask = torch.zeros(len(rows), logits.shape[-1], dtype=torch.bool)
        for i, row in enumerate(rows):
            mask[i, list(self._seen[row].union(extra))] = True
        return mask.to(logits.device)

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of every row: ids int64 [B] from logits [B, V]."""
        seen = self.seen(logits, range(len(self.generators)))
        if self.config.greedy:
            return penalised(logits, seen, self.config.repetition_penalty).argmax(-1)
        return draw(distribution(logits, self.config, seen), self.generators)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows, in this order."""
        self.generators = [self.generators[row] for row in rows]
        if self._seen is not None:
            self._seen = [self._seen[row] for row in rows]


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
