"""`--adapter` at every door that takes a checkpoint: what it changes, and how a wrong one is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from xmoe.checkpoint import adapters, weights
from xmoe.command import run
from xmoe.data.tokenizer import Tokenizer
from xmoe.model.adapter import Settings, attach
from xmoe.model.config import preset
from xmoe.model.transformer import build

ROOT = Path(__file__).parents[2]
SETTINGS = Settings({"attention": 3, "experts": 2}, alpha=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base: a packed checkpoint; other: its like; adapter: of base, with much to say."""
    folder = tmp_path_factory.mktemp("doors")
    tokenizer = Tokenizer.of_bytes()
    for name, seed in (("base", 0), ("other", 1)):
        made = build(preset("tiny", num_hidden_layers=2, vocab_size=tokenizer.vocab_size), seed=seed)
        weights.save(made, folder / name, "hf-mxfp4", tokenizer=tokenizer)
    model, _ = weights.load(folder / "base")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for lora in attach(model, SETTINGS).values():
            for parameter in (lora.a, lora.b):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    (folder / "adapter").mkdir()
    adapters.save(model, folder / "adapter", SETTINGS, base="base")
    return folder


def command(path: str, capsys, *args) -> tuple[int, str, str]:
    spec = importlib.util.spec_from_file_location("door", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as left:
        run(module.main, [str(a) for a in args])
    return left.value.code, *capsys.readouterr()


def test_convert_merges_and_says_what_rounding_did(folder, tmp_path, capsys):
    given = "--checkpoint", folder / "base", "--adapter", folder / "adapter"
    code, out, _ = command(
        "scripts/convert.py", capsys, *given, "--layout", "hf-mxfp4", "--output", tmp_path / "packed"
    )
    told = json.loads((tmp_path / "packed" / "merge.json").read_text())
    assert code == 0 and f"kept {told['mxfp4_change_kept']:.1%} of the adapter's change" in out
    assert weights.load(tmp_path / "packed")[0].blocks[0].moe.experts.gate_up.format == "mxfp4"
    code, out, _ = command(
        "scripts/convert.py", capsys, *given, "--layout", "native", "--output", tmp_path / "dense", "--json"
    )
    assert (
        code == 0
        and json.loads(out)["merge"]["mxfp4_relative_error"] is None
        and json.loads(out)["experts"] == ["dense"]
    )


def test_chat_and_benchmark_speak_with_the_adapter(folder, tmp_path, capsys):
    asked = "--checkpoint", folder / "base", "--device", "cpu"
    prompt = "--prompt", "one two", "--max-new-tokens", 12, "--temperature", 0, "--json"
    said = [
        command("scripts/chat.py", capsys, *asked, *prompt, *more) for more in ((), ("--adapter", folder / "adapter"))
    ]
    assert [code for code, *_ in said] == [0, 0]
    assert json.loads(said[0][1])["text"] != json.loads(said[1][1])["text"]
    (tmp_path / "data" / "wikitext").mkdir(parents=True)
    page = {"page": " = One = \n\n one two three four five six seven eight . \n" * 3}
    (tmp_path / "data" / "wikitext" / "test.jsonl").write_text(json.dumps(page) + "\n")
    scored = "--benchmark", "wikitext", "--data-dir", tmp_path / "data", "--json"
    reports = [
        json.loads(command("evaluation/benchmark.py", capsys, *asked, *scored, *more)[1])
        for more in ((), ("--adapter", folder / "adapter"))
    ]
    assert reports[0]["model"]["hash"] != reports[1]["model"]["hash"]
    assert reports[1]["model"]["adapter"] == str(folder / "adapter")
    assert reports[0]["results"] != reports[1]["results"]


def test_mistakes_are_one_line_and_leave_nothing(folder, tmp_path, capsys):
    (tmp_path / "cut").mkdir()
    for name in (adapters.ABOUT, adapters.TENSORS):
        content = (folder / "adapter" / name).read_bytes()
        (tmp_path / "cut" / name).write_bytes(content[: len(content) - 64 * (name == adapters.TENSORS)])
    for checkpoint, adapter, message in (
        (folder / "other", folder / "adapter", "was trained beside another model"),
        (folder / "base", tmp_path / "cut", "is truncated"),
        (folder / "base", tmp_path / "nothing", "holds no adapter"),
    ):
        for path, more in (
            ("scripts/convert.py", ("--layout", "native", "--output", tmp_path / "out")),
            ("scripts/chat.py", ("--prompt", "one")),
        ):
            code, out, err = command(path, capsys, "--checkpoint", checkpoint, "--adapter", adapter, *more)
            assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()
    code, _, err = command("scripts/chat.py", capsys, "--checkpoint", folder / "adapter", "--prompt", "one")
    assert code == 2 and "give it as --adapter" in err


def test_train_refuses_what_it_cannot_do(folder, tmp_path, capsys):
    for given, message in (
        (["lora.rank.attn=4"], "did you mean attention?"),
        (["lora.rank.attention=0"], "no group a rank above 0"),
        (["lora.dropout=0.1"], "unknown key lora.dropout"),
    ):
        flags = [word for text in (f"train.init_from={folder}/base", *given) for word in ("--set", text)]
        (tmp_path / "run.yaml").write_text("data: {source: nowhere.txt}\nlora: {alpha: 4, rank: {attention: 0}}\n")
        code, _, err = command(
            "scripts/train.py", capsys, "--config", tmp_path / "run.yaml", "--output", tmp_path / "out", *flags
        )
        assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
