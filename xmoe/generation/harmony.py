"""Harmony, the format GPT-OSS converses in: conversations to ids, and what the model writes back to messages.

    <|start|>{role}[ to={recipient}][<|channel|>{channel}[ to={recipient}][ {content type}]]<|message|>{text}<|end|>

Channels are `analysis` (the model thinking), `commentary` (calls of tools, and words that announce them) and `final` (the
answer). A message ends with `<|end|>`; the model's turn ends with `<|return|>` (it is done) or `<|call|>` (a tool's turn).
Only `<|...|>` of our own making become special tokens: the same letters in somebody's text stay letters.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from xmoe.errors import ConfigError, DataError
from xmoe.generation.tools import Tool, namespace
from xmoe.model.config import EFFORTS

NEEDED = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
CHANNELS = ("analysis", "commentary", "final")
ROLES = ("system", "developer", "user", "assistant", "tool")
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"


@dataclass(frozen=True)
class Message:
    """One message. A tool's message bears the tool's name in `name`, e.g. `functions.get_weather`.

    content_type: what stands in the header about the text, e.g. `json`, or `<|constrain|>json` as the model writes it.
    """

    role: str
    text: str
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"unknown role {self.role!r}; expected {', '.join(ROLES)}")
        if self.role == "tool" and not self.name:
            raise ConfigError("a tool's message needs the tool's name, such as functions.get_weather")


@dataclass
class Conversation:
    """Messages, and what stands before them: the system message's facts, the developer's instructions and tools.

    effort: low, medium or high; None leaves the line out. date: "YYYY-MM-DD" pins the current date, so that a prompt is
    the same tomorrow; None leaves it out; `Conversation.today()` gives one for chatting.
    """

    messages: list[Message] = field(default_factory=list)
    instructions: str | None = None
    tools: Sequence[Tool] = ()
    effort: str | None = "medium"
    date: str | None = None
    identity: str = IDENTITY
    knowledge_cutoff: str = KNOWLEDGE_CUTOFF

    def __post_init__(self) -> None:
        if self.effort is not None and self.effort not in EFFORTS:
            raise ConfigError(f"unknown reasoning effort {self.effort!r}; expected {', '.join(EFFORTS)}")

    @staticmethod
    def today() -> str:
        return datetime.date.today().isoformat()

    def user(self, text: str) -> Conversation:
        self.messages.append(Message("user", text))
        return self

    def preamble(self) -> list[Message]:
        """The system message, and the developer's where there is something for it to say."""
        facts = [self.identity, f"Knowledge cutoff: {self.knowledge_cutoff}"]
        facts += [f"Current date: {self.date}"] if self.date else []
        sections = ["\n".join(facts)]
        sections += [f"Reasoning: {self.effort}"] if self.effort else []
        channels = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
        if self.tools:
            channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
        preamble = [Message("system", "\n\n".join([*sections, channels]))]
        said = [f"# Instructions\n\n{self.instructions}"] if self.instructions else []
        said += ["# Tools\n\n" + namespace("functions", self.tools)] if self.tools else []
        return preamble + ([Message("developer", "\n\n".join(said))] if said else [])

    def history(self) -> list[Message]:
        """The messages the model gets to see again: an analysis that led to a final answer is not among them.

        One that led to a call of a tool stays until the final answer has come, since the model is still at work on it.
        """
        last_final = max((i for i, m in enumerate(self.messages) if _is(m, "final")), default=-1)
        return [m for i, m in enumerate(self.messages) if i > last_final or not _is(m, "analysis")]


def speaks_harmony(tokenizer, folder: str | Path | None = None) -> bool:
    """Whether a model was taught Harmony: the published vocabulary, or a chat template in `folder` that writes channels.

    The special tokens alone prove nothing: every tokenizer trained here has them, for whoever wants to teach them.
    """
    if any(tokenizer.special(name) is None for name in NEEDED):
        return False
    if tokenizer.special("<|return|>") == 200002:
        return True
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json") if folder else ()
    files = [Path(folder, name) for name in names]
    return any("<|channel|>" in file.read_text(encoding="utf-8") for file in files if file.is_file())


