"""The compress command from text to proof, on a checkpoint a moment old; every mistake is one line and exit 2."""

from __future__ import annotations

import csv
import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xmoe import command
from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.weights import save
from xmoe.compression.criteria import CRITERIA, RECONSTRUCTION, WEIGHTS
from xmoe.compression.recipe import CompressConfig
from xmoe.config import load_config
from xmoe.data.tokenizer import Tokenizer
from xmoe.model.config import preset
from xmoe.model.transformer import build

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "compress.py"
CONFIGS = ROOT / "configs" / "compress"


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


def test_low_rank_from_text_to_a_checkpoint_that_speaks(run, made, recorded, capsys):
    line = (
        "reduce --checkpoint model --method low-rank --fraction 0.4 --whiten --data text.txt --tokens 200 --seq-len 40"
    )
    code, out, _ = run(f"{line} --output thin")
    assert code == 0 and "low-rank" in out and "fitted to 200 tokens" in out and "error of outputs" in out
    thin = Checkpoint(made / "thin")
    assert thin.layout.name == "native" and thin.formats == ["low-rank"]
    (stage,) = json.loads((made / "thin" / "manifest.json").read_text())["operations"]
    stored = [i.nbytes for n, i in thin.reader.tensors.items() if n.endswith((".left", ".right"))]
    assert stage["bytes_after"] == sum(stored) <= 0.6 * stage["bytes_before"]
    assert "rank" in stage["detail"] and "low-rank" in (made / "thin" / "README.md").read_text()

    code, out, _ = run("reduce --checkpoint packed --method low-rank --rank 12,8 --experts 1:* --output half --json")
    assert code == 0 and sorted(Checkpoint(made / "half").formats) == ["low-rank", "mxfp4"]
    assert run("prune --checkpoint thin --stats model.safetensors --keep 4 --output thin-4")[0] == 0
    assert run("verify --source thin --pruned thin-4")[0] == 0
    back = "recover --checkpoint thin --teacher model --data text.txt --tokens 60 --seq-len 30 --steps 1"
    assert run(f"{back} --output thin-back")[0] == 0 and Checkpoint(made / "thin-back").formats == ["low-rank"]
    code, out, err = run(f"{back} --train experts --output thin-trained")
    assert code == 0 and Checkpoint(made / "thin-trained").formats == ["low-rank"]
    assert "training low-rank experts in fp32, which takes 0.01 GB beside the model" in err
    assert " in floating point, " in out and " stored as low-rank" in out
    for script, words in (
        ("describe", []),
        ("chat", ["--prompt", "The", "--max-new-tokens", "4", "--temperature", "0"]),
    ):
        spec = importlib.util.spec_from_file_location(f"{script}_command", SCRIPT.with_name(f"{script}.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.main(["--checkpoint", str(made / "thin-4"), *words]) in (0, None)
    assert "in low-rank (rank " in capsys.readouterr().out


def test_some_experts_of_a_layer_from_end_to_end(run, made, recorded, capsys):
    line = "reduce --checkpoint packed --method low-rank,int8 --fraction 0.4 --experts 0:3,0:7,1:* --output some"
    code, out, _ = run(line)
    assert code == 0 and out.count("\n") == 2
    some = Checkpoint(made / "some")
    assert some.layout.name == "native" and sorted(some.formats) == ["low-rank-int8", "mxfp4"]
    stages = json.loads((made / "some" / "manifest.json").read_text())["operations"]
    stored = [i.nbytes for n, i in some.reader.tensors.items() if ".experts." in n and "bias" not in n]
    assert stages[-1]["bytes_after"] == sum(stored)
    assert run("record --checkpoint some --data text.txt --tokens 200 --seq-len 50 --output some.safetensors")[0] == 0
    assert run("prune --checkpoint some --stats some.safetensors --keep 4 --output some-4")[0] == 0
    assert run("verify --source some --pruned some-4")[0] == 0
    back = "recover --checkpoint some --teacher model --data text.txt --tokens 60 --seq-len 30 --steps 2 --train all"
    code, out, err = run(f"{back} --output some-back --json")
    result = json.loads(out)
    assert code == 0 and Checkpoint(made / "some-back").formats == some.formats
    assert "training mxfp4 and low-rank-int8 experts in fp32" in err and result["stored_kl"] >= 0
    for script, words in (
        ("describe", []),
        ("chat", ["--prompt", "The", "--max-new-tokens", "4", "--temperature", "0"]),
        ("convert", ["--output", str(made / "some-hf"), "--layout", "hf-bf16"]),
    ):
        spec = importlib.util.spec_from_file_location(f"{script}_command", SCRIPT.with_name(f"{script}.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.main(["--checkpoint", str(made / "some"), *words]) in (0, None)
    assert "in low-rank-int8 and mxfp4 (rank " in capsys.readouterr().out
    assert Checkpoint(made / "some-hf").formats == ["dense"]


def test_a_recipe_does_it_all_and_flags_override_it(run, made, recorded):
    (made / "recipe.yaml").write_text(
        "record: {data: text.txt, tokens: 200, seq_len: 40, sample: 30}\n"
        "plan: {criterion: reconstruction, keep: 0.5, protect: {1: [9]}, remove: {all: [3]}}\n"
    )
    code, _, _ = run("prune --checkpoint model --config recipe.yaml --set record.tokens=160 --output from-recipe")
    plan = json.loads((made / "from-recipe" / "plan.json").read_text())
    assert code == 0 and plan["criterion"] == "reconstruction" and plan["data"]["tokens"] == 160
    assert [len(row) for row in plan["kept"]] == [5, 5]
    assert 9 in plan["kept"][1] and all(3 not in row for row in plan["kept"])
    code, out, _ = run(
        "plan --stats model.safetensors --config recipe.yaml --criterion reap --keep 4 --output p4.json --json"
    )
    assert code == 0 and [len(row) for row in json.loads(out)["kept"]] == [4, 4]
    assert json.loads((made / "p4.json").read_text())["criterion"] == "reap"
    code, out, _ = run("record --checkpoint model --config recipe.yaml --sample 7 --output r7.safetensors --json")
    assert code == 0 and json.loads(out)["tokens"] == 200


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_that_comes_with_xmoe_loads(path):
    recipe = load_config(CompressConfig, path)
    assert recipe.plan.amount is not None or recipe.plan.remove
    needs_no_text = recipe.plan.criterion in (*WEIGHTS, "random", "ranking")
    assert needs_no_text or recipe.record.data
    if recipe.plan.criterion in RECONSTRUCTION or recipe.plan.budget == "sensitivity":
        assert recipe.record.sample >= 256


def test_help_names_every_criterion(script):
    named = importlib.import_module("compress_commands.decide").CRITERIA
    assert tuple(named.split(", ")) == CRITERIA


@pytest.mark.parametrize(
    "name", ["", "record", "import", "fingerprint", "plan", "prune", "verify", "sweep", "merge", "reduce", "recover"]
)
def test_help_does_not_wait_for_torch(tmp_path, name):
    """From any folder, and the libraries that take seconds stay out."""
    words = [sys.executable, "-X", "importtime", SCRIPT, *name.split(), "--help"]
    shown = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"usage: compress.py {name}".rstrip())
    loaded = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "compress_commands.decide" in loaded and not loaded & {"torch", "numpy", "tokenizers", "safetensors"}


def test_there_are_recipes():
    assert len(list(CONFIGS.glob("*.yaml"))) >= 4


def test_conversations_and_texts_are_recorded_together(run, made):
    asked = [{"role": "user", "content": f"What is {n} + 1?"} for n in range(9)]
    rows = [{"messages": [q, {"role": "assistant", "content": "It is more."}]} for q in asked]
    (made / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = "record --checkpoint model --data chats.jsonl,text.txt --tokens 500 --seq-len 64 --output chats.safetensors"
    code, out, _ = run(f"{line} --json")
    assert code == 0 and json.loads(out)["tokens"] == 500
    code, out, _ = run(
        "record --checkpoint model --data chats.jsonl --tokens 60 --generate --new-tokens 5 --output said.safetensors --json"
    )
    assert code == 0 and 60 < json.loads(out)["tokens"] <= 60 + 4 * 5


def test_fingerprints_of_two_domains_and_a_trace(run, made):
    for name, text in (("fox", "text.txt"), ("python", "python")):
        line = f"record --checkpoint model --data {text} --tokens 200 --seq-len 50 --domain {name} --output {name}.safetensors"
        assert run(line)[0] == 0
    code, out, _ = run(
        "fingerprint --stats fox.safetensors,python.safetensors --top 3,5 --checkpoint model --text foxes --output fp.json"
    )
    content = json.loads((made / "fp.json").read_text())
    assert code == 0 and "top 3: fox and python share" in out and "2 domains, 1 traces" in out
    assert list(content["rankings"]) == ["fox", "python"] and len(content["rankings"]["fox"]) == 2
    (trace,) = content["traces"]
    assert trace["tokens"] == list("foxes")
    assert [len(trace["indices"]), len(trace["indices"][0]), len(trace["indices"][0][0])] == [5, 2, 3]


def full_disk(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "line",
    [
        "record --checkpoint model --data text.txt --tokens 100 --seq-len 50 --output out",
        "plan --stats model.safetensors --keep 4 --output out",
        "prune --checkpoint packed --stats packed.safetensors --keep 4 --output out",
        "merge --checkpoint packed --stats packed.safetensors --method ream --keep 4 --output out",
        "reduce --checkpoint packed --method int8 --output out",
        "recover --checkpoint packed --teacher packed --data text.txt --tokens 60 --seq-len 30 --steps 1 --output out",
        "sweep --checkpoint model --stats model.safetensors --keep 4 --data text.txt --tokens 100 --output out",
        "fingerprint --stats model.safetensors --top 4 --output out",
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(run, made, recorded, monkeypatch, line):
    """The disk is full at the moment when what was written is flushed to it, behind everything else."""
    before = {p.relative_to(made): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    monkeypatch.setattr(os, "fsync", full_disk)
    code, out, err = run(line)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err == "error: cannot write out: No space left on device; nothing was left there\n"
    assert {p.relative_to(made): p.read_bytes() for p in made.rglob("*") if p.is_file()} == before


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
        ("plan --stats model.safetensors --keep many --output p.json", "keep is 'many'; expected a count"),
        ("plan --stats model.safetensors --keep 4 --criterion best --output p.json", "unknown criterion 'best'"),
        ("plan --stats model.safetensors --keep 4 --protect 1:99 --output p.json", "protect 1:99"),
        ("plan --stats model.safetensors --keep 4 --protect x --output p.json", "--protect x: expected LAYER:EXPERT"),
        ("plan --stats model.safetensors,other.safetensors --keep 4 --output p.json", "different models"),
        ("plan --keep 4 --output p.json", "give --stats"),
        ("prune --checkpoint other --stats model.safetensors --keep 4 --output out", "is for model"),
        ("prune --checkpoint nowhere --stats model.safetensors --keep 4 --output out", "no folder nowhere"),
        ("prune --checkpoint model --plan none.json --output out", "does not exist"),
        ("prune --checkpoint model --plan none.json --keep 4 --output out", "so --keep would not be obeyed"),
        ("plan --stats model.safetensors --set plan.keeps=4 --output p.json", "did you mean plan.keep?"),
        ("plan --stats model.safetensors --set plan.prune_method=ean --output p.json", "did you mean plan.criterion?"),
        ("plan --stats model.safetensors --config none.yaml --output p.json", "none.yaml does not exist"),
        ("plan --stats model.safetensors --keep 2 --protect :3 --output p.json", "--protect :3: expected LAYER:EXPERT"),
        ("record --checkpoint model --output s.safetensors", "--data is missing"),
        ("record --checkpoint model --data text.txt --tokens 0 --output s.safetensors", "tokens is 0; expected 1"),
        ("fingerprint --output f.json", "give --stats"),
        ("fingerprint --stats model.safetensors --text hello --output f.json", "give --stats"),
        ("fingerprint --stats model.safetensors --top few --output f.json", "--top few: expected counts"),
        ("fingerprint --stats model.safetensors,other.safetensors --output f.json", "same domain"),
        ("prune --checkpoint model --stats model.safetensors --keep 4 --output other", "already exists"),
        (
            "prune --checkpoint model --stats model.safetensors --keep 4 --output model --overwrite",
            "would replace --chec",
        ),
        (
            "prune --checkpoint ./model --stats model.safetensors --keep 4 --output . --overwrite",
            "would replace --chec",
        ),
        (
            "merge --checkpoint model --stats model.safetensors --method ream --keep 4 --output model --overwrite",
            "must stay",
        ),
        ("reduce --checkpoint model --method int8 --output model --overwrite", "would replace --checkpoint"),
        ("recover --checkpoint model --teacher other --data text.txt --output other --overwrite", "replace --teacher"),
        ("verify --source model --pruned other", "has no manifest.json"),
        ("record --checkpoint model --data none.txt --output s.safetensors", "none.txt"),
        ("recover --checkpoint model --teacher other --data text.txt --train heads --output out", "not 'heads'"),
        ("reduce --checkpoint model --method magnitude --fraction 1 --output out", "between 0 and 1"),
        ("reduce --checkpoint model --method magnitude --pattern 2to4 --output out", "expected N:M"),
        ("reduce --checkpoint model --method low_rnk --fraction 0.5 --output out", "did you mean low-rank?"),
        ("reduce --checkpoint model --method low-rank --fraction 0 --output out", "between 0 and 1"),
        ("reduce --checkpoint model --method low-rank --rank 60 --output out", "saves nothing"),
        ("reduce --checkpoint packed --method low-rank --rank 16,8 --output out", "8,192 bytes an expert in bfloat16"),
        ("reduce --checkpoint model --method low-rank --rank 9x8 --output out", "--rank 9x8: expected R or R,R"),
        ("reduce --checkpoint model --method low-rank --fraction 0.5 --whiten --output out", "give --data, or --stats"),
        ("reduce --checkpoint model --method neurons --fraction 0.5 --experts 1:3 --output out", "leave --experts out"),
        ("reduce --checkpoint model --method low-rank --fraction 0.5 --experts 1:30 --output out", "no such expert"),
        ("reduce --checkpoint model --method low-rank --fraction 0.5 --experts 7:* --output out", "--experts 7:*"),
        ("reduce --checkpoint model --method int4,low-rank --fraction 0.97 --output out", "less than rank 1"),
        ("reduce --checkpoint model --method magnitude --fraction 0.5 --score size --output out", "unknown score"),
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
