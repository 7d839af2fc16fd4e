"""The compress command from text to proof, on a checkpoint a moment old; every mistake is one line and exit 2."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from xmoe import command
from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.weights import save
from xmoe.data.tokenizer import Tokenizer
from xmoe.model.config import preset
from xmoe.model.transformer import build

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compress.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compress_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a checkpoint in two layouts, another model, and some text."""
    root = tmp_path_factory.mktemp("compress")
    config = preset("tiny", num_hidden_layers=2)
    save(build(config, seed=1), root / "model", tokenizer=Tokenizer.of_bytes())
    save(build(config, seed=1), root / "packed", "hf-mxfp4", tokenizer=Tokenizer.of_bytes())
    save(build(config, seed=2), root / "other", tokenizer=Tokenizer.of_bytes())
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return root


@pytest.fixture
def run(script, made, capsys, monkeypatch):
    """words of a command line -> exit code, standard output, standard error"""
    monkeypatch.chdir(made)

    def typed(line: str):
        with pytest.raises(SystemExit) as left:
            command.run(script.main, line.split())
        out = capsys.readouterr()
        return left.value.code, out.out, out.err

    return typed


@pytest.fixture(scope="module")
def recorded(script, made):
    """Statistics of both layouts."""
    for name in ("model", "packed", "other"):
        line = f"record --checkpoint {made / name} --data {made / 'text.txt'} --tokens 300 --seq-len 32 --sample 40"
        assert script.main([*line.split(), "--output", str(made / f"{name}.safetensors"), "--json"]) == 0


@pytest.mark.parametrize("name", ["model", "packed"])
def test_the_whole_story(run, made, recorded, name):
    code, out, _ = run(f"plan --stats {name}.safetensors --criterion reap-sum --keep 5 --output {name}-plan.json")
    assert code == 0 and "10 of 20 experts stay" in out
    code, out, _ = run(f"prune --checkpoint {name} --plan {name}-plan.json --output {name}-5 --json")
    kept = json.loads(out)["kept"]
    assert code == 0 and [len(k) for k in kept] == [5, 5]
    assert Checkpoint(made / f"{name}-5").config.num_experts == 5
    assert "compress.py prune" in json.loads((made / f"{name}-5" / "manifest.json").read_text())["command"]
    assert "| 0 | " in (made / f"{name}-5" / "README.md").read_text()
    code, out, _ = run(f"verify --source {name} --pruned {name}-5")
    assert code == 0 and out.startswith("proved: ")
    data = bytearray((made / f"{name}-5" / "model.safetensors").read_bytes())
    data[-9] ^= 4
    (made / f"{name}-5" / "model.safetensors").write_bytes(data)
    code, out, _ = run(f"verify --source {name} --pruned {name}-5")
    assert code == 1 and out.startswith("differs: ")


def test_prune_takes_the_flags_of_plan(run, made, recorded):
    code, out, _ = run("prune --checkpoint model --criterion weight_norm --keep 0.5 --output by-weights --json")
    assert code == 0 and json.loads(out)["after"]["parameters"] < json.loads(out)["before"]["parameters"]
    code, _, _ = run(
        "prune --checkpoint model --stats model.safetensors --criterion reconstruction --keep 6 --budget sensitivity "
        "--protect 1:9 --remove 3 --output uneven"
    )
    config = Checkpoint(made / "uneven").config
    assert code == 0 and sum(config.experts_in_layer(i) for i in range(2)) == 12
    kept = json.loads((made / "uneven" / "manifest.json").read_text())["kept"]
    assert 9 in kept[1] and all(3 not in row for row in kept)
    code, out, _ = run("prune --checkpoint model --stats model.safetensors --keep 4 --recipe --output recipe")
    assert code == 0 and [p.name for p in (made / "recipe").iterdir()] == ["plan.json"]


def test_sweep_leaves_a_table_and_a_plot(run, made, recorded):
    code, out, _ = run(
        "sweep --checkpoint model --stats model.safetensors --criterion frequency,reap --keep 8,0.5 --data text.txt "
        "--tokens 200 --seq-len 40 --output swept"
    )
    assert code == 0 and "perplexity" in out
    rows = list(csv.DictReader((made / "swept" / "sweep.csv").open()))
    assert [(r["criterion"], r["experts"]) for r in rows] == [
        ("none", "20"), ("frequency", "16"), ("frequency", "10"), ("reap", "16"), ("reap", "10"),
    ]  # fmt: skip
    sizes = [int(r["bytes"]) for r in rows]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[1] == sizes[3]
    svg = (made / "swept" / "sweep.svg").read_text()
    assert svg.startswith("<svg") and svg.count("<polyline") == 2


def test_recover_brings_a_pruned_model_nearer(run, made, recorded):
    assert run("prune --checkpoint model --stats model.safetensors --keep 3 --output three")[0] == 0
    code, out, _ = run(
        "recover --checkpoint three --teacher model --data text.txt --tokens 256 --seq-len 64 --steps 12 --output back --json"
    )
    result = json.loads(out)
    assert code == 0 and result["last_kl"] < result["first_kl"]
    assert result["parameters"] == 2 * (3 * 64 + 3)
    assert Checkpoint(made / "back").config == Checkpoint(made / "three").config


