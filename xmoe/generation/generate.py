"""From a prompt to text: prefill, decode, stop. `stream` yields one prompt's text as it comes, `generate` serves a batch.

Prefill runs the prompt through the model in chunks and fills the cache; decoding then costs one token of work a token.
Text leaves only when it is certain: never half a UTF-8 character, never part of a stop string.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from xmoe.errors import ConfigError
from xmoe.generation.cache import KVCache, Mark
from xmoe.generation.sampling import Sampler
from xmoe.generation.settings import GenerationConfig, experts_per_token, read_settings
from xmoe.generation.stopping import StopStrings

RESERVE = 256  # cache columns allocated beyond the prompt; more come by doubling


@dataclass(frozen=True)
class Timing:
    """Seconds and rates of one run; a rate is None where too few tokens came to have one.

    first_token: from the call to the first token (TTFT: tokenizing, prefill, choice). total: from the call to the end.
    remembered_tokens: how many of the prompt's tokens an earlier run had read already (see PromptMemory).
    decode_tokens_per_second: (new_tokens - 1) / (total - first_token), the rate a reader sees (1 / TPOT).
    """

    prompt_tokens: int
    new_tokens: int
    first_token: float
    total: float
    remembered_tokens: int = 0

    @property
    def decode_tokens_per_second(self) -> float | None:
        after_first = self.total - self.first_token
        return (self.new_tokens - 1) / after_first if self.new_tokens > 1 and after_first > 0 else None

    @property
    def prompt_tokens_per_second(self) -> float | None:
        return (self.prompt_tokens - self.remembered_tokens) / self.first_token if self.first_token > 0 else None


@dataclass(frozen=True)
class Piece:
    """One step of a stream: the text that became certain (perhaps none) with the token that made it so.

    The last piece has a `finish_reason` (see Completion) and a `timing`; its `token` is the stop token, if one ended the text.
    """

    text: str
    token: int | None
    finish_reason: str | None = None
    timing: Timing | None = None


@dataclass(frozen=True)
class Completion:
    """What one prompt became.

    ids: generated tokens, the stop token left out. finish_reason: "stop_token", "stop_string", "length"
    (max_new_tokens) or "context" (the model's context is full). timing: of the batch this prompt ran in, with the
    prompt's own token counts.
    """

    text: str
    ids: list[int]
    finish_reason: str
    timing: Timing


class TokenSource(Protocol):
    """Decodes in place of `decode` and keeps its promises; `xmoe.generation.speculative` has one."""

    rollback: int  # how many tokens it may take back from the cache

    def tokens(
        self, model, cache: KVCache, ids: list[int], sampler: Sampler, *, num_experts_per_tok: int | None, chunk: int
    ) -> Iterator[int]: ...


class PromptMemory:
    """The cache of the last prompt, for a prompt that goes on from there: a chat need not read its history every turn."""

    def __init__(self) -> None:
        self._kept: tuple[object, list[int], KVCache, Mark] | None = None

    def recall(self, ids: list[int], under: object) -> KVCache | None:
        """The cache of a true beginning of `ids` that was computed `under` the same conditions, or None."""
        if self._kept is None or self._kept[0] != under:
            return None
        _, known, cache, mark = self._kept
        if len(known) >= len(ids) or ids[: len(known)] != known:
            return None
        cache.back_to(mark)
        return cache

    def keep(self, ids: list[int], cache: KVCache, under: object) -> None:
        """`cache` holds exactly `ids` now; it belongs to this memory, and to the run that goes on with it, from here on."""
        self._kept = (under, ids, cache, cache.mark())


def stream(
    model,
    tokenizer,
    prompt: str | Sequence[int],
    *,
    source: TokenSource | None = None,
    memory: PromptMemory | None = None,
    **settings,
) -> Iterator[Piece]:
    """Generates from one prompt (text or ids) and yields a `Piece` a token, then a last one with reason and timing.

    settings: fields of GenerationConfig and SamplingConfig. source: decodes speculatively. memory: saves reading what the
    prompt shares with the one before it. tokenizer may be None for a prompt of ids; the pieces then have no text.

    Raises ConfigError at the call, before anything runs: an unknown or impossible setting, a prompt beyond the context.
    """
    started = time.perf_counter()
    config, sampling = read_settings(settings)
    k = experts_per_token(model.config, config.num_experts_per_tok, config.reasoning_effort)
    ids, room = _fit(model.config, _prompt_ids(model.config, tokenizer, prompt), config)
    return _pieces(model, tokenizer, ids, room, config, sampling, k, source, memory, started)


def _pieces(model, tokenizer, ids, room, config, sampling, k, source, memory, started) -> Iterator[Piece]:
    stop_tokens = _stop_tokens(config, tokenizer)
    sampler = Sampler(sampling, rows=1)
    sampler.note(0, ids)
    rollback = 0 if source is None else source.rollback
    cache = memory.recall(ids, (k, rollback)) if memory else None
    if cache is None:
        cache = KVCache(model.config, reserve=len(ids) + min(room, RESERVE), rollback=rollback)
    remembered = cache.length
    tokens_from = decode if source is None else source.tokens
    text = _Text(tokenizer, config.stop)
    count, first, last_token, reason = 0, 0.0, None, _full(room, config)
    for token in tokens_from(model, cache, ids, sampler, num_experts_per_tok=k, chunk=config.prefill_chunk):
        if not first:
            first = time.perf_counter() - started
            if memory:
                memory.keep(ids, cache, (k, rollback))
        if token in stop_tokens:
            last_token, reason = token, "stop_token"
            break
        count += 1
        yield Piece(text.push(token), token)
        if text.stopped:
            reason = "stop_string"
            break
        if count == room:
            break
    total = time.perf_counter() - started
    yield Piece(text.rest(), last_token, reason, Timing(len(ids), count, first, total, remembered))


def generate(
    model, tokenizer, prompts: Sequence[str | Sequence[int]], *, batch_size: int = 16, **settings
) -> list[Completion]:
    """Completes every prompt (text or ids), `batch_size` at a time; each gets what it would get alone.

    Shorter prompts are padded on the left; padding is no key and has position -1, so it changes nothing but rounding.
    settings: fields of GenerationConfig and SamplingConfig; prompt i draws with seed + i. tokenizer None: ids in, ids out.
    """
    config, sampling = read_settings(settings)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")
    k = experts_per_token(model.config, config.num_experts_per_tok, config.reasoning_effort)
    rows = [_Row(*_fit(model.config, _prompt_ids(model.config, tokenizer, p), config)) for p in prompts]
    for row in rows:
        row.text, row.reason = _Text(tokenizer, config.stop), _full(row.room, config)
    done: list[Completion] = []
    for first in range(0, len(rows), batch_size):
        sampler = Sampler(sampling, min(batch_size, len(rows) - first), first_row=first)
        done += _complete(model, rows[first : first + batch_size], sampler, config, _stop_tokens(config, tokenizer), k)
    return done


@dataclass
class _Row:
    """One prompt of a batch on its way."""

    ids: list[int]
    room: int
    text: _Text | None = None
    new: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    reason: str = "length"
    done: bool = False

    def take(self, token: int, stop_tokens: frozenset[int]) -> None:
        if token in stop_tokens:
            self.reason, self.done = "stop_token", True
            return
        self.new.append(token)
        self.pieces.append(self.text.push(token))
        if self.text.stopped:
            self.reason, self.done = "stop_string", True
        elif len(self.new) == self.room:
            self.done = True


def _complete(model, rows: list[_Row], sampler: Sampler, config: GenerationConfig, stop_tokens, k) -> list[Completion]:
    started, first = time.perf_counter(), 0.0
    tokens, positions = left_padded([row.ids for row in rows], model.device)
    for i, row in enumerate(rows):
        sampler.note(i, row.ids)
    cache = KVCache(model.config, reserve=tokens.shape[1] + min(max(row.room for row in rows), RESERVE))
    logits = prefill(model, cache, tokens, positions, num_experts_per_tok=k, chunk=config.prefill_chunk)
    next_position = positions[:, -1] + 1
    live = list(rows)
    while True:
        chosen = sampler.choose(logits)
        ids = chosen.tolist()
        first = first or time.perf_counter() - started
        for i, (row, token) in enumerate(zip(live, ids)):
            if not row.done:
                row.take(token, stop_tokens)
                sampler.note(i, [token])
        still = [i for i, row in enumerate(live) if not row.done]
        if not still:
            break
        if len(still) <= len(live) // 2:  # carrying finished rows costs as much as dropping them does
            live = [live[i] for i in still]
            sampler.select(still)
            index = torch.tensor(still, device=tokens.device)
            cache, chosen, next_position = cache.select(index), chosen[index], next_position[index]
        finished = torch.tensor([row.done for row in live], device=tokens.device)
        logits = _logits(model, cache, chosen[:, None], next_position.masked_fill(finished, -1)[:, None], k)
        next_position = next_position + 1
    total = time.perf_counter() - started
    return [
        Completion(
            "".join(row.pieces) + row.text.rest(), row.new, row.reason, Timing(len(row.ids), len(row.new), first, total)
        )
        for row in rows
    ]


# The two halves of the work, for other decoders too ----------------------------------------------------------------------


def prefill(
    model,
    cache: KVCache,
    tokens: Tensor,
    positions: Tensor | None = None,
    *,
    num_experts_per_tok: int | None = None,
    chunk: int = 512,
) -> Tensor:
    """Takes tokens int64 [B, S] into the cache, `chunk` at a time; returns logits [B, V] after the last one.

    positions: int64 [B, S], -1 = padding; None counts on from the cache.
    """
    for start in range(0, tokens.shape[1], chunk):
        part = None if positions is None else positions[:, start : start + chunk]
        logits = _logits(model, cache, tokens[:, start : start + chunk], part, num_experts_per_tok)
    return logits


def decode(
    model, cache: KVCache, ids: list[int], sampler: Sampler, *, num_experts_per_tok: int | None = None, chunk: int = 512
) -> Iterator[int]:
    """Endless tokens after the prompt `ids`, one forward pass each; the caller stops when it has seen enough.

    The cache may hold a beginning of the prompt already. When the first token comes, it holds the prompt and no more.
    """
    prompt = torch.tensor([ids[cache.length :]], device=model.device)
    logits = prefill(model, cache, prompt, num_experts_per_tok=num_experts_per_tok, chunk=chunk)
    while True:
        chosen = sampler.choose(logits)
        token = int(chosen)
        sampler.note(0, [token])
        yield token
        logits = _logits(model, cache, chosen[:, None], None, num_experts_per_tok)


@torch.inference_mode()
def _logits(model, cache, tokens: Tensor, positions: Tensor | None, k: int | None) -> Tensor:
    """Logits [B, V] after the last of `tokens` [B, S]; only that one place meets the vocabulary."""
    hidden = model.features(tokens, cache, positions=positions, num_experts_per_tok=k).hidden
    return model.unembed(hidden[:, -1])


def left_padded(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows of ids as one batch: tokens and positions, both int64 [B, longest]; padding is id 0 at position -1."""
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions = torch.full((len(rows), longest), -1)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :] = torch.tensor(row)
        positions[i, longest - len(row) :] = torch.arange(len(row))
    return tokens.to(device), positions.to(device)


