"""Router health and log lines against values worked out by hand."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch

from xmoe.errors import ConfigError
from xmoe.training.metrics import Log, LogConfig, Window, dead_experts, drop_lines_after, flatten


def filled(rows, steps=2, loss=3.0, tokens=100, seconds=0.5) -> Window:
    window = Window()
    for i in range(steps):
        terms = {"loss": torch.tensor(loss + i), "lm_loss": torch.tensor(1.5)}
        window.add(terms, [torch.tensor(r) for r in rows], [torch.tensor(0.5 + i / 10)] * len(rows), tokens, seconds)
    return window


def line(**changes) -> dict:
    base = {
        "loss": 2.5,
        "lm_loss": 2.4,
        "lr": 1e-3,
        "grad_norm": 0.7,
        "tokens_per_second": 1234.0,
        "dead_experts": None,
    }
    base |= {"expert_load": [[0.5, 0.5]], "max_violation": [0.0], "load_entropy": [1.0], "top_gate": [0.6]}
    return base | changes


def test_dead_is_below_a_tenth_of_a_fair_share_in_a_window_long_enough():
    assert dead_experts(torch.tensor([300, 21, 19, 460])) == [2]  # fair share 200, a tenth is 20
    assert dead_experts(torch.tensor([300, 20, 20, 459])) is None  # 199.75 rows expected: too early to say
    assert dead_experts(torch.tensor([200, 200])) == []


def test_a_window_averages_its_steps():
    found = filled([[6, 2, 0, 0], [2, 2, 2, 2]]).record()
    assert found["loss"] == 3.5 and found["lm_loss"] == 1.5
    assert found["tokens_per_second"] == 200.0
    assert found["expert_load"] == [[0.75, 0.25, 0, 0], [0.25] * 4]
    assert found["max_violation"] == [2.0, 0.0]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert found["load_entropy"] == [pytest.approx(entropy, abs=1e-6), 1.0]
    assert found["top_gate"] == [pytest.approx(0.55)] * 2
    assert found["dead_experts"] is None


def test_the_verdict_on_the_dead_waits_for_enough_rows_and_then_starts_anew():
    window = filled([[150, 0, 50]], steps=2)  # 133 rows expected: open
    assert window.record()["dead_experts"] is None
    window.add({"loss": torch.tensor(1.0)}, [torch.tensor([150, 1, 50])], [torch.tensor(0.5)], 1, 1.0)
    assert window.record()["dead_experts"] == [[1]]  # 200 expected, over both windows
    window.add({"loss": torch.tensor(1.0)}, [torch.tensor([250, 200, 200])], [torch.tensor(0.5)], 1, 1.0)
    assert window.record()["dead_experts"] == [[]]


def test_a_window_that_was_saved_goes_on_as_if_nothing_had_happened():
    whole, first, second = filled([[5, 1]], steps=3), filled([[5, 1]], steps=2), Window()
    second.load_state_dict(first.state_dict())
    second.add(
        {"loss": torch.tensor(5.0), "lm_loss": torch.tensor(1.5)}, [torch.tensor([5, 1])], [torch.tensor(0.7)], 100, 0.5
    )
    assert second.record() == whole.record()


def test_lines_land_in_the_file_and_on_the_console(tmp_path):
    console = io.StringIO()
    log = Log(tmp_path, LogConfig(), 40, console=console)
    log.train(10, line())
    log.validation(10, {"val_loss": 2.0, "val_perplexity": 7.389, "val_bits_per_byte": 1.1})
    log.close()
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in lines] == [10, 10]
    assert lines[0]["expert_load"] == [[0.5, 0.5]] and lines[1]["val_loss"] == 2.0
    assert "step 10/40" in console.getvalue() and "perplexity 7.39" in console.getvalue()


def test_the_alarm_sounds_once_for_the_same_dead_and_says_when_they_live():
    console = io.StringIO()
    log = Log(None, LogConfig(), 40, console=console)
    log.train(10, line(dead_experts=[[], [3, 7]]))
    log.train(20, line(dead_experts=[[], [3, 7]]))
    log.train(30, line(dead_experts=None))
    log.train(35, line(dead_experts=[[], [3]]))
    log.train(40, line(dead_experts=[[], []]))
    out = console.getvalue()
    assert (
        out.count("!! DEAD EXPERTS") == 2 and "layer 1: 3, 7" in out and "no expert is dead any more at step 40" in out
    )


def test_a_silent_rank_writes_nothing(tmp_path):
    console = io.StringIO()
    log = Log(tmp_path, LogConfig(wandb=True), 40, console=console, silent=True)
    log.train(10, line())
    log.say("hello")
    log.close()
    assert console.getvalue() == "" and not list(tmp_path.iterdir())


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 3}) + "\n" for s in (5, 10, 15, 20)) + '{"step": 2')
    drop_lines_after(path, 10)
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [5, 10]
    log = Log(tmp_path, LogConfig(), 40, resumed_at=10, console=io.StringIO())
    log.train(15, line())
    log.close()
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [5, 10, 15]


def test_wandb_gets_numbers_only():
    flat = flatten({"step": 3, **line(dead_experts=[[1], [2, 4]], max_violation=[0.1, 0.2])})
    assert flat["dead_experts"] == 3 and flat["max_violation/layer_1"] == 0.2 and flat["loss"] == 2.5
    assert all(isinstance(value, (int, float)) for value in flat.values())
    assert "expert_load" not in flat


def test_wandb_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        Log(tmp_path, LogConfig(wandb=True), 40, console=io.StringIO())


def test_a_log_interval_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"log\.every is 0"):
        LogConfig(every=0)
