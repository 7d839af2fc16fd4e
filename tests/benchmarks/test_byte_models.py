"""The small byte models of the tables of quality: what they are trained on and measured on, and that a run adds to another."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("byte_models")


def test_rows_come_from_the_text_and_batches_hold_them_all(bench):
    text = torch.arange(1000)
    batches = bench.batches_of(text, 35, torch.Generator().manual_seed(3))
    assert [len(b) for b in batches] == [16, 16, 3]
    rows = torch.cat(batches)
    assert torch.equal(rows, rows[:, :1] + torch.arange(bench.SEQ))
    longer = bench.rows_of(text, 35, torch.Generator().manual_seed(3), extra=1)
    assert longer.shape == (35, bench.SEQ + 1) and longer.max() < 1000


@pytest.mark.parametrize(("length", "rows"), [(129, 1), (600, 4), (256 * 128 + 1, 256), (40_000, 256)])
def test_what_is_measured_on_is_the_next_byte_of_the_beginning(bench, length, rows):
    pairs = bench.held_out(torch.arange(length))
    seen, wanted = (torch.cat(side) for side in zip(*pairs))
    assert torch.equal(seen.flatten(), torch.arange(rows * bench.SEQ)) and torch.equal(wanted, seen + 1)
    assert max(len(tokens) for tokens, _ in pairs) <= bench.BATCH


def test_every_seed_is_measured_on_text_it_was_not_trained_on(bench, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(bytes(range(200)) * 10)
    output = tmp_path / "found.json"
    args = argparse.Namespace(data=tmp_path / "text.txt", seeds="4,2", steps=1, output=output)
    weights = {}

    def measure(model, text, test, seed):
        assert len(text) == 1800 and [tokens.shape for tokens, _ in test] == [(1, bench.SEQ)]
        assert test[0][0][0, 0] == text[0] and not model.training  # the text repeats itself every 200 bytes
        assert output.exists() == (seed == 2), "figures are written after every seed"
        weights[seed] = model.embed.weight
        return {"seed": seed}

    found = bench.of_seeds(args, measure, {"9": {"seed": 9}})
    assert found == json.loads(output.read_text()) == {str(n): {"seed": n} for n in (9, 4, 2)}
    assert not torch.equal(weights[2], weights[4])
    again = bench.train(torch.tensor(list(bytes(range(200)) * 9)), 4, 1)
    assert torch.equal(again.embed.weight, weights[4])
    assert capsys.readouterr().err.count(" s\n") == 2


@pytest.mark.parametrize("name", ["prune_quality", "reduce_quality", "low_rank_quality"])
def test_the_three_tables_take_the_same_flags(bench, name, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(name).main(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and all(flag in shown for flag in ("--data FILE.txt", "--seeds 0,1,2", "--steps STEPS"))
