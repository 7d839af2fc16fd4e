"""The benchmark compares like with like: same weights, same loss, FLOPs that can be counted by hand."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xmoe.model.config import ModelConfig

FILE = Path(__file__).parents[2] / "benchmarks" / "train_step.py"
TINY = ModelConfig(
    vocab_size=41, hidden_size=12, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
    intermediate_size=10, num_experts=5, num_experts_per_tok=3, sliding_window=7,
)  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    return importlib.import_module("train_step")


def test_both_sides_start_from_the_same_loss_and_gradient(bench, random_model):
    pytest.importorskip("transformers")
    ours = random_model(TINY)
    theirs = bench.their_model(TINY, ours, "eager")
    tokens = torch.randint(0, TINY.vocab_size, (2, 23))
    mine = bench.our_loss(ours, tokens)
    other = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
    mine.backward(), other.backward()
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    pairs = [(ours.embed.weight, theirs.model.embed_tokens.weight), (ours.norm.weight, theirs.model.norm.weight)]
    pairs.append((ours.blocks[0].attn.sinks, theirs.model.layers[0].self_attn.sinks))
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_flops_are_three_forward_passes_of_products(bench, monkeypatch):
    monkeypatch.setattr(bench, "SEQUENCE", 9)
    monkeypatch.setattr(bench, "BATCH", 1)
    c = TINY
    per_token = c.hidden_size * 8 * 6 + 4 * 6 * c.hidden_size + 3 * 3 * c.hidden_size * 10 + c.hidden_size * 5
    seen = 45 + (45 - 2 - 1)  # a full layer, and one whose last two queries miss two and one of the first keys
    forward = 2 * 9 * (2 * per_token + c.hidden_size * 41) + 2 * 2 * 4 * 6 * seen
    assert bench.flops_per_step(c) == pytest.approx(3 * forward)


def test_text_batches_repeat_and_fit_every_vocabulary(bench):
    first, again = bench.text_batches(TINY, 1)(), bench.text_batches(TINY, 1)()
    assert torch.equal(first, again) and first.shape == (bench.BATCH, bench.SEQUENCE) and first.max() < 256


def test_a_contestant_that_fails_is_a_line_of_the_table(bench):
    good = bench._row(_finished(bench), [0.5, 0.25, 1.0], 1e9, 2.0)
    assert good["step_seconds"] == 0.5 and good["gflops"] == 2.0 and good["tokens_per_second"] == 4096
    printed = bench.table([good, {"name": "batched_mm", "error": "out of memory"}])
    assert "batched_mm          out of memory" in printed and "2.00x" in printed


def _finished(bench):
    process = bench.Process.__new__(bench.Process)
    process.name, process.first, process.losses, process.peak_gb = "eager", 1.0, [3.0, 2.0], 1.5
    return process


def test_an_unknown_contestant_is_one_line_and_exit_2():
    done = subprocess.run([sys.executable, str(FILE), "--only", "abacus"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown contestant abacus") and not done.stdout


def test_a_worker_answers_in_json(bench, monkeypatch, capsys):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n"))
    monkeypatch.setattr(bench.resource, "setrlimit", lambda *_: None)  # the limit would bind the test run itself
    monkeypatch.setattr(bench, "SEQUENCE", 16)
    bench.work("portable", TINY, torch.float32, text=False, memory_gb=1.0)
    answer = json.loads(capsys.readouterr().out.removeprefix("answer "))
    assert len(answer["seconds"]) == len(answer["losses"]) == 2 and answer["peak_gb"] > 0