def test_merge_and_reduce_leave_a_checkpoint_and_their_story(run, made, recorded):
    code, out, _ = run("merge --checkpoint packed --stats packed.safetensors --method ream --keep 4 --output merged")
    assert code == 0 and "not bit-exact" in out and Checkpoint(made / "merged").config.num_experts == 4
    story = json.loads((made / "merged" / "manifest.json").read_text())
    assert story["bit_exact"] is False and story["operations"][0]["method"] == "ream"
    assert run("verify --source packed --pruned merged")[0] == 2

    code, out, _ = run(
        "reduce --checkpoint packed --method neurons,magnitude,int8 --fraction 0.34 --stats packed.safetensors "
        "--output reduced"
    )
    assert code == 0 and out.count("\n") == 3 and "LARGER" in out.splitlines()[2]
    reduced = Checkpoint(made / "reduced")
    assert reduced.layout.name == "native" and reduced.formats == ["int8"] and reduced.config.intermediate_size == 64
    stages = json.loads((made / "reduced" / "manifest.json").read_text())["operations"]
    stored = [i.nbytes for n, i in reduced.reader.tensors.items() if ".experts." in n and "bias" not in n]
    assert stages[-1]["bytes_after"] == sum(stored)
    code, _, _ = run("reduce --checkpoint packed --method magnitude --pattern 2:4 --experts 1:3 --output sparse")
    assert code == 0 and Checkpoint(made / "sparse").layout.name == "hf-mxfp4"


def test_answers_of_the_model_are_recorded_too(run, made):
    code, out, _ = run(
        "record --checkpoint model --data text.txt --tokens 60 --seq-len 20 --generate --new-tokens 5 "
        "--output answers.safetensors --json"
    )
    assert code == 0 and 60 < json.loads(out)["tokens"] <= 60 + 3 * 5


def test_import_of_published_summaries(run, made):
    part = {f"layer_{i}": {"3": {"count_frequency": 0.5, "prob_density": 0.1}} for i in range(2)}
    (made / "published" / "data").mkdir(parents=True)
    (made / "published" / "data" / "s.json").write_text(json.dumps({"sample_count": 2, "think_expert_analytics": part}))
    index = {"quiz": {"law": {"True_False": {"sample_count": 2, "summary_file_path": "s.json"}}}}
    (made / "published" / "data" / "map.json").write_text(json.dumps(index))
    (made / "published" / "domains.json").write_text(json.dumps({"law": ["quiz/law"]}))
    code, out, _ = run("import --format fingerprint --data published --domain law --output law.safetensors")
    assert code == 0 and "in law" in out
    code, out, _ = run("plan --stats law.safetensors --criterion frequency --keep 16 --output law.json --json")
    assert code == 0 and all(3 in kept for kept in json.loads(out)["kept"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plan --stats none.safetensors --keep 4 --output p.json", "does not exist"),
        ("plan --stats model.safetensors --keep 0 --output p.json", "keep is 0"),
        ("plan --stats model.safetensors --keep 11 --output p.json", "more than the 10 experts"),
        ("plan --stats model.safetensors --keep 1.5 --output p.json", "must lie between 0 and 1"),
        ("plan --stats model.safetensors --keep many --output p.json", "--keep many: expected a count"),
        ("plan --stats model.safetensors --keep 4 --criterion best --output p.json", "unknown criterion 'best'"),
        ("plan --stats model.safetensors --keep 4 --protect 1:99 --output p.json", "protect 1:99"),
        ("plan --stats model.safetensors --keep 4 --protect x --output p.json", "--protect x: expected LAYER:EXPERT"),
        ("plan --stats model.safetensors,other.safetensors --keep 4 --output p.json", "different models"),
        ("plan --keep 4 --output p.json", "give --stats"),
        ("prune --checkpoint other --stats model.safetensors --keep 4 --output out", "is for model"),
        ("prune --checkpoint nowhere --stats model.safetensors --keep 4 --output out", "no folder nowhere"),
        ("prune --checkpoint model --plan none.json --output out", "does not exist"),
        ("prune --checkpoint model --stats model.safetensors --keep 4 --output other", "already exists"),
        ("verify --source model --pruned other", "has no manifest.json"),
        ("record --checkpoint model --data none.txt --output s.safetensors", "none.txt"),
        ("recover --checkpoint model --teacher other --data text.txt --train heads --output out", "not 'heads'"),
        ("reduce --checkpoint model --method magnitude --fraction 1 --output out", "between 0 and 1"),
        ("reduce --checkpoint model --method magnitude --pattern 2to4 --output out", "expected N:M"),
        ("merge --checkpoint model --stats other.safetensors --method ream --keep 4 --output out", "are of model"),
        ("plan", "--output"),
        ("shrink", "invalid choice"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run, made, recorded, line, message):
    before = sorted(p.name for p in made.iterdir())
    code, out, err = run(line)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(p.name for p in made.iterdir()) == before
