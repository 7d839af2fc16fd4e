"""The loop: it learns, it saves whole or not at all, and a run that was stopped anywhere ends as the run that was not."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from xmoe.checkpoint import train_state, weights
from xmoe.config import load_config
from xmoe.errors import ConfigError, DataError
from xmoe.model.transformer import Transformer
from xmoe.training.config import RunConfig
from xmoe.training.guard import Diverged
from xmoe.training.optim import Optimizer
from xmoe.training.trainer import Trainer, train

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for kill -9: nothing in the product catches it."""


def go(config_file, output, *overrides, **options):
    return train(config_file, overrides, output=output, console=options.pop("console", io.StringIO()), **options)


def curve(folder) -> list[dict]:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    assert curve(a) == curve(b)
    (one, _), (two, _) = weights.load(a), weights.load(b)
    for (name, p), (_, q) in zip(one.named_parameters(), two.named_parameters()):
        assert torch.equal(p, q), name


def test_a_run_learns_and_leaves_what_the_commands_expect(config_file, tmp_path):
    console = io.StringIO()
    run = go(config_file, tmp_path / "run", "train.steps=40", console=console)
    assert run.checkpoint == tmp_path / "run" and run.tokens == 40 * 3 * 16 and run.seconds > 0
    lines = curve(run.checkpoint)
    losses = [line["lm_loss"] for line in lines if "lm_loss" in line]
    assert losses[-1] < losses[0] - 1 and run.loss < losses[0] - 1
    names = {"config.json", "model.safetensors", "tokenizer.json", "run.yaml", "metrics.jsonl", "train_state"}
    assert {p.name for p in run.checkpoint.iterdir()} == names
    assert [p.name for p in (run.checkpoint / "train_state").iterdir()] == ["step-00000040"]
    needed = {"step", "loss", "lm_loss", "load_balancing_loss", "z_loss", "lr", "grad_norm", "expert_load"}
    assert needed < set(lines[0]) and len(lines[0]["expert_load"]) == 2 and len(lines[0]["expert_load"][0]) == 6
    last = lines[-1]
    assert (
        last["step"] == 40
        and last["val_loss"] == run.loss
        and set(last["val_loss_by_effort"]) == {"low", "medium", "high"}
    )
    assert last["val_loss_by_effort"]["medium"] == pytest.approx(run.loss)
    assert "passes" in console.getvalue() and "perplexity" in console.getvalue()


def test_the_loss_and_bits_per_byte_are_those_of_the_held_out_text(whole, config_file):
    run = Trainer(load_config(RunConfig, config_file), whole, resume=True)
    model, _ = weights.load(whole)
    held_out = run.data.validation
    ids = torch.tensor([held_out.eos_id, *held_out.ids.tolist()])
    total = 0.0
    for start in range(0, len(ids) - 1, 16):  # windows of 16 without overlap, as validation reads them
        part = ids[start : start + 17]
        with torch.no_grad():
            logits = model(part[None, :-1]).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
    nats = total / held_out.ids.size
    assert curve(whole)[-1]["val_loss"] == pytest.approx(nats, rel=1e-4)
    text = "".join(run.data.tokenizer.decode(d) for d in held_out_documents(held_out))
    assert curve(whole)[-1]["val_bits_per_byte"] == pytest.approx(
        total / 0.6931471805599453 / len(text.encode()), rel=1e-4
    )


def held_out_documents(array):
    start = 0
    for end, _ in array.documents:
        yield array.ids[start : end - 1].tolist()
        start = end


def test_the_resolved_config_runs_again_and_gives_the_same_run(whole, tmp_path):
    go(whole / "run.yaml", tmp_path / "again")
    assert_same_run(whole, tmp_path / "again")


def test_accumulated_micro_batches_equal_one_large_batch(config_file, tmp_path):
    go(config_file, tmp_path / "one", "train.micro_batch=6", "train.load_balancing_coef=0")
    go(config_file, tmp_path / "two", "train.grad_accum=2", "train.load_balancing_coef=0")
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two")):
        for key in ("loss", "val_loss", "grad_norm"):
            assert (key in a) == (key in b)
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=2e-4)