# Reading what the caller asked for ------------------------------------------------------------------------------------


def _prompt_ids(model_config, tokenizer, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError(
                "a prompt of text needs a tokenizer; this checkpoint has none: give ids, or another tokenizer"
            )
        ids = tokenizer.encode(prompt)
        if not ids:
            # Documents are joined by this token in training, so it is what a text begins with.
            if tokenizer.eos_id is None:
                raise ConfigError(
                    "the prompt is empty and the tokenizer has no token to begin a text with; give a prompt"
                )
            ids = [tokenizer.eos_id]
    else:
        ids = [int(i) for i in prompt]
        if not ids:
            raise ConfigError("the prompt has no tokens; expected at least one")
    if min(ids) < 0 or max(ids) >= model_config.vocab_size:
        wrong = next(i for i in ids if not 0 <= i < model_config.vocab_size)
        raise ConfigError(f"the prompt has token {wrong}; the model's vocabulary is 0 to {model_config.vocab_size - 1}")
    return ids


def _fit(model_config, ids: list[int], config: GenerationConfig) -> tuple[list[int], int]:
    """The prompt as it will run, and the tokens that may follow it within the context."""
    context = model_config.max_position_embeddings
    if len(ids) >= context:
        if config.overflow == "error":
            raise ConfigError(
                f"the prompt has {len(ids)} tokens and the model's context is {context}, so nothing can follow; "
                "shorten it, or let its beginning be forgotten (overflow='truncate')"
            )
        # At least half of the context stays, however much is asked for.
        ids = ids[-max(context - config.max_new_tokens, context // 2, 1) :]
    return ids, min(config.max_new_tokens, context - len(ids))


def _full(room: int, config: GenerationConfig) -> str:
    """The reason for stopping when `room` runs out."""
    return "length" if room == config.max_new_tokens else "context"


def _stop_tokens(config: GenerationConfig, tokenizer) -> frozenset[int]:
    if config.stop_tokens is not None:
        return config.stop_tokens
    return frozenset() if tokenizer is None or tokenizer.eos_id is None else frozenset([tokenizer.eos_id])


class _Text:
    """Ids in, certain text out: whole characters, and nothing that might be the beginning of a stop string."""

    def __init__(self, tokenizer, stop: Iterable[str]) -> None:
        self._decoder = None if tokenizer is None else tokenizer.stream()
        self._stop = StopStrings(stop)

    def push(self, token: int) -> str:
        return "" if self._decoder is None else self._stop.push(self._decoder.push(token))

    @property
    def stopped(self) -> bool:
        return self._stop.found is not None

    def rest(self) -> str:
        """What was held back and turned out to be plain text. Half a character at the end is never shown."""
        return self._stop.rest()
