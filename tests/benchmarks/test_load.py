"""The loading benchmark: a process for each run, the fastest is told with the largest peak, wrong use is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.weights import save
from xmoe.model.config import ModelConfig

FILE = Path(__file__).parents[2] / "benchmarks" / "load.py"
TINY = ModelConfig(
    vocab_size=9000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=96, num_experts=5, num_experts_per_tok=2, sliding_window=7, tie_word_embeddings=False,
)  # fmt: skip


def test_a_given_checkpoint_is_measured(random_model, tmp_path):
    save(random_model(TINY), tmp_path / "checkpoint", layout="hf-mxfp4")
    command = [sys.executable, str(FILE), "--checkpoint", str(tmp_path / "checkpoint"), "--repeat", "1"]
    command += ["--engines", "xmoe packed,xmoe huge pages", "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    packed, huge = result["readings"]
    assert result["layers"] == 2 and result["vocab_size"] == 9000 and result["date"]
    assert result["bytes"] == Checkpoint(tmp_path / "checkpoint").reader.total_bytes
    assert packed["first_token"] == huge["first_token"]
    for reading in packed, huge:
        assert reading["seconds_to_load_of_runs"] == [reading["seconds_to_load"]]
        assert reading["seconds_to_first_token"] > reading["seconds_to_load"] > 0
        assert reading["peak_bytes"] >= reading["peak_bytes_after_load"] >= reading["peak_bytes_imports"] > 0
    assert (tmp_path / "checkpoint" / "config.json").is_file() and "2 layers" in done.stdout


def test_wrong_use_is_one_line_and_exit_2():
    for flags, said in (
        (["--engines", "abacus"], "unknown engine 'abacus'"),
        (["--repeat", "0"], "--repeat of at least"),
    ):
        done = subprocess.run([sys.executable, str(FILE), *flags], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr and not done.stdout
