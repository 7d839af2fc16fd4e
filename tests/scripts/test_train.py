"""The command a newcomer types first: its flags, its exit codes, and what it prints where."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xmoe import command
from xmoe.config import load_config
from xmoe.training.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("train_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("XMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "page.txt").write_text("one two three four five\n\n" * 400)
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: {preset: tiny, num_hidden_layers: 1, num_experts: 6}\n"
        f"data: {{source: {tmp_path / 'page.txt'}, tokenizer: bytes, seq_len: 16, validation_fraction: 0.3}}\n"
        "train: {steps: 3, micro_batch: 2, device: cpu, precision: float32}\n"
    )
    return path


def test_a_run_from_the_command_line(main, small, tmp_path, capsys):
    assert (
        main(["--config", str(small), "--output", str(tmp_path / "run"), "--set", "train.steps=4", "--seed", "5"]) == 0
    )
    assert "step 4/4" in capsys.readouterr().out
    config = load_config(RunConfig, tmp_path / "run" / "run.yaml")
    assert config.train.steps == 4 and config.train.seed == 5 and config.train.device == "cpu"


def test_json_is_all_there_is_on_standard_output(main, small, tmp_path, capsys):
    main(["--config", str(small), "--output", str(tmp_path / "run"), "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["checkpoint"] == str(tmp_path / "run") and found["loss"] > 0 and found["steps"] == 3
    assert "step 3/3" in printed.err


def test_print_config_shows_origins_and_writes_nothing(main, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    main(["--config", str(small), "--print-config", "--set", "optim.lr=1e-3", "--device", "cpu"])
    out = capsys.readouterr().out
    lines = {line.split("#")[0].strip(): line.partition("#")[2].strip() for line in out.splitlines()}
    assert lines["lr: 0.001"] == "--set" and lines["steps: 3"].endswith("small.yaml:3")
    assert lines["num_attention_heads: 6"] == "preset tiny" and lines["grad_accum: 1"] == "default"
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_output_is_named_after_the_config(main, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--config", str(small)])
    assert (tmp_path / "checkpoints" / "small" / "config.json").exists()


def test_resuming_needs_no_more_than_the_folder(main, small, tmp_path, capsys):
    main(["--config", str(small), "--output", str(tmp_path / "run")])
    main(["--resume", "--output", str(tmp_path / "run"), "--set", "train.steps=5"])
    assert "resuming after step 3" in capsys.readouterr().out
    assert load_config(RunConfig, tmp_path / "run" / "run.yaml").train.steps == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config FILE is needed"),
        (["--config", "no/such.yaml"], "no/such.yaml does not exist"),
        (["--config", "{small}", "--device", "tpu"], "device 'tpu' is not on this machine"),
        (["--config", "{small}", "--dtype", "float16"], "expected one of auto, float32, bfloat16, found 'float16'"),
        (["--config", "{small}", "--set", "model.top_k=2"], "did you mean model.num_experts_per_tok"),
        (["--config", "{small}", "--set", "optim.lr=fast"], "optim.lr: expected a number, found 'fast'"),
        (["--config", "{small}", "--output", "{there}"], "already exists; --resume"),
        (["--config", "{small}", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(main, small, tmp_path, capsys, arguments, message):
    there = tmp_path / "there"
    there.mkdir()
    (there / "run.yaml").write_text("")
    filled = [a.format(small=small, there=there) for a in arguments]
    if "--output" not in filled:
        filled += ["--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as left:
        command.run(main, filled)
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert printed.out == "" and not (tmp_path / "run").exists()


def test_ctrl_c_on_the_command_line_saves_and_exits_with_130(small, tmp_path):
    arguments = ["--config", str(small), "--output", str(tmp_path / "run"), "--set", "train.steps=100000"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped: step" in errors and "--resume goes on from there" in errors and "Traceback" not in errors
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_comes_with_xmoe_loads(path):
    config = load_config(RunConfig, path)
    assert config.data.tokenizer != "train" or config.data.vocab_size <= config.model.vocab_size
    assert config.optim.warmup_steps < config.train.steps
    again = load_config(RunConfig, path, [f"train.steps={config.train.steps}"])
    assert again == config


@pytest.mark.parametrize("name", ["python", "wikitext2", "shakespeare"])
def test_dense_twins_have_the_active_parameters_of_their_moe(name):
    moe, dense = (
        load_config(RunConfig, ROOT / "configs" / "train" / f"{name}_{kind}.yaml") for kind in ("moe", "dense")
    )
    assert dense.model.num_experts == dense.model.num_experts_per_tok == 1
    assert dense.model.intermediate_size == moe.model.num_experts_per_tok * moe.model.intermediate_size
    # What is left is the router and the second expert's output bias.
    assert dense.model.active_parameter_count() == pytest.approx(moe.model.active_parameter_count(), rel=0.02)
    assert dense.train == moe.train and dense.data == moe.data and dense.optim == moe.optim
