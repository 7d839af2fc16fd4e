"""The comparison of training runs, on runs of two steps: what it asks for, that it remembers, what it prints."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from xmoe.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    path = ROOT / "benchmarks" / "training_quality.py"
    spec = importlib.util.spec_from_file_location("training_quality_command", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Arguments that shrink every run to two steps of a small model on a page of text."""
    monkeypatch.setenv("XMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "page.txt").write_text("".join(f"line {i} says {i * i % 97}\n\n" for i in range(900)))
    sets = {
        "data.source": tmp_path / "page.txt",
        "data.tokenizer": "bytes",
        "data.seq_len": 16,
        "data.validation_fraction": 0.2,
        "data.validation_tokens": 200,
        "model.hidden_size": 24,
        "model.num_hidden_layers": 1,
        "train.micro_batch": 2,
        "train.precision": "float32",
    }
    arguments = ["--scale", "0.004", "--output", str(tmp_path / "out"), "--seeds", "1"]
    return arguments + [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]


def test_the_dense_twin_and_the_efforts(bench, small, tmp_path, capsys, monkeypatch):
    assert bench.main([*small, "--only", "python,effort"]) == 0
    table = capsys.readouterr().out
    assert table == (tmp_path / "out" / "tables.md").read_text() + "\n"
    found = {
        line["name"]: line for line in map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    }
    moe, dense = found["python moe 0"], found["python dense 0"]
    assert f"| 0 | {moe['loss']:.4f} | {dense['loss']:.4f} | {moe['loss'] - dense['loss']:+.4f} |" in table
    by = found["effort by step"]["loss_by_effort"]
    assert f"| drawn for each step | {by['low']:.4f} | {by['medium']:.4f} | {by['high']:.4f} |" in table
    ratio = next(line["ratio"] for line in found.values() if "ratio" in line)
    assert ratio > 0 and f"{ratio:.2f} times as many" in table
    assert len(moe["max_violation"]) == 1 and moe["steps"] == 2

    # Given again, it trains nothing.
    monkeypatch.setattr(bench, "train", lambda *a, **k: pytest.fail("this run was known"))
    bench.main([*small, "--only", "effort", "--json"])
    assert json.loads(capsys.readouterr().out)["tables"] in table


def test_questions_it_does_not_know(bench, small):
    with pytest.raises(ConfigError, match="expected some of python, optimizer"):
        bench.main([*small, "--only", "speed"])
