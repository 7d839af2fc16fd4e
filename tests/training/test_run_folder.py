"""The run folder: what is not this run's is never touched, and a run goes on only as it began."""

from __future__ import annotations

import io
import json
import shutil

import pytest

from xmoe.errors import CheckpointError, ConfigError
from xmoe.training.trainer import train


def go(config_file, output, *overrides, **options):
    return train(config_file, overrides, output=output, console=io.StringIO(), **options)


def curve(folder) -> list[dict]:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def test_an_output_that_exists_is_refused_and_overwritten_only_when_it_is_a_run(config_file, whole, tmp_path):
    before = curve(whole)
    with pytest.raises(ConfigError, match="already exists; --resume goes on"):
        go(config_file, whole, "train.seed=7")
    assert curve(whole) == before
    go(config_file, whole, "train.seed=7", overwrite=True)
    assert curve(whole) != before
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "dear.txt").write_text("do not lose me")
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises((ConfigError, CheckpointError), match=r"other than a run|no run folder"):
            go(config_file, letters, **options)
    assert (letters / "dear.txt").read_text() == "do not lose me"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="already exists"):
        go(config_file, tmp_path / "file")


@pytest.mark.parametrize("change", ["optim.lr=1e-3", "model.num_experts=7", "data.seq_len=20"])
def test_a_run_does_not_go_on_under_other_settings(config_file, whole, change):
    key = change.partition("=")[0]
    with pytest.raises(ConfigError, match=f"cannot go on with other settings: .*{key} was"):
        go(config_file, whole, change, "train.steps=20", resume=True)


def test_a_run_does_not_go_back(config_file, whole):
    with pytest.raises(ConfigError, match=r"at step 12, past train\.steps 8"):
        go(config_file, whole, "train.steps=8", resume=True)


def test_a_small_disk_is_noticed_before_training(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10**5))
    with pytest.raises(ConfigError, match="no disk space"):
        go(config_file, tmp_path / "run")
    assert not (tmp_path / "run").exists()
