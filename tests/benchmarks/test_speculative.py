"""The speculation benchmark on a tiny model: every contestant says the script, and the best cases are best cases."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def benchmark():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "speculative.py"
    spec = importlib.util.spec_from_file_location("speculative_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_text_is_the_script(benchmark, capsys, tmp_path):
    flags = ["--preset", "tiny", "--layers", "2", "--repeat", "1", "--new-tokens", "11", "--device", "cpu", "--json"]
    assert benchmark.main([*flags, "--output", str(tmp_path / "r.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "r.json").read_text())
    assert list(found["passes"]["tokens"]) == ["1", "2", "3", "5", "9"]
    names = [run["text"] for run in found["every_guess_right"]]
    assert names == ["1 of 2 layers", "half of the experts kept", "one expert a token"]
    for run in found["every_guess_right"]:
        assert run["same_text"] and run["acceptance_rate"] == 1.0 and run["tokens_per_pass"] == 5.0
    assert all(run["same_text"] for run in found["prompt_lookup"])


def test_a_text_that_differs_is_exit_1(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "_passes", lambda model, repeat: {})
    monkeypatch.setattr(benchmark, "_lookup", lambda *a: {"same_text": False})
    monkeypatch.setattr(benchmark, "_best_cases", lambda *a: [{"same_text": True}])
    assert benchmark.main(["--preset", "tiny", "--device", "cpu", "--json"]) == 1
