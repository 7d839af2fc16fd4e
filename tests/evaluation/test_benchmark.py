"""The command line: what it writes, prints and refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import xmoe
from evaluation import benchmark
from evaluation.settings import EvalConfig
from xmoe import command
from xmoe.compression.plan import PrunePlan
from xmoe.compression.routing import RoutingStats
from xmoe.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs" / "evaluate"


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    xmoe.save(model, tmp_path / "model", layout="native", tokenizer=tokenizer)
    return str(tmp_path / "model")


def run(capsys, *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        command.run(benchmark.main, [*map(str, argv)])
    out = capsys.readouterr()
    return left.value.code, out.out, out.err


def test_a_run_leaves_a_report_samples_and_statistics(checkpoint, data_dir, tmp_path, capsys):
    outputs = {name: tmp_path / name for name in ("report.json", "samples.jsonl", "stats.safetensors")}
    flags = ["--checkpoint", checkpoint, "--data-dir", data_dir, "--dtype", "float32", "--benchmark", "winogrande,mmlu"]
    code, out, _ = run(
        capsys, *flags, "--limit", 1, "--num-fewshot", 1, "--output", outputs["report.json"],
        "--save-samples", outputs["samples.jsonl"], "--record", outputs["stats.safetensors"],
    )  # fmt: skip
    assert code == 0 and out.startswith("| benchmark | metric |")
    report = json.loads(outputs["report.json"].read_text())
    assert report["results"]["mmlu"]["micro"]["n"] == 3 and len(report["data"]["winogrande"]["indices"]) == 1
    assert report["command"].startswith("python evaluation/benchmark.py --checkpoint")
    samples = [json.loads(line) for line in outputs["samples.jsonl"].read_text().splitlines()]
    assert len(samples) == 4 and samples[0]["requests"][0][1].startswith(" ") and "acc" in samples[0]["values"]
    stats = RoutingStats.load(outputs["stats.safetensors"])
    assert stats.tokens == report["protocol"]["tokens_computed"] > 0
    assert float(stats.moments["count"].sum()) == stats.tokens * 4 * 3  # layers * K: padding left out
    code, _, err = run(capsys, *flags, "--output", outputs["report.json"])
    assert code == 2 and "already exists" in err
    assert not list(tmp_path.glob("*.progress.jsonl"))


def test_json_and_compare(checkpoint, data_dir, tmp_path, capsys):
    flags = ["--checkpoint", checkpoint, "--data-dir", data_dir, "--benchmark", "winogrande", "--json"]
    code, out, _ = run(capsys, *flags, "--output", tmp_path / "a.json")
    assert code == 0 and json.loads(out)["results"]["winogrande"]["acc"]["n"] == 2
    plan = _plan(tmp_path)
    code, out, _ = run(capsys, *flags, "--plan", plan, "--output", tmp_path / "b.json")
    masked = json.loads(out)
    assert masked["model"]["plan"] == str(plan)
    code, out, _ = run(capsys, "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 0 and "| winogrande | acc |" in out
    code, out, _ = run(capsys, "--compare", tmp_path / "a.json", tmp_path / "a.json", "--json")
    assert json.loads(out)[0]["change"]["value"] == 0.0


def test_projections_in_int8_are_another_model(model, random_model, tokenizer, data_dir, tmp_path, capsys):
    wide = random_model(dataclasses.replace(model.config, hidden_size=32, head_dim=16))
    flags = [
        "--checkpoint",
        xmoe.save(wide, tmp_path / "wide", tokenizer=tokenizer),
        "--data-dir",
        data_dir,
        "--benchmark",
        "winogrande",
        "--json",
    ]
    stored, rounded = (json.loads(run(capsys, *flags, *more)[1]) for more in ((), ("--projections", "int8")))
    assert rounded["model"]["projections"] == "int8" and "projections" not in stored["model"]
    assert rounded["model"]["hash"] != stored["model"]["hash"]
    assert rounded["model"]["parameters"] == stored["model"]["parameters"]


def _plan(folder) -> Path:
    """Expert 3 goes from every layer."""
    kept, scores = ((0, 1, 2, 4),) * 4, ((1.0, 2.0, 3.0, 0.5, 4.0),) * 4
    PrunePlan(
        criterion="frequency", budget="uniform", num_experts=(5,) * 4, num_experts_per_tok=3, kept=kept, scores=scores
    ).save(folder / "plan.json")
    return folder / "plan.json"


def test_a_plan_is_in_force_only_during_the_run(checkpoint, data_dir, tmp_path, capsys):
    flags = ["--checkpoint", checkpoint, "--data-dir", data_dir, "--benchmark", "hellaswag", "--record"]
    run(capsys, *flags, tmp_path / "s.safetensors", "--plan", _plan(tmp_path))
    stats = RoutingStats.load(tmp_path / "s.safetensors")
    assert float(stats.moments["count"][:, 3].sum()) == 0 < float(stats.moments["count"][:, 4].sum())


def test_a_failing_benchmark_leaves_the_others_and_exit_code_1(checkpoint, data_dir, tmp_path, capsys):
    (data_dir / "winogrande" / "winogrande_xl_val.jsonl").unlink()
    flags = ["--checkpoint", checkpoint, "--data-dir", data_dir, "--benchmark", "winogrande,lambada"]
    code, out, err = run(capsys, *flags, "--output", tmp_path / "r.json")
    assert code == 1 and "error: winogrande: no validation rows" in err and "LAMBADA" in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["results"]) == ["lambada"] and "winogrande" in report["failed"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmark", "helaswag"], "error: there is no benchmark 'helaswag'; did you mean hellaswag"),
        (["--benchmark", "lambada", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["--benchmark", "lambada", "--limit", "many"], "invalid int value"),
        (["--benchmark", "mmlu", "--subjects", "anatomie"], "did you mean anatomy"),
        (["--benchmark", "lambada", "--max-length", "1"], "--max-length 1"),
        (["--benchmark", "lambada", "--prefix-token", "start"], "expected auto, bos, eos, none"),
        (["--set", "limt=3"], "limit"),
        (["--mode", "generate", "--record", "s.safetensors"], "--record sees scored text only"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(checkpoint, capsys, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "--checkpoint", checkpoint, *flags)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_no_checkpoint(capsys):
    code, _, err = run(capsys, "--benchmark", "lambada")
    assert code == 2 and "--checkpoint is missing" in err


def test_help_ends_with_an_example(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "python evaluation/benchmark.py --checkpoint" in out.split("example:")[1]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_loads(path):
    assert load_config(EvalConfig, path).chosen()


def test_there_are_configs():
    assert len(list(CONFIGS.glob("*.yaml"))) >= 3
