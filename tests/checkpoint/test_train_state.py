"""Resume points appear whole or not at all, and the newest whole one is always there."""

from __future__ import annotations

import errno
import random

import pytest
import torch

from xmoe.checkpoint import train_state
from xmoe.errors import CheckpointError


def save(run, step, keep=1, **state):
    with train_state.new_resume_point(run, step, {"step": step, **state}, keep) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text(f"weights {step}")


def test_saving_keeps_the_newest(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step, keep=2)
    assert train_state.saved_steps(tmp_path) == [10, 15]
    assert train_state.load_state(tmp_path, 15)["step"] == 15


def test_a_run_without_saves_has_none(tmp_path):
    assert train_state.saved_steps(tmp_path) == []


@pytest.mark.parametrize("where", ["weights", "state"])
def test_a_disk_that_fills_up_during_a_save_leaves_the_one_before(tmp_path, monkeypatch, where):
    save(tmp_path, 5)
    full = OSError(errno.ENOSPC, "No space left on device")
    if where == "state":
        monkeypatch.setattr(torch, "save", lambda *a, **k: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space"), train_state.new_resume_point(tmp_path, 10, {}) as folder:
        (folder / "model.safetensors").write_text("half")
        if where == "weights":
            raise full
    assert train_state.saved_steps(tmp_path) == [5]
    assert [p.name for p in (tmp_path / "train_state").iterdir()] == ["step-00000005"]


def test_a_full_disk_is_an_oserror_that_commands_understand(tmp_path, monkeypatch):
    """The stream torch writes to is a Python file, so the operating system's own error comes through."""
    save(tmp_path, 5)
    real = open

    def full(path, *args, **kwargs):
        return real("/dev/full" if str(path).endswith("state.pt") else path, *args, **kwargs)

    monkeypatch.setattr(train_state, "open", full, raising=False)
    with pytest.raises(OSError) as caught:
        save(tmp_path, 10, big=torch.zeros(100_000))
    assert caught.value.errno == errno.ENOSPC
    assert train_state.saved_steps(tmp_path) == [5]


def test_what_a_killed_save_left_is_no_resume_point_and_is_swept(tmp_path):
    save(tmp_path, 5)
    left = tmp_path / "train_state" / ".step-00000010.abc.partial"
    left.mkdir()
    (left / "state.pt").write_text("half")
    (tmp_path / ".model.safetensors.partial").write_text("half")
    assert train_state.saved_steps(tmp_path) == [5]
    train_state.sweep(tmp_path)
    assert not left.exists() and [p.name for p in tmp_path.iterdir()] == ["train_state"]
    assert train_state.load_state(tmp_path, 5)["step"] == 5


def test_publishing_replaces_the_weights_and_survives_the_end_of_the_resume_point(tmp_path):
    save(tmp_path, 5)
    train_state.publish(tmp_path, 5)
    save(tmp_path, 10)  # removes step 5, whose files the run folder still has
    assert (tmp_path / "model.safetensors").read_text() == "weights 5"
    train_state.publish(tmp_path, 10)
    assert (tmp_path / "model.safetensors").read_text() == "weights 10"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "train_state"]


def test_publishing_copies_where_links_are_not_to_be_had(tmp_path, monkeypatch):
    save(tmp_path, 5)
    monkeypatch.setattr(train_state.os, "link", lambda *a: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    train_state.publish(tmp_path, 5)
    assert (tmp_path / "model.safetensors").read_text() == "weights 5"
    assert (tmp_path / "model.safetensors").stat().st_nlink == 1


def test_a_missing_or_damaged_state_is_one_clear_line(tmp_path):
    save(tmp_path, 5)
    path = train_state.step_folder(tmp_path, 5) / "state.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train_state.load_state(tmp_path, 5)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        train_state.load_state(tmp_path, 5)


def test_random_numbers_go_on_where_they_were(tmp_path):
    torch.manual_seed(1)
    random.seed(1)
    save(tmp_path, 5, random=train_state.random_state())
    expected = torch.rand(3), random.random()
    torch.manual_seed(2)
    random.seed(2)
    train_state.restore_random_state(train_state.load_state(tmp_path, 5)["random"])
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
