"""Small benchmark rows of our own making, a byte tokenizer and a random model over it."""

from __future__ import annotations

import csv
import json

import pytest

from evaluation import mmlu
from xmoe.data.tokenizer import Tokenizer
from xmoe.model.config import ModelConfig

HELLASWAG = [
    {
        "activity_label": "Baking bread",
        "ctx_a": "A man kneads dough on a table.",
        "ctx_b": "the man",
        "label": 1,
        "endings": ["sings.", "puts it [substeps] into an oven.", "flies off  at once.", "is a loaf."],
    },
    {
        "activity_label": "Home and Garden",
        "ctx_a": "How to mow [title] Wait for dry grass. [step] Wet grass clogs.",
        "ctx_b": "",
        "label": "3",
        "endings": ["Swim.", "Mow at night [title] Sleep.", "Burn it.", "Then push the mower in rows."],
    },
]
LAMBADA = [
    {"text": "She looked for the key under the mat, found it, and with a sigh she turned the key"},
    {"text": '"Not again," said Tom. The old clock had stopped, and nobody but Tom could mend the\nold  clock'},
]
WINOGRANDE = [
    {"sentence": "Ann lent Eve her car because _ was kind .", "option1": "Ann", "option2": "Eve", "answer": "1"},
    {
        "sentence": "The cup fell off the shelf since the _ was narrow.",
        "option1": "cup",
        "option2": "shelf",
        "answer": "2",
    },
]
ARC = [
    {
        "question": "Which of these is a mammal?",
        "choices": {"text": ["trout", "whale", "gecko"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    {
        "question": "What melts ice?",
        "choices": {"text": ["heat", "snow", "wind", "shade", "night"], "label": ["1", "2", "3", "4", "5"]},
        "answerKey": "1",
    },
]
GSM8K = [
    {"question": f"{word} and two?", "answer": f"{n} + 2 = <<{n}+2={n + 2}>>{n + 2}\n#### {n + 2}"}
    for n, word in enumerate(("Nought", "One", "Two", "Three", "Four", "Five"))
]
PAGES = [
    ' = Red Kite = \n \n The red kite ( Milvus milvus ) flies 1 @,@ 200 km ; it \'s a " large " bird . \n \n'
    " = = Range = = \n \n Wales . \n ",
    " = Moss = \n \n Moss is green @-@ ish , and 3 @.@ 5 cm tall . Why ? \n ",
]
SUBJECTS = {"anatomy": 3, "virology": 5, "us_foreign_policy": 2}


def mmlu_row(subject: str, number: int) -> list[str]:
    return [
        f' Which, for {subject} {number},\nis "best"?',
        f"one {number}",
        "two, or so",
        "three",
        f"four {subject}",
        "ABCD"[(number + len(subject)) % 4],
    ]


@pytest.fixture
def data_dir(tmp_path):
    """A --data-dir with every benchmark, in several formats."""
    root = tmp_path / "data"

    def jsonl(name: str, rows) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")

    jsonl("hellaswag/hellaswag_val.jsonl", HELLASWAG)
    jsonl("lambada/lambada_test.jsonl", LAMBADA)
    jsonl("winogrande/winogrande_xl_val.jsonl", WINOGRANDE)
    jsonl("arc/ARC-Easy-test.jsonl", ARC)
    jsonl("arc/ARC-Challenge-test.jsonl", ARC[:1])
    jsonl("arc/ARC-Easy-train.jsonl", ARC)
    jsonl("wikitext/test.jsonl", [{"page": page} for page in PAGES])
    jsonl("gsm8k/test.jsonl", GSM8K[2:3])
    jsonl("gsm8k/train.jsonl", GSM8K)
    for split, first in (("dev", 100), ("test", 0)):
        for subject, count in SUBJECTS.items():
            path = root / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="", encoding="utf-8") as f:
                csv.writer(f).writerows(mmlu_row(subject, first + i) for i in range(5 if split == "dev" else count))
    assert set(SUBJECTS) <= set(mmlu.SUBJECTS)
    return root


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.of_bytes()


@pytest.fixture
def model(random_model, tokenizer):
    """Sliding and full layers, more places than the window, no two sizes equal."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=20,
        num_experts=5,
        num_experts_per_tok=3,
        layer_types=("sliding_attention", "full_attention") * 2,
        sliding_window=7,
        max_position_embeddings=2048,
        initial_context_length=2048,
        rope_scaling_factor=1.0,
    )
    return random_model(config)
