"""A conversation in a terminal or through a pipe: prompts, commands, and answers that stream.

Answers go to standard output; everything else (greeting, figures, errors) to standard error, so that a pipe gets text only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from pathlib import Path

from xmoe.errors import ConfigError, XmoeError
from xmoe.generation.session import Said, Session, set_experts
from xmoe.generation.settings import read_settings
from xmoe.kernels import dispatch
from xmoe.outputs import new_file

HELP = """\
/help                 this list
/reset                forget the conversation
/effort E             low, medium or high
/experts K            experts each token visits (/experts auto: the model's own number)
/system TEXT          a new system text, from the next turn on
/temperature T  /top-p P  /top-k K  /min-p P  /penalty R  /max-new-tokens N  /seed N
/settings             what is set
/save FILE            the conversation so far, as JSON
/quit                 leave (so does Ctrl-D); Ctrl-C stops an answer
A line that ends in \\ goes on in the next."""

NUMBERS = {  # command -> (setting, type)
    "/temperature": ("temperature", float),
    "/top-p": ("top_p", float),
    "/top-k": ("top_k", int),
    "/min-p": ("min_p", float),
    "/penalty": ("repetition_penalty", float),
    "/max-new-tokens": ("max_new_tokens", int),
    "/seed": ("seed", int),
}
GREETINGS = {
    "harmony": "Harmony chat",
    "plain": "plain chat",
    "continuation": "a base model without a chat template: it writes on what you type (an empty line: further)",
}
REASONS = {"length": "stopped at max-new-tokens", "context": "the context is full"}


class Terminal:
    """Shows a session. `name`: of the checkpoint, as the user wrote it. hide_analysis: leave the model's thoughts out."""

    def __init__(self, session: Session, name: str, *, hide_analysis: bool = False) -> None:
        self.session, self.name, self.hide_analysis = session, name, hide_analysis

    # One answer ---------------------------------------------------------------------------------------------------------

    def answer_once(self, prompt: str) -> None:
        """Prints the answer to `prompt`; a text that is written on is shown from its beginning."""
        answer = self.session.ask(prompt)
        first = next(answer)  # a prompt that cannot be answered is found out before anything is printed
        if self.session.kind == "continuation":
            print(_dimmed(prompt, sys.stdout), end="", flush=True)
        self._show(answer, first)

    def answer_as_json(self, prompt: str) -> dict:
        """The answer, its thoughts apart, and its figures."""
        pieces = list(self.session.ask(prompt))
        timing, source = pieces[-1].timing, self.session.source
        by_channel = {c: "".join(p.text for p in pieces if p.channel == c) for c in ("analysis", "commentary")}
        answer = {
            "checkpoint": self.name,
            "prompt": prompt,
            "text": "".join(p.text for p in pieces if p.channel not in by_channel),
            **{channel: text for channel, text in by_channel.items() if text},
            "finish_reason": pieces[-1].finish_reason,
            "prompt_tokens": timing.prompt_tokens,
            "new_tokens": timing.new_tokens,
            "seconds_to_first_token": timing.first_token,
            "tokens_per_second": timing.decode_tokens_per_second,
        }
        if source is not None:
            answer["acceptance_rate"] = source.report.acceptance_rate
            answer["tokens_per_pass"] = source.report.tokens_per_pass
        return answer

    def _show(self, pieces: Generator[Said], first: Said) -> None:
        """Prints an answer as it comes, thoughts dimmed or left out, then a line of figures."""
        shown, hidden = None, False  # the channel on the screen; whether thoughts were left out
        try:
            piece = first
            while True:
                channel = piece.channel or "final"
                if piece.text and channel == "analysis" and self.hide_analysis:
                    hidden = True
                elif piece.text:
                    if shown not in (None, channel):
                        print("\n")
                    shown = channel
                    print(piece.text if channel == "final" else _dimmed(piece.text, sys.stdout), end="", flush=True)
                if piece.finish_reason:
                    break
                piece = next(pieces)
            print(flush=True)
            only_thoughts = hidden and shown is None
            print(_dimmed(self._figures(piece, only_thoughts), sys.stderr), file=sys.stderr, flush=True)
        finally:
            pieces.close()  # what was said so far is kept, also when Ctrl-C cut it short

    def _figures(self, last: Said, only_thoughts: bool = False) -> str:
        timing = last.timing
        parts = [f"{timing.new_tokens} tokens"]
        if rate := timing.decode_tokens_per_second:
            parts.append(f"{rate:.1f} tokens/s")
        parts.append(f"first after {timing.first_token:.2f} s")
        if self.session.source is not None:
            parts.append(self.session.source.report.summary())
        if last.finish_reason in REASONS:
            parts.append(REASONS[last.finish_reason])
        if only_thoughts:
            parts.append("nothing but hidden thoughts so far")
        return f"[{', '.join(parts)}]"

    # A conversation -----------------------------------------------------------------------------------------------------

    def converse(self) -> None:
        """Reads turns and /commands from standard input until it ends."""
        interactive = sys.stdin.isatty()
        if interactive:
            _keep_history()
        model = self.session.model
        greeting = f"{self.name}: {GREETINGS[self.session.kind]}; context {model.config.max_position_embeddings} tokens"
        print(f"{greeting}; /help lists commands", file=sys.stderr)
        print(dispatch.describe(model.device, model.embed.weight.dtype), file=sys.stderr, flush=True)
        while True:
            try:
                line = _read_turn("> " if interactive else "")
            except (EOFError, KeyboardInterrupt):
                return
            try:
                if line.startswith("/"):
                    if self.obey(line.strip()):
                        return
                elif line.strip() or (interactive and self.session.kind == "continuation" and self.session.text):
                    answer = self.session.ask(line)
                    self._show(answer, next(answer))
            except KeyboardInterrupt:
                print("\n[stopped]", file=sys.stderr)
            except (XmoeError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)

    def obey(self, line: str) -> bool:
        """Runs a /command; true when it is time to leave. ConfigError where it cannot be run."""
        name, _, value = line.partition(" ")
        value = value.strip()
        session = self.session
        if name in ("/quit", "/exit"):
            return True
        if name == "/help":
            print(HELP, file=sys.stderr)
        elif name == "/settings":
            shown = {k: v for k, v in session.settings.items() if k not in ("stop_tokens", "overflow")}
            print(json.dumps(shown), file=sys.stderr)
        elif name == "/reset":
            session.reset()
        elif name == "/effort":
            session.set_effort(value)
        elif name == "/experts":
            set_experts(session, None if value == "auto" else _number(name, value, int))
        elif name == "/system":
            session.set_system(value)
        elif name == "/save":
            self._save(value)
        elif name in NUMBERS:
            setting, kind = NUMBERS[name]
            new = {setting: _number(name, value, kind)}
            read_settings(new)  # raises where it is out of range
            session.settings.update(new)
        else:
            raise ConfigError(f"unknown command {name}; /help lists them")
        return False

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs a file name")
        with new_file(Path(name).expanduser()) as partial:
            text = json.dumps(self.session.transcript(), ensure_ascii=False, indent=2)
            partial.write_text(text + "\n", encoding="utf-8")
        print(f"saved {name}", file=sys.stderr)


def _read_turn(prompt: str) -> str:
    lines = [input(prompt)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("  " if prompt else ""))
    return "\n".join(lines)


def _number(name: str, value: str, kind: type) -> float | int:
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name} {value!r}: expected a {'whole ' if kind is int else ''}number") from None


def _keep_history() -> None:
    """Arrow keys bring back earlier lines, also those of earlier days."""
    try:
        import atexit
        import readline

        from xmoe.data.cache import cache_folder

        file = cache_folder("chat") / "history"
        if file.is_file():
            readline.read_history_file(file)
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, file)
    except (ImportError, OSError, XmoeError) as error:  # a chat without history is still a chat
        print(f"earlier lines cannot be brought back: {error}", file=sys.stderr)


def _dimmed(text: str, out) -> str:
    return f"\033[2m{text}\033[0m" if text and out.isatty() and "NO_COLOR" not in os.environ else text
