"""A run small enough to be repeated dozens of times: a dozen steps on a page of text."""

from __future__ import annotations

import io
import os
import random
import shutil
from pathlib import Path

import pytest

from xmoe.training.trainer import train


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """The YAML of a run on some 16 KB of text in which there is something to learn, with a cache of its own.

    Two layers of six experts, fp32, a save after every fourth of twelve steps.
    """
    folder = tmp_path_factory.mktemp("text")
    words = [
        "the",
        "cat",
        "and",
        "a",
        "dog",
        "sat",
        "on",
        "one",
        "mat",
        "while",
        "two",
        "birds",
        "sang",
        "of",
        "rain",
        "and",
        "snow",
    ]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=9)) + "." + "\n" * (1 + (i % 5 == 0)) for i in range(400)]
    (folder / "page.txt").write_text("".join(lines))
    (folder / "small.yaml").write_text(f"""
model: {{preset: tiny, num_hidden_layers: 2, num_experts: 6}}
data: {{source: {folder / "page.txt"}, tokenizer: bytes, seq_len: 16, validation_fraction: 0.3, validation_tokens: 300}}
optim: {{lr: 3e-3, warmup_steps: 2}}
train: {{steps: 12, micro_batch: 3, save_every: 4, validate_every: 5, device: cpu, precision: float32}}
log: {{every: 3}}
""")
    before = os.environ.get("XMOE_CACHE")
    os.environ["XMOE_CACHE"] = str(folder / "cache")
    yield folder / "small.yaml"
    del os.environ["XMOE_CACHE"]
    if before is not None:
        os.environ["XMOE_CACHE"] = before


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "whole"
    train(config_file, output=folder, console=io.StringIO())
    return folder


@pytest.fixture
def whole(finished, tmp_path):
    """The run that never stopped, one copy for each test."""
    return Path(shutil.copytree(finished, tmp_path / "whole"))