@pytest.mark.parametrize("stop", [1, 4, 6, 9, 11])
def test_a_run_killed_at_any_step_ends_as_the_run_that_was_not(config_file, whole, tmp_path, monkeypatch, stop):
    step = Optimizer.step
    with monkeypatch.context() as patch:

        def killed(self, number):
            if number == stop:
                raise Killed
            step(self, number)

        patch.setattr(Optimizer, "step", killed)
        with pytest.raises(Killed):
            go(config_file, tmp_path / "run")
    assert train_state.saved_steps(tmp_path / "run") == ([stop // 4 * 4] if stop >= 4 else [])
    go(config_file, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.effort_sampling=layer",),
        ("train.selection_bias_rate=0.01", "train.load_balancing_coef=0"),
        ("optim.name=adamw", "train.activation_checkpointing=true", "train.precision=bfloat16"),
    ],
    ids=["effort", "selection bias", "adamw, recomputed, bf16"],
)
def test_options_with_a_memory_resume_exactly_too(config_file, tmp_path, monkeypatch, overrides):
    go(config_file, tmp_path / "whole", *overrides)
    save = Trainer.save
    with monkeypatch.context() as patch:

        def killed(self, done):
            save(self, done)
            if done == 8:
                raise Killed

        patch.setattr(Trainer, "save", killed)
        with pytest.raises(Killed):
            go(config_file, tmp_path / "run", *overrides)
    go(config_file, tmp_path / "run", *overrides, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("where", ["weights", "state", "before the rename", "before publishing"])
def test_a_kill_during_a_save_leaves_the_save_before_it(config_file, whole, tmp_path, monkeypatch, where):
    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        saves = []
        save = Trainer.save

        def second(self, done):
            saves.append(done)
            if len(saves) == 2:
                target = {
                    "weights": (weights, "save"),
                    "state": (torch, "save"),
                    "before the rename": (train_state.os, "rename"),
                    "before publishing": (train_state, "publish"),
                }[where]
                # Nothing tidies up after a kill -9 either.
                patch.setattr(shutil, "rmtree", lambda *a, **k: None)
                patch.setattr(*target, die)
            save(self, done)

        patch.setattr(Trainer, "save", second)
        with pytest.raises(Killed):
            go(config_file, tmp_path / "run")
    survived = 8 if where == "before publishing" else 4
    assert survived in train_state.saved_steps(tmp_path / "run")
    model, _ = weights.load(tmp_path / "run")  # the run folder itself holds a whole checkpoint throughout
    assert model.config.num_experts == 6
    go(config_file, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")
    assert not list((tmp_path / "run").rglob(".*"))


def test_a_real_kill_at_a_random_moment_and_a_resume(config_file, tmp_path):
    """The command itself, in a process of its own, killed with SIGKILL somewhere between its fourth step and its last."""
    overrides = ("train.steps=60", "train.save_every=2", "log.every=1")
    go(config_file, tmp_path / "whole", *overrides)
    run, lines = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    sets = [word for override in overrides for word in ("--set", override)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(config_file), *sets, "--output", str(run)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (lines.exists() and lines.read_text().count("\n") > 3):
        time.sleep(0.005)
    time.sleep(int.from_bytes(os.urandom(1), "big") / 256 * 0.3)
    process.kill()
    process.wait()
    assert 2 <= train_state.saved_steps(run)[-1] < 60
    go(config_file, run, *overrides, resume=True)
    assert_same_run(tmp_path / "whole", run)


def test_ctrl_c_finishes_the_step_saves_and_says_so(config_file, whole, tmp_path, monkeypatch):
    step = Trainer.step

    def interrupted(self, number):
        if number == 5:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"step 6 of 12 is saved in .*--resume"):
            go(config_file, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) == before
    assert train_state.saved_steps(tmp_path / "run") == [6]
    go(config_file, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_a_second_ctrl_c_does_not_wait(config_file, tmp_path, monkeypatch):
    def interrupted(self, number):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one was not raised")

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="at once"):
        go(config_file, tmp_path / "run")


def test_divergence_stops_with_step_and_layer_and_keeps_the_last_save(config_file, tmp_path, monkeypatch):
    step = Trainer.step

    def spoiled(self, number):
        if number == 6:
            with torch.no_grad():
                self.model.blocks[1].moe.experts.gate_up_bias.fill_(float("inf"))
                self.model.blocks[1].moe.experts.down_bias.fill_(float("inf"))
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", spoiled)
    with pytest.raises(Diverged, match=r"step 7: the loss is nan; the weight blocks\.1\.moe\.experts"):
        go(config_file, tmp_path / "run")
    assert train_state.saved_steps(tmp_path / "run") == [4]
    model, _ = weights.load(tmp_path / "run")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_finished_runs_resume_to_their_own_result(config_file, whole):
    before = curve(whole)
    run = go(config_file, whole, resume=True)
    assert run.loss == pytest.approx(before[-1]["val_loss"]) and run.tokens == 0
    assert curve(whole) == before


def test_a_longer_run_may_go_on_from_a_shorter_one(config_file, whole):
    run = go(config_file, whole, "train.steps=16", resume=True)
    assert run.steps == 16 and train_state.saved_steps(whole) == [16]
    assert [line["step"] for line in curve(whole) if "lr" in line] == [3, 6, 9, 12, 15, 16]


@pytest.mark.parametrize("sampling", ["step", "layer"])
def test_effort_is_drawn_for_the_step(config_file, tmp_path, monkeypatch, sampling):
    asked = []
    features = Transformer.features

    def watch(self, *args, **kwargs):
        if self.training:
            asked.append(kwargs["num_experts_per_tok"])
        return features(self, *args, **kwargs)

    monkeypatch.setattr(Transformer, "features", watch)
    go(config_file, tmp_path / "run", f"train.effort_sampling={sampling}", "train.steps=20", "train.grad_accum=2")
    assert asked[0::2] == asked[1::2]  # the micro batches of a step agree
    seen = asked if sampling == "step" else [k for draw in asked for k in draw]
    assert set(seen) == {1, 3, 5}


def test_a_run_without_held_out_text_still_trains(config_file, tmp_path):
    run = go(config_file, tmp_path / "run", "data.validation_fraction=0")
    assert run.loss != run.loss and train_state.saved_steps(run.checkpoint) == [12]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["train.device=tpu"], ConfigError, "device 'tpu' is not on this machine"),
        (["data.seq_len=100000", "model.max_position_embeddings=100000"], DataError, "longer than the text"),
        (["model.vocab_size=100"], ConfigError, "the tokenizer has ids up to .*; set model.vocab_size"),
        (["data.source=/no/such/text.txt"], DataError, "/no/such/text.txt"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(config_file, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message) as caught:
        go(config_file, tmp_path / "run", *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_empty_text_is_refused(config_file, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt"):
        go(config_file, tmp_path / "run", f"data.source={tmp_path / 'empty.txt'}")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_leaves_the_last_save(config_file, tmp_path, monkeypatch, whole):
    save = weights.save

    def full(model, folder, **options):
        save(model, folder, **options)
        if "step-00000008" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save", full)
        with pytest.raises(OSError, match="No space left"):
            go(config_file, tmp_path / "run")
    assert train_state.saved_steps(tmp_path / "run") == [4]
    assert not list((tmp_path / "run").rglob("*.partial"))
    go(config_file, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")