class Harmony:
    """Renders and parses with one tokenizer, which must have Harmony's special tokens (ConfigError otherwise)."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        ids = {name: tokenizer.special(name) for name in NEEDED}
        missing = [name for name, id in ids.items() if id is None]
        if missing:
            raise ConfigError(
                f"the tokenizer has no {missing[0]}, so it cannot speak Harmony; expected {' '.join(NEEDED)}"
            )
        self.start, self.end, self.message, self.channel, self.constrain, self.returned, self.call = ids.values()
        self.names = {id: name for name, id in ids.items()}
        self.stop_tokens = frozenset([self.returned, self.call])

    def render(self, conversation: Conversation, *, reply: bool = True, keep_analysis: bool = False) -> list[int]:
        """Ids of the whole conversation; `reply` adds `<|start|>assistant`, after which the model speaks.

        keep_analysis: show the model its old thoughts too (it was not trained that way).
        """
        messages = conversation.messages if keep_analysis else conversation.history()
        ids = [id for message in [*conversation.preamble(), *messages] for id in self.render_message(message)]
        return [*ids, self.start, *self.tokenizer.encode("assistant")] if reply else ids

    def render_message(self, message: Message, *, last: bool = False) -> list[int]:
        """Ids of one message. `last`: a final answer ends with `<|return|>`, as in training data, not with `<|end|>`."""
        encode = self.tokenizer.encode
        to = encode(f" to={message.recipient}") if message.recipient else []
        if message.role == "tool":
            ids = [self.start, *encode(message.name)]
        else:
            ids = [self.start, *encode(f"{message.role}:{message.name}" if message.name else message.role)]
        ids += to
        if message.channel:
            ids += [self.channel, *encode(message.channel)]
        if message.content_type:
            name = self.names[self.constrain]
            before, constrained, after = message.content_type.partition(name)
            ids += encode(f" {before}") + ([self.constrain, *encode(after)] if constrained else [])
        ids += [self.message, *encode(message.text)]
        if message.role == "assistant" and message.recipient:
            return [*ids, self.call]
        return [*ids, self.returned if last and _is(message, "final") else self.end]

    def parse(self, ids: Iterable[int], *, role: str | None = "assistant", strict: bool = True) -> list[Message]:
        """Messages from ids. `role`: of the first message, where its `<|start|>assistant` stood in the prompt already.

        strict: DataError on anything the format does not allow. Otherwise nothing is an error: what can be read is read.
        """
        parser = self.parser(role=role, strict=strict)
        for id in ids:
            parser.push(id)
        parser.finish()
        return parser.messages

    def parser(self, *, role: str | None = "assistant", strict: bool = False) -> HarmonyParser:
        """A parser that is fed id by id."""
        return HarmonyParser(self, role, strict)


@dataclass(frozen=True)
class Event:
    """A piece of a message as it arrives: its header so far (`text` of `message` is empty), new text, and whether it ended."""

    message: Message
    text: str
    ended: bool = False


class HarmonyParser:
    """Ids in, events out. `messages` holds the complete ones.

    Lenient, it reads on where the format is broken: a message that begins inside another ends that one, a header without
    text is dropped, letters between messages are dropped, and letters that never get a header are a message without channel.
    """

    def __init__(self, harmony: Harmony, role: str | None, strict: bool) -> None:
        self.harmony, self.strict = harmony, strict
        self.messages: list[Message] = []
        self._role = role  # of a header that begins without one
        self._header: list[int] | None = None if role is None else []  # None outside a header
        self._open: Message | None = None
        self._text: list[str] = []

    def push(self, id: int) -> list[Event]:
        """Takes one id; returns what became certain by it, usually one event or none."""
        h = self.harmony
        if self._open is not None:
            return self._in_text(id)
        if self._header is None:
            if id == h.start:
                self._role, self._header = None, []
            elif self.strict:
                raise DataError(f"expected <|start|>, found {self._show([id])}")
            return []
        if id == h.message:
            self._open, self._header = self._read_header(self._header), None
            self._text, self._decoder = [], h.tokenizer.stream()
            return [Event(self._open, "")]
        if id in (h.start, h.end, h.returned, h.call):
            if self.strict:
                raise DataError(
                    f"the header {self._show(self._header)!r} ends with {h.names[id]}; expected <|message|>"
                )
            self._role, self._header = None, [] if id == h.start else None
            return []
        self._header.append(id)
        return []

    def finish(self) -> list[Event]:
        """No more ids will come: closes what is open."""
        if self._open is not None:
            return self._close()
        if self._header and self.strict:
            raise DataError(f"the text ends within the header {self._show(self._header)!r}; expected <|message|>")
        events = []
        if self._header and not set(self._header) & set(self.harmony.names):
            # A model that was never taught Harmony answers in plain letters: they are what it said.
            message = Message(self._role or "assistant", self.harmony.tokenizer.decode(self._header).lstrip())
            self.messages.append(message)
            events = [Event(replace(message, text=""), message.text, ended=True)]
        self._header = None
        return events

    def _in_text(self, id: int) -> list[Event]:
        h = self.harmony
        if id in (h.end, h.returned, h.call):
            return self._close()
        if id not in h.names:
            text = self._decoder.push(id)
            self._text.append(text)
            return [Event(self._open, text)] if text else []
        if self.strict:
            raise DataError(f"{h.names[id]} stands within a message; expected <|end|>, <|return|> or <|call|>")
        if id not in (h.start, h.channel):
            return []
        role = self._open.role
        events = self._close()
        self._role, self._header = (role, [id]) if id == h.channel else (None, [])
        return events

    def _close(self) -> list[Event]:
        rest = self._decoder.finish()
        self.messages.append(replace(self._open, text="".join(self._text) + rest))
        event = Event(self._open, rest, ended=True)
        self._open = None
        return [event]

    def _read_header(self, ids: list[int]) -> Message:
        """`role[ to=R]` or nothing, then `<|channel|>channel[ to=R][ type]`; both parts may name the recipient."""
        h = self.harmony
        cut = ids.index(h.channel) if h.channel in ids else len(ids)
        who, about = self._words(ids[:cut]), self._words(ids[cut + 1 :])
        role, name = self._role, None
        if role is None:
            if not who and self.strict:
                raise DataError("a header has no role")
            role, _, name = (who.pop(0) if who else "assistant").partition(":")
            if role not in ROLES:
                if self.strict and not any(word.startswith("to=") for word in who + about):
                    raise DataError(
                        f"unknown role {role!r}; expected {', '.join(ROLES)} or a tool's name with a recipient"
                    )
                role, name = "tool", f"{role}:{name}" if name else role
        if role == "tool" and not name:
            if self.strict:
                raise DataError("a tool's message needs the tool's name in place of its role")
            name = "unknown"
        if cut < len(ids) and not about and self.strict:
            raise DataError("<|channel|> has no channel after it")
        channel = about.pop(0) if about and not about[0].startswith(("to=", "<|")) else None
        recipients = [word[3:] for word in who + about if word.startswith("to=")]
        types = [word for word in who + about if not word.startswith("to=")]
        if self.strict and (len(types) > 1 or len(recipients) > 1):
            raise DataError(
                f"the header {self._show(ids)!r} says too much; expected one recipient and one content type"
            )
        return Message(role, "", name or None, channel, recipients[0] if recipients else None, " ".join(types) or None)

    def _words(self, ids: list[int]) -> list[str]:
        """The words of a part of the header, `<|constrain|>json` being one word."""
        return (
            self._show(ids)
            .replace("<|constrain|> ", "<|constrain|>")
            .replace("<|constrain|>", " <|constrain|>")
            .split()
        )

    def _show(self, ids: list[int]) -> str:
        return self.harmony.tokenizer.decode(ids)


def _is(message: Message, channel: str) -> bool:
    return message.role == "assistant" and message.channel == channel
