"""From strings to token ids, by the harness's rules: where a context ends, what a page's windows are, what is cut.

The ids of the *whole* string decide: a continuation's ids are what follows the context's ids in enc(context +
continuation), never enc(continuation), because a tokenizer may join letters across the seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from evaluation.task import Request
from xmoe.errors import ConfigError, DataError

BOS_NAMES = ("<|startoftext|>", "<|begin_of_text|>", "<s>", "<bos>")


class Encoder(Protocol):
    """What is asked of a tokenizer; `xmoe.data.tokenizer.Tokenizer` has it."""

    eos_id: int | None
    vocab_size: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def special(self, name: str) -> int | None: ...


class TokenRequest(NamedTuple):
    """Score `targets` as the continuation of `context` (ids; the context is never empty). cut: ids lost on the left."""

    context: list[int]
    targets: list[int]
    cut: int = 0


def prefix_token(tokenizer: Encoder, choice: str = "auto") -> int | None:
    """The token that stands in for an empty context.

    auto: the beginning-of-text token if the vocabulary has one (GPT-OSS: 199998), else end-of-text (GPT-2: 50256).
    bos, eos: that one. none: no token, and the first token of a page goes unscored. Or an id.
    """
    bos = next((id for id in map(tokenizer.special, BOS_NAMES) if id is not None), None)
    known = {"auto": tokenizer.eos_id if bos is None else bos, "bos": bos, "eos": tokenizer.eos_id, "none": None}
    if choice in known:
        if known[choice] is None and choice != "none":
            raise ConfigError(f"--prefix-token {choice}: this tokenizer has no such token; say none, or an id")
        return known[choice]
    if not choice.isdigit() or int(choice) >= tokenizer.vocab_size:
        raise ConfigError(
            f"--prefix-token {choice}: expected auto, bos, eos, none or an id below {tokenizer.vocab_size}"
        )
    return int(choice)


def encode_requests(
    requests: Sequence[Request], tokenizer: Encoder, prefix: int | None, max_length: int
) -> list[TokenRequest]:
    """Ids of every (context, continuation); the model will see at most `max_length` of them at once.

    Trailing white space of a context belongs to the continuation. A longer input loses its left end.

    Raises:
        DataError: a continuation that has no ids, or more than `max_length`.
    """
    pairs = [_move_spaces(r) for r in requests]
    texts = list(dict.fromkeys([c for c, _ in pairs if c] + [c + k for c, k in pairs]))
    ids: dict[str, list[int]] = {}
    for start in range(0, len(texts), 512):
        part = texts[start : start + 512]
        ids.update(zip(part, tokenizer.encode_batch(part)))
    encoded = []
    for context, continuation in pairs:
        whole = ids[context + continuation]
        if context:
            head = ids[context]
            tail = whole[len(head) :]
        elif prefix is None or whole[:1] == [prefix]:
            head, tail = whole[:1], whole[1:]
        else:
            head, tail = [prefix], whole
        encoded.append(_fit(head, tail, max_length, continuation))
    return encoded


def _move_spaces(request: Request) -> tuple[str, str]:
    context = request.context.rstrip()
    return context, request.context[len(context) :] + request.continuation


def _fit(head: list[int], tail: list[int], max_length: int, text: str) -> TokenRequest:
    if not tail or not head:
        raise DataError(f"the continuation {text[:40]!r} has no tokens of its own; nothing of it can be scored")
    if len(tail) > max_length:
        raise DataError(
            f"the continuation {text[:40]!r}... has {len(tail)} tokens, more than --max-length {max_length}; raise it"
        )
    cut = max(0, len(head) + len(tail) - 1 - max_length)  # the last token is a target only, never an input
    return TokenRequest(head[cut:], tail, cut)


def windows(ids: Sequence[int], prefix: int | None, max_length: int) -> list[TokenRequest]:
    """The windows in which a page is scored, every id exactly once.

    Each window but the last has `max_length` targets and one token of context; the last one reaches back until it is
    as long, with only its new ids as targets. With no prefix token the first id is context only.
    """
    ids = list(ids)
    if prefix is None:
        prefix, ids = (ids[0], ids[1:]) if ids else (None, ids)
    result = []
    for start in range(0, len(ids), max_length):
        end = min(start + max_length, len(ids))
        begin = max(0, min(start, end - max_length))
        before = [prefix, *ids[:start]] if begin == 0 else ids[begin - 1 : start]
        result.append(TokenRequest(before, ids[start:end]))
    return result
