"""The two commands through their front door: what they print, what they leave, how they refuse."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from xmoe.checkpoint.weights import load, save
from xmoe.command import run
from xmoe.data.tokenizer import Tokenizer
from xmoe.model.config import preset

SCRIPTS = Path(__file__).parents[2] / "scripts"


def command(name: str, capsys, *args) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as left:
        run(module.main, [str(a) for a in args])
    out, err = capsys.readouterr()
    return left.value.code, out, err


@pytest.fixture
def folder(random_model, tmp_path):
    return save(random_model(preset("tiny")), tmp_path / "model")


def test_convert(folder, tmp_path, capsys):
    args = ("--checkpoint", folder, "--layout", "hf-mxfp4", "--output", tmp_path / "packed")
    code, out, _ = command("convert", capsys, *args, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["layout"] == "hf-mxfp4" and result["experts"] == ["mxfp4"] and result["tensors"] == 3 + 19 * 4
    assert load(tmp_path / "packed")[0].embed.weight.dtype == torch.bfloat16
    code, out, err = command("convert", capsys, *args)
    assert code == 2 and "already exists" in err and not out
    code, out, _ = command("convert", capsys, *args, "--overwrite")
    assert code == 0 and "79 tensors" in out


def test_convert_mistakes(folder, tmp_path, capsys):
    goal = tmp_path / "goal"
    for args, message in (
        (("--checkpoint", folder, "--layout", "gguf"), "unknown layout 'gguf'"),
        (("--checkpoint", folder, "--layout", "native", "--dtype", "float16"), "float16 cannot run GPT-OSS"),
        (("--checkpoint", tmp_path / "none", "--layout", "native"), "no folder"),
        (("--layout", "native"), "--checkpoint"),
    ):
        code, out, err = command("convert", capsys, *args, "--output", goal)
        assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert not goal.exists()


def test_what_chat_refuses_is_neither_converted_nor_described(folder, tmp_path, capsys):
    code, out, err = command("describe", capsys, "--checkpoint", folder, "--dtype", "float16")
    assert code == 2 and "float16 cannot run GPT-OSS" in err and err.count("\n") == 1 and not out
    tokenizer = Tokenizer.of_bytes()
    size = load(folder)[0].config.vocab_size
    tokenizer.backend.add_tokens([AddedToken(f"<|extra {i}|>", special=True) for i in range(size)])
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str())
    common = ("--checkpoint", folder)
    for name, more in ("describe", ()), ("convert", ("--layout", "native", "--output", tmp_path / "goal")):
        code, out, err = command(name, capsys, *common, *more)
        assert code == 2 and f"vocabulary ends at {size - 1}" in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "goal").exists()


def test_describe(folder, capsys):
    code, out, _ = command(
        "describe", capsys, "--checkpoint", folder, "--json", "--tensors", "--context-lengths", "8,100"
    )
    assert code == 0
    c = json.loads(out)
    config = preset("tiny")
    assert c["parameters"] == config.parameter_count() and c["active_parameters"] == config.active_parameter_count()
    assert c["bytes"] == 4 * config.parameter_count() == sum(t["bytes"] for t in c["tensors"])
    assert c["expert_bytes"] == 4 * 4 * 10 * config.expert_parameter_count()
    assert c["experts_per_layer"] == [10] * 4 and c["expert_formats"] == ["dense"] and c["layout"] == "native"
    # 2 (k, v) * 2 heads * 12 wide * 2 bytes; two layers see 8 tokens at most, two see all
    assert [m["kv_cache_bytes"] for m in c["memory"]] == [96 * (2 * 8 + 2 * 8), 96 * (2 * 8 + 2 * 100)]
    assert c["memory"][1]["total_bytes"] == c["bytes"] + c["memory"][1]["kv_cache_bytes"]
    code, out, _ = command("describe", capsys, "--checkpoint", folder, "--tensors")
    assert code == 0 and f"{config.parameter_count():,} in all" in out and "blocks.3.moe.experts.down" in out


def test_describe_mistakes(folder, tmp_path, capsys):
    for args, message in (
        (("--context-lengths", "many"), "expected whole numbers"),
        (("--context-lengths", "100000"), "the model's longest context"),
    ):
        code, out, err = command("describe", capsys, "--checkpoint", folder, *args)
        assert code == 2 and message in err and not out
    (tmp_path / "empty").mkdir()
    code, out, err = command("describe", capsys, "--checkpoint", tmp_path / "empty")
    assert code == 2 and "has no weights" in err and err.count("\n") == 1 and not out
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, out, err = command("describe", capsys, "--checkpoint", folder)
    assert code == 2 and "is truncated" in err and err.count("\n") == 1 and not out
