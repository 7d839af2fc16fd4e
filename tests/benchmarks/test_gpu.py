"""What `make gpu` does around its measurements; the kernels themselves are proved in tests/kernels."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from xmoe.errors import ConfigError
from xmoe.kernels.cuda import tiles
from xmoe.model.config import preset
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return importlib.import_module("gpu")


def test_a_failing_section_is_written_down_and_the_others_run(gpu):
    written, clock = [], []

    def broken(_):
        raise RuntimeError("lost the device")

    def checked(so_far):
        clock.append(so_far)
        return {"rows": [{"what": "a", "error": 0.001, "ok": True}, {"what": "b", "error": 3.0, "ok": False}]}

    results = {"date": "today", "environment": {"device": "x"}, "sections": {}}
    good = gpu.run_sections(
        {"broken": broken, "checked": checked}, results, lambda r: written.append(json.dumps(r)), 1e9
    )
    assert not good and len(written) == 2 and "lost the device" in results["sections"]["broken"]["error"]
    assert "test_gpu.py" in results["sections"]["broken"]["traceback"]
    assert clock == [results["sections"]], "a section sees what came before it"
    assert gpu.summary(results["sections"]["checked"]) == "2 rows, 1 of 2 checks held"
    text = gpu.markdown(results)
    assert "RuntimeError: lost the device" in text and "| b | 3 | **NO** |" in text and "- device: x" in text


def test_sections_stop_when_time_is_over(gpu):
    results = {"sections": {}}
    fine = {"rows": [{"ok": True}]}
    assert gpu.run_sections({"a": lambda _: dict(fine)}, results, lambda _: None, 1e9)
    assert not gpu.run_sections({"b": lambda _: dict(fine)}, results, lambda _: None, -1.0)
    assert "skipped" in results["sections"]["b"] and "rows" not in results["sections"]["b"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(gpu):
    with pytest.raises(ConfigError, match="no CUDA device is visible"):
        gpu.main([])


def test_results_land_in_two_files(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.triton_backend, "reason", lambda *_: None)
    monkeypatch.setattr(gpu, "environment", lambda: {"device": "pretended"})
    monkeypatch.setattr(gpu, "sections", lambda: {"one": lambda _: {"rows": [{"µs": 0.5}]}, "two": lambda _: 1 / 0})
    assert gpu.main(["--only", "one", "--output", str(tmp_path), "--json"]) == 0
    (written,) = tmp_path.glob("gpu-*.json")
    assert json.loads(capsys.readouterr().out) == json.loads(written.read_text())
    assert "| 0.5 |" in written.with_suffix(".md").read_text()
    with pytest.raises(ConfigError, match="unknown section three; expected some of one, two"):
        gpu.main(["--only", "three"])
    monkeypatch.setattr(gpu.triton_backend, "reason", lambda *_: "triton is not installed")
    with pytest.raises(ConfigError, match="triton is not installed"):
        gpu.main([])


def test_bytes_of_a_decode_step_are_those_of_the_roofline(gpu):
    """gpt-oss-20b, one sequence, 1024 tokens behind it: 3.708 GB of weights and 28 MB of keys and values."""
    pytest.importorskip("triton")
    speed = importlib.import_module("gpu_speed")
    with torch.device("meta"):
        model = Transformer(preset("gpt_oss_20b")).bfloat16()
        for block in model.blocks:
            for name in ("gate_up", "down"):
                E, N, K = getattr(block.moe.experts, name).shape
                held = {"blocks": torch.empty(E, N, K // 32, 16, dtype=torch.uint8)}
                held["scales"] = torch.empty(E, N, K // 32, dtype=torch.uint8)
                block.moe.experts.pack(name, PackedWeight("mxfp4", held))
    assert speed._bytes_per_step(model, 1, 1024) == pytest.approx(3.708e9 + 28e6, rel=1e-3)


def test_all_sections_and_tiles_can_be_imported_without_a_gpu(gpu):
    pytest.importorskip("triton")
    assert list(gpu.sections())[:2] == ["ceilings", "correctness"]
    tune = importlib.import_module("gpu_tune")
    known = {frozenset(entry) - {"rows"} for entry in tiles.entries()["mxfp4_gate_up"]}
    assert {frozenset(tile) for tile in tune._packed((1, 2), (16, 128))} == known
    assert {frozenset(tile) | {"rows"} for tile in tune._dense()} == {
        frozenset(entry) for entry in tiles.entries()["grouped_rows"]
    }


@pytest.mark.parametrize("path", sorted(tiles.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_tables_are_as_tune_would_write_them(path):
    table = json.loads(path.read_text(encoding="utf-8"))
    version = "" if table["triton"] == "any" else table["triton"]
    assert tiles.written(table["arch"], version, table["measured"], table["kernels"]) == path.read_text(
        encoding="utf-8"
    )


def test_tuning_keeps_the_fastest_that_runs(gpu, monkeypatch):
    pytest.importorskip("triton")
    tune = importlib.import_module("gpu_tune")

    def seconds(run, calls, repeats):
        assert calls == 2
        return run()

    monkeypatch.setattr(tune, "graph_seconds", seconds)

    def make():
        tile = tiles.tile("mxfp4_down", 1, torch.device("cpu"))
        if tile["BM"] == 2:
            raise RuntimeError("out of resource: shared memory")
        return lambda: 1.0 / tile["BM"], 2

    assert tune.fastest("mxfp4_down", iter([{"BM": 1}, {"BM": 3}, {"BM": 2}]), make) == {"BM": 3}
    assert tune.fastest("mxfp4_down", iter([{"BM": 2}]), make) is None

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        tune.fastest("mxfp4_down", iter([{"BM": 1}]), lost)


def test_a_tuned_tile_replaces_its_limit_or_finds_its_place(gpu):
    pytest.importorskip("triton")
    tune = importlib.import_module("gpu_tune")
    entries = [{"rows": 8, "BM": 1}, {"rows": None, "BM": 2}]
    assert tune.replaced(entries, {"rows": None, "BM": 3}) == [{"rows": 8, "BM": 1}, {"rows": None, "BM": 3}]
    assert [e["rows"] for e in tune.replaced(entries, {"rows": 96, "BM": 3})] == [8, 96, None]
