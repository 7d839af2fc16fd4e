"""Speculative decoding: a cheap drafter guesses the next tokens, the model checks them all in one pass. Exactly.

Greedy text is the same token for token (up to the rounding of a pass over several tokens); sampled text has the same
distribution: a drafted token x stays with probability min(1, p(x) / q(x)), and what replaces a rejected one is drawn from
max(p - q, 0) (arXiv 2211.17192). The drafters stand in `drafters.py`.

When does it pay? A pass over n drafted tokens costs 1 + c(n) plain ones, each draft d, and a drafted token is right with
probability a: the gain is (1 + a + ... + a^n) / (1 + c(n) + d * n). In a Mixture of Experts c is not small, since every
token brings its own experts; and a pruning plan keeps K, so a draft under one reads as many bytes as the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from xmoe.errors import ConfigError
from xmoe.generation.cache import KVCache
from xmoe.generation.generate import prefill
from xmoe.generation.sampling import Sampler, SamplingConfig, distribution, draw, penalised, uniform


class Draft(NamedTuple):
    """Guessed tokens, and q [n, V], the distributions they were drawn from; None where they were not drawn but chosen."""

    ids: list[int]
    probabilities: Tensor | None = None


class Drafter(Protocol):
    """Guesses how a text goes on."""

    def begin(self, model) -> None:
        """A new text; ConfigError where this drafter cannot serve `model`."""

    def propose(
        self, text: list[int], count: int, cache: KVCache, config: SamplingConfig, generators: list[torch.Generator]
    ) -> Draft:
        """At most `count` tokens to follow `text`, all but the last of which are in the model's cache."""

    def heard(self, proposed: int, accepted: int) -> None:
        """What became of the last proposal."""


@dataclass
class Report:
    """What speculation did in one run. A pass is one call of the model after the prompt."""

    passes: int = 0
    proposed: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafted tokens that the model agreed to; None where none were drafted."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens gained by each pass; 1 without speculation."""
        return (self.passes + self.accepted) / self.passes if self.passes else None

    def summary(self) -> str:
        if self.acceptance_rate is None:
            return "nothing drafted"
        return (
            f"{self.acceptance_rate:.0%} of {self.proposed} drafted accepted, {self.tokens_per_pass:.2f} tokens a pass"
        )


class Speculative:
    """Decodes with a drafter: give it to `stream` as `source`. `report` tells about the last run."""

    def __init__(self, drafter: Drafter, draft_tokens: int = 4) -> None:
        """draft_tokens: the most tokens drafted at a time."""
        if draft_tokens < 1:
            raise ConfigError(f"draft_tokens is {draft_tokens}; expected 1 or more")
        self.drafter, self.rollback = drafter, draft_tokens
        self.report = Report()

    def tokens(
        self, model, cache: KVCache, ids: list[int], sampler: Sampler, *, num_experts_per_tok: int | None, chunk: int
    ) -> Iterator[int]:
        """As `generate.decode`."""
        self.report = report = Report()
        self.drafter.begin(model)
        # Drafts are drawn with other random numbers than they are judged with, else they would not be independent.
        drafting = [torch.Generator().manual_seed(int(uniform(g) * 2**53)) for g in sampler.generators]
        text = list(ids)
        prompt = torch.tensor([ids[cache.length :]], device=model.device)
        new = [int(sampler.choose(prefill(model, cache, prompt, num_experts_per_tok=num_experts_per_tok, chunk=chunk)))]
        while True:
            for token in new:
                text.append(token)
                sampler.note(0, [token])
                yield token
            draft = self.drafter.propose(text, self.rollback, cache, sampler.config, drafting)
            start = cache.length
            logits = _all_logits(model, cache, [text[-1], *draft.ids], num_experts_per_tok)
            accepted, following = verify(logits, draft, sampler)
            cache.truncate(start + 1 + accepted)
            new = [*draft.ids[:accepted], following]
            report.passes += 1
            report.proposed += len(draft.ids)
            report.accepted += accepted
            self.drafter.heard(len(draft.ids), accepted)


def verify(logits: Tensor, draft: Draft, sampler: Sampler) -> tuple[int, int]:
    """How many drafted tokens stay, and the token that follows them.

    logits [n + 1, V]: the model's, after the text and after each drafted token.
    """
    for i, token in enumerate(draft.ids):
        p = _after(logits, i, draft, sampler)
        if sampler.config.greedy:
            if int(p.argmax()) == token:
                continue
            return i, int(p.argmax())
        if draft.probabilities is None:
            q_of_token, rest = 1.0, p.index_fill(-1, torch.tensor([token], device=p.device), 0.0)
        else:
            q = draft.probabilities[i].to(p.device)
            q_of_token, rest = float(q[token]), (p - q).clamp_min(0.0)
        if uniform(sampler.generators[0]) * q_of_token < float(p[token]):
            continue
        # Nothing is left over where p and q differ by rounding only; then either of them will do.
        return i, int(draw((rest if float(rest.sum()) > 0 else p)[None], sampler.generators))
    p = _after(logits, len(draft.ids), draft, sampler)
    return len(draft.ids), int(p.argmax()) if sampler.config.greedy else int(draw(p[None], sampler.generators))


def _after(logits: Tensor, i: int, draft: Draft, sampler: Sampler) -> Tensor:
    """What is said [V] about the token after the i-th draft: probabilities, or logits where only the largest matters."""
    row = logits[i : i + 1]
    seen = sampler.seen(row, [0], draft.ids[:i])
    if sampler.config.greedy:
        return penalised(row, seen, sampler.config.repetition_penalty)[0]
    return distribution(row, sampler.config, seen)[0]


@torch.inference_mode()
def _all_logits(model, cache: KVCache, ids: list[int], k: int | None) -> Tensor:
    """Logits [S, V] after each of the ids."""
    tokens = torch.tensor([ids], device=model.device)
    return model.unembed(model.features(tokens, cache, num_experts_per_tok=k).hidden[0])
