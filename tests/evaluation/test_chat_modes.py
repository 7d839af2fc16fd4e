"""Prompts of the chat modes, letters compared after a prefilled final channel, and replies that are read."""

from __future__ import annotations

import pytest
import torch

from evaluation import evaluate
from evaluation.chat_modes import final_text, parse_letter, score_chat, user_message
from evaluation.rows import load_rows
from evaluation.task import Answer, Example
from evaluation.tasks import BENCHMARKS
from xmoe.errors import ConfigError
from xmoe.generation.harmony import Harmony


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        (" **C** ", "C"),
        ("(d)", None),
        ("B. whale", "B"),
        ("The answer is (C), since A is wrong.", "C"),
        ("A fine question. The correct answer: B", "B"),
        ("A fine question indeed", None),
        ("Neither **A** nor (B), but rather [D]", "D"),
        ("E", None),
        ("", None),
    ],
)
def test_reading_a_reply(reply, letter):
    assert parse_letter(reply, 4) == (None if letter is None else "ABCD".index(letter))


def test_a_reply_that_cannot_be_read_is_wrong_and_counted():
    example = Example("0", "", (), 0, choices=("a", "b"))
    assert score_chat(example, [Answer(text="hm")], "generate") == {"acc": 0.0, "prediction": -1.0, "answered": 0.0}
    assert score_chat(example, [Answer(text="A")], "generate") == {"acc": 1.0, "prediction": 0.0, "answered": 1.0}
    assert score_chat(example, [Answer(-2.0), Answer(-1.0)], "letter") == {"acc": 0.0, "prediction": 1.0}


def test_messages(data_dir):
    def message(name: str) -> str:
        benchmark = BENCHMARKS[name]
        rows, _ = load_rows(name, benchmark.location, "eval", data_dir)
        return user_message(benchmark, benchmark.examples(rows)[0])

    assert message("arc_easy") == "Which of these is a mammal?\nA. trout\nB. whale\nC. gecko\nAnswer:"
    assert message("winogrande").endswith("Ann lent Eve her car because _ was kind .\nA. Ann\nB. Eve\nAnswer:")
    assert message("mmlu").startswith("The following are multiple choice questions") and message("mmlu").endswith(
        "Answer:"
    )


def test_final_channel(tokenizer):
    harmony = Harmony(tokenizer)

    def said(text: str) -> str:
        return final_text(harmony, tokenizer.encode(text, allow_special=True))

    assert (
        said("<|channel|>analysis<|message|>Is it A?<|end|><|start|>assistant<|channel|>final<|message|> B<|return|>")
        == "B"
    )
    assert said("<|channel|>analysis<|message|>I think it is A") == ""


def test_letters_after_the_prefilled_channel(model, tokenizer, data_dir):
    report = evaluate(model, tokenizer, "arc_easy", mode="letter", data_dir=str(data_dir), reasoning_effort="low")
    assert report.protocol["mode"] == "letter" and report.protocol["benchmarks"]["arc_easy"]["prompts"].startswith(
        "xmoe letter"
    )
    harmony = Harmony(tokenizer)
    from evaluation.chat_modes import conversation

    benchmark = BENCHMARKS["arc_easy"]
    rows, _ = load_rows("arc_easy", benchmark.location, "eval", data_dir)
    for number, example in enumerate(benchmark.examples(rows)):
        ids = harmony.render(conversation(benchmark, example, "low"))
        ids += [harmony.channel, *tokenizer.encode("final"), harmony.message]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        letters = [logits[ord(letter)].item() for letter in "ABCDE"[: len(example.choices)]]
        assert report.rows["arc_easy"]["prediction"][number] == letters.index(max(letters))
    assert "Reasoning: low" in tokenizer.decode(ids)


def test_generated_answers(model, tokenizer, data_dir, monkeypatch):
    asked = []

    class Said:
        def __init__(self, text: str):
            self.ids = tokenizer.encode(text, allow_special=True)
            self.text = text

    def generate(model, tokenizer, prompts, **settings):
        asked.extend((tokenizer.decode(p), settings) for p in prompts)
        reply = "<|channel|>analysis<|message|>hm, C?<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"
        return [Said(reply.format("B" if "mammal" in tokenizer.decode(p) else "no idea")) for p in prompts]

    monkeypatch.setattr("evaluation.chat_modes.generate", generate)
    report = evaluate(model, tokenizer, "arc_easy", mode="generate", data_dir=str(data_dir), max_new_tokens=50)
    assert report.rows["arc_easy"]["acc"] == [1.0, 0.0]
    assert report.results["arc_easy"]["answered"]["value"] == 0.5
    assert asked[0][0].endswith("<|start|>assistant") and asked[0][1]["stop_tokens"] == Harmony(tokenizer).stop_tokens


def test_generating_for_real_and_without_room(model, tokenizer, data_dir):
    report = evaluate(model, tokenizer, "winogrande", mode="generate", data_dir=str(data_dir), max_new_tokens=4)
    assert report.results["winogrande"]["acc"]["n"] == 2
    with pytest.raises(ConfigError, match="leaves no room"):
        evaluate(
            model, tokenizer, "winogrande", mode="generate", data_dir=str(data_dir), max_new_tokens=64, max_length=64
        )
