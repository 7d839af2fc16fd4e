"""Texts and conversations become rows; what the model said itself comes behind them."""

from __future__ import annotations

import json

import pytest
import torch

from xmoe.compression.calibration import calibration, read_conversation, render, with_answers
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import ConfigError, DataError
from xmoe.generation.harmony import Harmony, speaks_harmony

ASKED = {"role": "user", "content": "2 + 2?"}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "thinking": "old thought", "content": "2"},
    ASKED,
    {"role": "assistant", "thinking": "easy", "content": "4"},
]


@pytest.fixture
def of_bytes():
    return Tokenizer.of_bytes()


def texts(batches, tokenizer) -> list[str]:
    return [tokenizer.decode(row[m].tolist()) for b in batches for row, m in zip(b.tokens, b.mask)]


def test_conversations_are_rows_and_texts_fill_theirs(tmp_path, of_bytes):
    rows = [{"messages": CONVERSATION}, {"conversations": [{"from": "human", "value": "Hi"}]}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.txt").write_text("abcdefgh" * 4)
    both = f"{tmp_path / 'c.jsonl'},{tmp_path / 't.txt'}"
    found = calibration(both, of_bytes, seq_len=100, tokens=200, batch_size=2)
    first, second, *rest = texts(found, of_bytes)
    assert first == "Be brief.\nUser: 1 + 1?\nAssistant: 2\nUser: 2 + 2?\nAssistant: 4" and second == "User: Hi"
    assert "".join(rest).startswith("abcdefghabc")
    assert found[0].mask.sum(1).tolist() == [len(first), len(second)]

    short = calibration(both, of_bytes, seq_len=10, tokens=14, batch_size=8)
    assert texts(short, of_bytes) == [first[:10], second[:4]]
    (prompt,) = calibration(str(tmp_path / "c.jsonl"), of_bytes, seq_len=100, tokens=40, batch_size=1, prompts=True)
    assert texts([prompt], of_bytes) == ["Be brief.\nUser: 1 + 1?\nAssistant: 2\nUser"]
    with pytest.raises(ConfigError, match="expected 1 or more"):
        calibration(both, of_bytes, seq_len=0, tokens=5, batch_size=1)


def test_harmony_is_what_the_model_reads_and_writes(of_bytes):
    system, messages = read_conversation("x:1", {"messages": CONVERSATION})
    whole, prompt = (render(system, messages, of_bytes, harmony=True, prompt=p) for p in (False, True))
    said = of_bytes.decode(whole)
    assert said.count("<|channel|>analysis<|message|>") == 1 and "old thought" not in said
    assert said.endswith(
        "<|channel|>analysis<|message|>easy<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    )
    assert "# Instructions\n\nBe brief." in said
    assert of_bytes.decode(prompt).endswith("<|message|>2 + 2?<|end|><|start|>assistant")
    assert whole[: len(prompt)] == prompt
    parsed = Harmony(of_bytes).parse(whole, role=None)
    assert [(m.role, m.channel) for m in parsed[2:]] == [
        ("user", None), ("assistant", "final"), ("user", None), ("assistant", "analysis"), ("assistant", "final"),
    ]  # fmt: skip


def test_only_models_that_were_taught_harmony_are_given_it(of_bytes, tmp_path):
    assert not speaks_harmony(of_bytes) and not speaks_harmony(of_bytes, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ '<|channel|>' }}")
    assert speaks_harmony(of_bytes, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "expected a list of messages"),
        ({"messages": ["hi"]}, "a message is a str"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "role 'oracle'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of type int"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "nobody asks anything"),
    ],
)
def test_malformed_conversations_are_one_clear_line(fields, message):
    with pytest.raises(DataError, match=f"^c.jsonl:7: .*{message}"):
        read_conversation("c.jsonl:7", fields)


def test_parts_of_a_message_are_joined():
    _, (one,) = read_conversation("", {"messages": [{"role": "user", "content": [{"text": "a"}, {"text": "b"}]}]})
    assert one.text == "ab"


def test_answers_follow_their_prompts_and_end_where_the_model_ends(model, of_bytes):
    prompts = [torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7]])]
    rows = list(with_answers(model, prompts, new_tokens=4, seed=3))
    assert [r.shape for r in rows] == [(1, 7), (1, 7), (1, 5)]
    assert [r[0, :-4].tolist() for r in rows] == [[1, 2, 3], [4, 5, 6], [7]]
    again = list(with_answers(model, prompts, new_tokens=4, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(rows, again))

    first = int(rows[0][0, 3])
    assert next(with_answers(model, prompts, new_tokens=4, seed=3, ends=[first])).shape[1] <= 4
