"""A conversation with a model, turn by turn: what `scripts/chat.py` shows.

Three kinds, with the same few methods. `Continuation` is for base models, which know no turns and write a text on.
`PlainChat` writes turns as `User:` and `Assistant:` lines, for small variants taught in that form. `HarmonyChat` speaks
Harmony with GPT-OSS. `ask` yields what the model says as it says it and keeps what was said, also when it is cut short.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from xmoe.errors import ConfigError
from xmoe.generation.generate import Piece, PromptMemory, Timing, TokenSource, experts_per_token, stream
from xmoe.generation.harmony import Conversation, Harmony, Message
from xmoe.model.config import EFFORTS


@dataclass(frozen=True)
class Said:
    """A piece of an answer. channel: Harmony's, None elsewhere. The last piece has a finish_reason and a timing."""

    text: str
    channel: str | None = None
    finish_reason: str | None = None
    timing: Timing | None = None


class Continuation:
    """Every prompt is a new text, written on by the model; an empty prompt lets it go on with the last one."""

    kind = "continuation"

    def __init__(self, model, tokenizer, settings: dict, source: TokenSource | None = None) -> None:
        """settings: keyword settings of `stream`; they may be changed between turns."""
        self.model, self.tokenizer, self.settings, self.source = model, tokenizer, settings, source
        self.memory = PromptMemory()
        self.text = ""

    def ask(self, text: str) -> Iterator[Said]:
        prompt = text or self.text
        pieces = _stream(self, prompt)
        self.text = prompt
        for piece in pieces:
            self.text += piece.text
            yield Said(piece.text, None, piece.finish_reason, piece.timing)

    def set_effort(self, effort: str) -> None:
        _set_experts_by_effort(self, effort)

    def set_system(self, text: str) -> None:
        raise ConfigError("a base model takes no system text: it writes on what it is given")

    def reset(self) -> None:
        self.text = ""

    def transcript(self) -> dict:
        return {"text": self.text}


class PlainChat:
    """Turns as lines of text; the model's turn ends where it would speak for the user."""

    kind = "plain"

    def __init__(self, model, tokenizer, settings: dict, source: TokenSource | None = None, system: str = "") -> None:
        self.model, self.tokenizer, self.settings, self.source = model, tokenizer, settings, source
        self.memory = PromptMemory()
        self.system = system
        self.messages: list[Message] = []

    def ask(self, text: str) -> Iterator[Said]:
        asked = [*self.messages, Message("user", text)]
        pieces = _stream(self, plain_transcript(asked, self.system), stop=("\nUser:",))
        answer = ""
        try:
            for piece in pieces:
                shown = piece.text if answer else piece.text.lstrip()
                answer += shown
                yield Said(shown, None, piece.finish_reason, piece.timing)
        finally:
            self.messages = [*asked, Message("assistant", answer.strip())]

    def set_effort(self, effort: str) -> None:
        _set_experts_by_effort(self, effort)

    def set_system(self, text: str) -> None:
        self.system = text

    def reset(self) -> None:
        self.messages = []

    def transcript(self) -> dict:
        return {"system": self.system, "messages": [{"role": m.role, "text": m.text} for m in self.messages]}


class HarmonyChat:
    """A Harmony conversation: the channels come apart as they stream, old thoughts are not shown to the model again."""

    kind = "harmony"

    def __init__(
        self,
        model,
        tokenizer,
        settings: dict,
        source: TokenSource | None = None,
        system: str = "",
        effort: str = "medium",
    ) -> None:
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self.harmony = Harmony(tokenizer)
        self.settings = {**settings, "stop_tokens": self.harmony.stop_tokens}
        self.memory = PromptMemory()
        self.conversation = Conversation(instructions=system or None, effort=effort, date=Conversation.today())

    def ask(self, text: str) -> Iterator[Said]:
        asked = [*self.conversation.messages, Message("user", text)]
        prompt = self.harmony.render(Conversation(**{**vars(self.conversation), "messages": asked}))
        pieces = _stream(self, prompt)
        parser = self.harmony.parser()
        try:
            for piece in pieces:
                events = [] if piece.token is None else parser.push(piece.token)
                if piece.finish_reason:
                    events += parser.finish()
                for event in events:
                    if event.text:
                        yield Said(event.text, _channel(event.message))
                if piece.finish_reason:
                    yield Said("", None, piece.finish_reason, piece.timing)
        finally:
            parser.finish()
            self.conversation.messages = [*asked, *(m for m in parser.messages if m.text)]

    def set_effort(self, effort: str) -> None:
        if effort not in EFFORTS:
            raise ConfigError(f"unknown reasoning effort {effort!r}; expected {', '.join(EFFORTS)}")
        self.conversation.effort = effort

    def set_system(self, text: str) -> None:
        self.conversation.instructions = text or None

    def reset(self) -> None:
        self.conversation.messages = []

    def transcript(self) -> dict:
        return asdict(self.conversation)


Session = Continuation | PlainChat | HarmonyChat


def plain_transcript(messages: list[Message], system: str = "") -> str:
    """Messages as `User:` and `Assistant:` paragraphs, ending where the assistant is to speak."""
    turns = [system] if system else []
    turns += [f"{m.role.capitalize()}: {m.text}" for m in messages]
    return "\n".join([*turns, "Assistant:"])


def _stream(session: Session, prompt: str | list[int], **fixed) -> Iterator[Piece]:
    settings = {**session.settings, **fixed}
    pieces = stream(session.model, session.tokenizer, prompt, source=session.source, memory=session.memory, **settings)
    if settings.get("seed") is not None:
        session.settings["seed"] += (
            1  # the same question asked twice gets two answers, a conversation run twice the same
        )
    return pieces


def set_experts(session: Session, k: int | None) -> None:
    """From the next turn on every token visits `k` experts; None: as many as the model was made for."""
    experts_per_token(session.model.config, k)  # raises where the model has fewer
    session.settings.update(num_experts_per_tok=k)
    session.settings.pop("reasoning_effort", None)


def _set_experts_by_effort(session: Session, effort: str) -> None:
    experts_per_token(session.model.config, None, effort)  # raises where the model has no such effort
    session.settings.update(reasoning_effort=effort, num_experts_per_tok=None)


def _channel(message: Message) -> str:
    """Where a piece is shown: a message without a channel is an answer, and so is what a model without Harmony writes."""
    return message.channel if message.channel in ("analysis", "commentary") else "final"
