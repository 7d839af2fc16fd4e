"""What a model is watched on: texts and conversations, and its own answers to them.

A text is cut into rows wherever a row is full. A conversation is a row of its own, rendered as the model meets it: in
Harmony where the tokenizer speaks it, else in paragraphs that begin with `User:` and `Assistant:`, as `chat` writes them.
A row of a .jsonl file or hub dataset is a conversation where it has

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "thinking": "...", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

A cut judged on prompts alone forgets how answers are written; `with_answers` lets the model speak too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from xmoe.compression.layerwise import as_batches
from xmoe.data.calibration_batches import CalibrationBatch, batches
from xmoe.data.sources import load_rows, locate
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import ConfigError, DataError
from xmoe.generation.generate import generate
from xmoe.generation.harmony import Conversation, Harmony, Message
from xmoe.generation.session import plain_transcript
from xmoe.model.transformer import Transformer

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
"""Names of roles elsewhere -> ours."""


def calibration(
    source: str,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    tokens: int,
    batch_size: int,
    harmony: bool = False,
    prompts: bool = False,
) -> list[CalibrationBatch]:
    """The first `tokens` tokens of texts and conversation sets, in the order of `source`, as batches of rows.

    Args:
        source: as in :mod:`xmoe.data.sources`, several joined by commas.
        harmony: render conversations so, which only a model that was taught it understands.
        prompts: conversations end where the assistant is to speak for the last time.

    Raises:
        DataError: a source that is not there or holds nothing, a conversation that is malformed (with file and line).
    """
    if min(seq_len, tokens, batch_size) < 1:
        raise ConfigError(f"expected 1 or more: seq_len {seq_len}, tokens {tokens}, batch_size {batch_size}")
    found: list[CalibrationBatch] = []
    left = tokens
    for place in locate(source):
        if left < 1:
            break
        sizes = {"seq_len": seq_len, "tokens": left, "batch_size": batch_size}
        if _holds_conversations(place.name):
            found += _conversation_batches(place.name, tokenizer, harmony=harmony, prompts=prompts, **sizes)
        else:
            found += batches(place.name, tokenizer, **sizes)
        left = tokens - sum(int(b.mask.sum()) for b in found)
    return found


def with_answers(
    model: Transformer, batches: Iterable, new_tokens: int = 128, seed: int = 0, ends: Iterable[int] = ()
) -> Iterator[Tensor]:
    """Each row of `batches` as a prompt, and what the model says to it at temperature 1: token ids [1, S], one a row.

    A prompt gives way where prompt and answer together would pass the model's context: its first tokens stay. An answer
    ends with one of the tokens `ends`, or after `new_tokens`.
    """
    room = model.config.max_position_embeddings - new_tokens
    options = {"max_new_tokens": new_tokens, "temperature": 1.0, "stop_tokens": frozenset(ends)}
    number = 0
    for batch in as_batches(batches):
        for i, row in enumerate(batch.tokens):
            ids = (row if batch.mask is None else row[batch.mask[i]]).tolist()[: max(1, room)]
            if ids:
                (done,) = generate(model, None, [ids], seed=seed + number, **options)
                number += 1
                yield torch.tensor([[*ids, *done.ids]])


# ------------------------------------------------------------------------------------------------------ conversations


def _holds_conversations(source: str) -> bool:
    """Whether the first row of a source of rows is a conversation; files of text have no rows."""
    _, fields = next(load_rows(source), ("", {}))
    return any(isinstance(fields.get(name), list) for name in ("messages", "conversations"))


def _conversation_batches(
    source: str, tokenizer: Tokenizer, *, seq_len: int, tokens: int, batch_size: int, harmony: bool, prompts: bool
) -> Iterator[CalibrationBatch]:
    rows: list[list[int]] = []
    for where, fields in load_rows(source):
        system, messages = read_conversation(where, fields)
        ids = render(system, messages, tokenizer, harmony=harmony, prompt=prompts)[: min(seq_len, tokens)]
        rows.append(ids)
        tokens -= len(ids)
        if len(rows) == batch_size or tokens < 1:
            yield _padded(rows, tokenizer.pad_id or 0)
            rows = []
        if tokens < 1:
            return
    if rows:
        yield _padded(rows, tokenizer.pad_id or 0)


def _padded(rows: list[list[int]], pad: int) -> CalibrationBatch:
    width = max(map(len, rows))
    return CalibrationBatch(
        torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows]),
    )


def read_conversation(where: str, fields: dict[str, Any]) -> tuple[str, list[Message]]:
    """The system's text and the messages of a row; thoughts become a message on the analysis channel before the answer."""
    said, system, messages = fields.get("messages", fields.get("conversations")), [], []
    if not isinstance(said, list) or not said:
        raise DataError(f"{where}: expected a list of messages, found fields {', '.join(map(str, fields)) or 'none'}")
    for one in said:
        if not isinstance(one, dict):
            raise DataError(f"{where}: a message is a {type(one).__name__}; expected role and content")
        role, text = one.get("role", one.get("from")), _text(one.get("content", one.get("value")))
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant") or text is None:
            raise DataError(
                f"{where}: a message with role {role!r} and content of type {type(one.get('content')).__name__}; "
                "expected system, user or assistant, and text"
            )
        if role == "system":
            system.append(text)
            continue
        if role == "assistant" and isinstance(one.get("thinking"), str):
            messages.append(Message(role, one["thinking"], channel="analysis"))
        messages.append(Message(role, text, channel="final" if role == "assistant" else None))
    if not any(m.role == "user" for m in messages):
        raise DataError(f"{where}: nobody asks anything; expected a message of the user")
    return "\n".join(system), messages


def _text(content: Any) -> str | None:
    """A message's text; some sets write it as a list of parts."""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(p["text"] for p in content)
    return content if isinstance(content, str) else None


def render(
    system: str, messages: list[Message], tokenizer: Tokenizer, *, harmony: bool = False, prompt: bool = False
) -> list[int]:
    """Ids of a conversation, as the model met it when the last question was answered; `prompt` leaves that answer out.

    Old thoughts are forgotten, those behind the last question are not.
    """
    asked = max(i for i, m in enumerate(messages) if m.role == "user") + 1
    past, answer = messages[:asked], [] if prompt else messages[asked:]
    if harmony:
        writer = Harmony(tokenizer)
        ids = writer.render(Conversation(past, instructions=system or None), reply=prompt)
        return ids + [i for m in answer for i in writer.render_message(m, last=m is answer[-1])]
    text = plain_transcript([m for m in past if m.channel != "analysis"], system)
    if not prompt:
        spoken = [m.text for m in answer if m.channel == "final"]
        text = f"{text} {spoken[0]}" if spoken else text.removesuffix("\nAssistant:")
    return tokenizer.encode(text)
