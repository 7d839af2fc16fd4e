"""Conversations: what is asked of the model, what is kept of it, and what is forgotten."""

from __future__ import annotations

import pytest

from xmoe.errors import ConfigError
from xmoe.generation import session as sessions
from xmoe.generation.generate import Piece, Timing
from xmoe.generation.harmony import Conversation, Message
from xmoe.generation.session import Continuation, HarmonyChat, PlainChat, plain_transcript, set_experts


@pytest.fixture
def heard(monkeypatch, tokenizer):
    """Prompts as they reach `stream`, which answers with the next of `heard.answers` (text with special names in it)."""

    class Heard(list):
        def stream(self, model, tokenizer, prompt, **settings):
            self.append(prompt if isinstance(prompt, str) else tokenizer.decode(prompt))
            self.settings = settings
            ids = tokenizer.encode(self.answers.pop(0), allow_special=True)
            stops = settings.get("stop_tokens", ())
            last = ids.pop() if ids and ids[-1] in stops else None
            for id in ids:
                yield Piece(tokenizer.decode([id]), id)
            yield Piece("", last, "stop_token", Timing(1, len(ids), 0.1, 0.2))

    heard = Heard()
    monkeypatch.setattr(sessions, "stream", heard.stream)
    return heard


def said(session, text):
    pieces = list(session.ask(text))
    assert pieces[-1].finish_reason == "stop_token"
    return "".join(p.text for p in pieces)


def test_a_continuation_begins_anew_with_every_text_and_goes_on_with_none(heard, tokenizer):
    heard.answers = ["bc", "de", "z"]
    chat = Continuation(None, tokenizer, {})
    assert [said(chat, "a"), said(chat, ""), said(chat, "y")] == ["bc", "de", "z"]
    assert heard == ["a", "abc", "y"]
    assert chat.transcript() == {"text": "yz"}
    chat.reset()
    assert chat.text == ""


def test_a_plain_chat_writes_its_turns_as_lines(heard, tokenizer):
    heard.answers = [" Hello. ", "Fine."]
    chat = PlainChat(None, tokenizer, {}, system="Be kind.")
    assert said(chat, "Hi.") == "Hello. "
    said(chat, "How?")
    assert heard[1] == "Be kind.\nUser: Hi.\nAssistant: Hello.\nUser: How?\nAssistant:"
    assert heard.settings["stop"] == ("\nUser:",)
    assert plain_transcript([Message("user", "x")]) == "User: x\nAssistant:"


def test_harmony_channels_come_apart_and_old_thoughts_are_forgotten(heard, tokenizer):
    heard.answers = [
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>",
        "no header at all",
    ]
    chat = HarmonyChat(None, tokenizer, {}, system="Be brief.", effort="low")
    chat.conversation.date = "2025-08-05"
    pieces = list(chat.ask("q"))
    by_channel = {c: "".join(p.text for p in pieces if p.channel == c) for c in ("analysis", "final")}
    assert by_channel == {"analysis": "hm", "final": "yes"}
    assert "Reasoning: low" in heard[0]
    assert "# Instructions\n\nBe brief." in heard[0]
    chat.set_effort("high")
    assert said(chat, "q2") == "no header at all"
    assert "Reasoning: high" in heard[1]
    assert heard[1].endswith(
        "<|start|>user<|message|>q<|end|><|start|>assistant<|channel|>final<|message|>yes<|end|>"
        "<|start|>user<|message|>q2<|end|><|start|>assistant"
    )
    assert chat.conversation.messages[1] == Message("assistant", "hm", None, "analysis"), (
        "it is kept for the transcript"
    )
    assert Conversation(**{**chat.transcript(), "messages": []}).effort == "high"


@pytest.mark.parametrize("kind", [Continuation, PlainChat, HarmonyChat])
def test_what_was_said_before_it_was_stopped_is_kept(heard, tokenizer, kind):
    heard.answers = ["<|channel|>final<|message|>abcdef<|return|>" if kind is HarmonyChat else "abcdef"]
    chat = kind(None, tokenizer, {})
    answer = chat.ask("q")
    assert [next(answer).text for _ in range(3)] == ["a", "b", "c"]
    answer.close()
    transcript = chat.transcript()
    kept = transcript["text"] if kind is Continuation else transcript["messages"][-1]["text"]
    assert kept.removeprefix("q") == "abc"


@pytest.mark.parametrize("kind", [PlainChat, HarmonyChat])
def test_a_second_turn_reads_only_what_is_new(tiny, tokenizer, kind):
    chat = kind(tiny, tokenizer, {"max_new_tokens": 4, "temperature": 0})
    *_, first = chat.ask("a")
    *_, second = chat.ask("b")
    assert first.timing.remembered_tokens == 0
    assert second.timing.remembered_tokens == first.timing.prompt_tokens


def test_a_seed_makes_a_conversation_and_not_every_turn_the_same(tiny, tokenizer):
    def turns(seed):
        chat = Continuation(tiny, tokenizer, {"max_new_tokens": 12, "seed": seed})
        return ["".join(p.text for p in chat.ask("a")) for _ in range(2)]

    assert turns(3) == turns(3)
    assert len(set(turns(3))) == 2


def test_effort_and_experts_follow_one_another(tiny, tokenizer):
    chat = Continuation(tiny, tokenizer, {"max_new_tokens": 2})
    chat.set_effort("high")
    assert chat.settings["reasoning_effort"] == "high"
    set_experts(chat, 2)
    assert chat.settings["num_experts_per_tok"] == 2
    assert "reasoning_effort" not in chat.settings
    chat.set_effort("low")
    assert chat.settings["num_experts_per_tok"] is None
    with pytest.raises(ConfigError, match="expected low, medium, high"):
        chat.set_effort("utmost")
    with pytest.raises(ConfigError, match="expected 1 to 10"):
        set_experts(chat, 12)
    with pytest.raises(ConfigError, match="expected low, medium, high"):
        HarmonyChat(tiny, tokenizer, {}).set_effort("utmost")
