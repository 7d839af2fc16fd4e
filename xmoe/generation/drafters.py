"""Who guesses the next tokens for speculative decoding.

- PromptLookup: what followed the last few tokens when they last stood in the text; costs nothing.
- Checkpoint: a smaller model with the same tokenizer.
- SameWeights: the model itself with fewer experts per token or under a pruning plan; no weights and no cache of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from xmoe.errors import ConfigError
from xmoe.generation.cache import KVCache
from xmoe.generation.generate import prefill
from xmoe.generation.sampling import SamplingConfig, distribution, draw
from xmoe.generation.settings import experts_per_token
from xmoe.generation.speculative import Draft


class PromptLookup:
    """Proposes what followed the last few tokens when they last stood in the text.

    It watches how often it is right and steps back by itself. With a the (moving average) chance that a drafted token is
    right, drafting n of them gains (1 + a + ... + a^n) / (1 + first + each * n), where the divisor is what a pass over
    1 + n tokens costs. It drafts the n that promises most; where none promises `MARGIN`, it waits, longer after every
    failure, and then tries one token. So text that never repeats loses next to nothing.
    """

    MARGIN = 1.1  # the least gain worth drafting for: a is only an estimate
    FORGETTING = 0.9  # weight of the past in the moving average, per drafted token that was judged
    FIRST_WAIT, LONGEST_WAIT = 4, 64  # tokens

    def __init__(self, longest: int = 4, shortest: int = 2, first: float = 0.3, each: float = 0.15) -> None:
        """longest, shortest: how many tokens must agree; long matches are sought first.

        first, each: cost of checking n drafted tokens, first + each * n, in passes over one token. The defaults suit
        experts read from memory, of which every token brings its own (`benchmarks/speculative.py` measures both).
        """
        if not 1 <= shortest <= longest:
            raise ConfigError(
                f"prompt lookup matches {shortest} to {longest} tokens; expected 1 <= shortest <= longest"
            )
        if first < 0 or each <= 0:
            raise ConfigError(f"checking drafted tokens costs {first} + {each} * n passes; expected positive numbers")
        self.longest, self.shortest, self.first, self.each = longest, shortest, first, each
        self.begin()

    def begin(self, model=None) -> None:
        """A new text. Any model will do."""
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest continuation begins
        self._indexed = 0
        self._chance = 0.55
        self._wait, self._next_wait = 0, self.FIRST_WAIT
        self._seen, self._most = 0, 1

    def propose(self, text, count, cache=None, config=None, generators=None) -> Draft:
        """See Drafter; only the text and the count matter here."""
        self._index(text)
        self._wait -= len(text) - self._seen
        self._seen = len(text)
        if self._wait > 0:
            return Draft([])
        self._most = count
        length, gain = self._promising()
        return Draft(self._continuation(text, length if gain >= self.MARGIN else 1))

    def heard(self, proposed: int, accepted: int) -> None:
        """Learns from every drafted token that was judged: those accepted, and the first one that was not."""
        for right in [True] * accepted + [False] * (accepted < proposed):
            self._chance = self.FORGETTING * self._chance + (1 - self.FORGETTING) * right
        if not proposed or self._promising()[1] >= self.MARGIN:
            return
        # A trial that failed doubles the wait for the next; one that was right quarters it.
        longer = self._next_wait // 4 if accepted == proposed else 2 * self._next_wait
        self._next_wait = min(max(longer, self.FIRST_WAIT), self.LONGEST_WAIT)
        self._wait = self._next_wait

    def _promising(self) -> tuple[int, float]:
        """The number of drafted tokens that promises most, and the gain it promises."""
        best, best_gain, right, expected = 1, 0.0, 1.0, 1.0
        for n in range(1, self._most + 1):
            right *= self._chance
            expected += right
            gain = expected / (1 + self.first + self.each * n)
            if gain > best_gain:
                best, best_gain = n, gain
        return best, best_gain

    def _index(self, text: list[int]) -> None:
        """Notes every n-gram that something follows; each is noted once."""
        for end in range(max(self._indexed, 1), len(text)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                self._after[tuple(text[end - n : end])] = end
        self._indexed = len(text)

    def _continuation(self, text: list[int], count: int) -> list[int]:
        for n in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            start = self._after.get(tuple(text[-n:]))
            if start is not None:
                # Past the end of the text the drafted tokens themselves go on: a loop is copied round and round.
                period = len(text) - start
                return [text[start + i % period] for i in range(count)]
        return []


class Checkpoint:
    """Drafts with another, smaller model that has the same tokenizer; it keeps a cache of its own."""

    def __init__(self, model, num_experts_per_tok: int | None = None) -> None:
        self.model = model
        self.k = experts_per_token(model.config, num_experts_per_tok)
        self._cache: KVCache | None = None
        self._read: list[int] = []

    def begin(self, model) -> None:
        if model.config.vocab_size != self.model.config.vocab_size:
            raise ConfigError(
                f"the draft model's vocabulary has {self.model.config.vocab_size} ids and the model's has "
                f"{model.config.vocab_size}; choose a draft model with the same tokenizer"
            )
        self._cache, self._read = None, []

    def propose(self, text, count, cache, config, generators) -> Draft:
        known = min(len(self._read), len(text) - 1)
        while self._read[:known] != text[:known]:
            known -= 1
        if self._cache is None:
            self._cache = KVCache(self.model.config, reserve=len(text) + count, rollback=count)
        self._cache.truncate(known)
        drafted = _draft(self.model, self._cache, text[known:], count, self.k, config, generators)
        self._read = [*text, *drafted.ids[:-1]]
        return drafted

    def heard(self, proposed: int, accepted: int) -> None:
        pass


class SameWeights:
    """Drafts with the model itself, made cheaper: fewer experts per token, or only the experts a pruning plan keeps.

    It drafts on the model's own cache, takes its keys back, and lets the model compute them again in full: so it always
    looks back at what the model itself saw.
    """

    def __init__(
        self, model, num_experts_per_tok: int | None = None, kept: Sequence[Sequence[int]] | None = None
    ) -> None:
        """kept: for each layer the experts that may be chosen, as in a pruning plan."""
        if num_experts_per_tok is None and kept is None:
            raise ConfigError(
                "drafting with the same weights needs fewer experts per token or a plan, or it saves nothing"
            )
        usual = model.config.num_experts_per_tok
        if kept is None and usual <= num_experts_per_tok <= model.config.experts_in_layer(0):
            raise ConfigError(
                f"a draft with {num_experts_per_tok} experts per token saves nothing: the model itself visits {usual}; "
                "expected fewer"
            )
        self.model = model
        self.k = experts_per_token(model.config, num_experts_per_tok)
        self._routers = [block.moe.router for block in model.blocks]
        self._masks = None
        if kept is not None:
            before = _masks(self._routers)
            for router, ids in zip(self._routers, kept, strict=True):
                router.keep_only(ids)
            self._masks = self._swap(before)

    def begin(self, model) -> None:
        if model is not self.model:
            raise ConfigError("SameWeights drafts for the model it was made with, and for no other")

    def propose(self, text, count, cache, config, generators) -> Draft:
        start = cache.length
        with self._masked():
            drafted = _draft(self.model, cache, text[start:], count, self.k, config, generators)
        cache.truncate(start)
        return drafted

    def heard(self, proposed: int, accepted: int) -> None:
        pass

    @contextmanager
    def _masked(self) -> Iterator[None]:
        before = self._swap(self._masks) if self._masks else None
        try:
            yield
        finally:
            if before:
                self._swap(before)

    def _swap(self, masks: list) -> list:
        """Sets every router's mask; returns those that were set."""
        before = _masks(self._routers)
        for router, mask in zip(self._routers, masks):
            router.kept, router.kept_ids, router.num_kept = mask
        return before


def _masks(routers) -> list:
    """What `Router.keep_only` sets. Kept and put back whole, since making a mask anew for every draft takes time."""
    return [(r.kept, r.kept_ids, r.num_kept) for r in routers]


def _draft(model, cache, unread: list[int], count: int, k, config: SamplingConfig, generators) -> Draft:
    """`count` tokens one by one, after `unread` (the end of the text that the cache lacks)."""
    # A draft is a guess: it may leave the repetition penalty to the judge.
    config = config.but(repetition_penalty=1.0)
    ids, rows = [], []
    logits = prefill(model, cache, torch.tensor([unread], device=model.device), num_experts_per_tok=k)
    for n in range(count):
        if config.greedy:
            ids.append(int(logits.argmax(-1)))
        else:
            rows.append(distribution(logits, config))
            ids.append(int(draw(rows[-1], generators)))
        if n + 1 < count:
            logits = prefill(model, cache, torch.tensor([ids[-1:]], device=model.device), num_experts_per_tok=k)
    return Draft(ids, torch.cat(rows) if rows else None)
