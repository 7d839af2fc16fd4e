"""The chat command, once and through a pipe, on checkpoints a moment old; its mistakes are one line and exit 2."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from xmoe import command
from xmoe.checkpoint.weights import save
from xmoe.compression.plan import PrunePlan
from xmoe.data.tokenizer import Tokenizer
from xmoe.kernels import dispatch
from xmoe.model.config import preset
from xmoe.model.transformer import build

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "chat.py"
CONFIG = preset("tiny", num_hidden_layers=2, max_position_embeddings=150)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("chat_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints: a base model, a smaller one, one without a tokenizer, and one whose chat template writes channels."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = Tokenizer.of_bytes()
    save(build(CONFIG, seed=1), root / "base", tokenizer=tokenizer)
    save(build(preset("tiny", num_hidden_layers=1), seed=2), root / "small", tokenizer=tokenizer)
    save(build(preset("tiny", num_hidden_layers=2, head_dim=16), seed=4), root / "wide", tokenizer=tokenizer)
    save(build(CONFIG), root / "mute")
    other = Tokenizer.train(["a b c d " * 50], 300)
    save(build(CONFIG), root / "foreign", tokenizer=other)
    save(build(preset("tiny", num_hidden_layers=2), seed=3), root / "harmony", tokenizer=tokenizer)
    (root / "harmony" / "chat_template.jinja").write_text("<|start|>assistant<|channel|>final<|message|>")
    (root / "empty").mkdir()
    return root


def write_plan(path, kept):
    PrunePlan("by hand", "uniform", (10, 10), 3, tuple(map(tuple, kept))).save(path)
    return str(path)


@pytest.fixture
def chat(script, folders, capsys, monkeypatch):
    """(checkpoint, *flags, typed=lines) -> exit code, standard output, standard error."""

    def run(name, *flags, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as left:
            command.run(script.main, ["--checkpoint", str(folders / name), "--device", "cpu", *map(str, flags)])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return run


def test_a_base_model_writes_on_and_says_so(chat):
    code, out, err = chat("base", "--prompt", "def ", "--temperature", 0, "--max-new-tokens", 8)
    assert code == 0
    assert out.startswith("def ")
    assert "[8 tokens, " in err
    assert "tokens/s" in err
    code, out, err = chat("base", "--max-new-tokens", 8, "--temperature", 0, typed="def \n/quit\n")
    assert code == 0
    assert "a base model without a chat template: it writes on what you type" in err
    assert "context 150 tokens" in err
    assert dispatch.describe("cpu", torch.float32) in err, "which kernels run is said at the start"
    assert "base model" not in out


def test_one_answer_as_json_and_nothing_else(chat, folders):
    flags = ("--prompt", "def ", "--json", "--seed", 3, "--max-new-tokens", 9, "--top-p", 0.9, "--min-p", 0.01)
    code, out, err = chat("base", *flags)
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["checkpoint"] == str(folders / "base")
    assert (answer["new_tokens"], answer["finish_reason"], answer["prompt_tokens"]) == (9, "length", 4)
    assert answer["seconds_to_first_token"] > 0
    assert answer["tokens_per_second"] > 0
    assert json.loads(chat("base", *flags)[1])["text"] == answer["text"]
    assert json.loads(chat("base", *flags, "--reasoning-effort", "high")[1])["text"] != answer["text"]


def test_projections_in_int8(chat):
    flags = ("--prompt", "def ", "--json", "--temperature", 0, "--max-new-tokens", 6)
    code, out, err = chat("wide", *flags, "--projections", "int8")
    assert (code, err) == (0, "") and json.loads(out)["new_tokens"] == 6
    code, _, err = chat("wide", "--projections", "int8", typed="/quit\n")
    assert code == 0 and dispatch.describe("cpu", torch.float32) in err


@pytest.mark.parametrize(
    "flags", [("--prompt-lookup",), ("--draft", "small"), ("--draft-experts", 1), ("--draft-plan", "plan.json")]
)
def test_speculation_changes_only_the_figures(chat, folders, flags):
    flags = [str(folders / f) if f == "small" else f for f in flags]
    if "--draft-plan" in flags:
        flags[1] = write_plan(folders / "plan.json", [[0, 1, 4, 7, 9], [2, 3]])
    settings = ("--prompt", "ab ab ab ab ab", "--json", "--temperature", 0, "--max-new-tokens", 30)
    plain = json.loads(chat("base", *settings)[1])
    code, out, err = chat("base", *settings, *flags)
    assert code == 0, err
    answer = json.loads(out)
    assert answer["text"] == plain["text"]
    rate = answer["acceptance_rate"]
    assert 0 <= rate <= 1 if rate is not None else "--prompt-lookup" in flags, (
        "only a text without repeats drafts nothing"
    )
    assert answer["tokens_per_pass"] >= 1


def test_a_conversation_through_a_pipe(chat, tmp_path):
    file = tmp_path / "said.json"
    typed = (
        f"/help\n/temperature 0\n/max-new-tokens 5\n/top-k 3\n/effort low\n/experts 2\n/settings\nhello\\\nworld\n"
        f"/save {file}\n/save {file}\n/nonsense\n/temperature hot\n/experts 99\n/system x\n/reset\nbye\n"
    )
    code, out, err = chat("base", typed=typed)
    assert code == 0
    assert "/reset" in err
    assert '"temperature": 0.0' in err
    assert '"num_experts_per_tok": 2' in err
    assert json.loads(file.read_text())["text"].startswith("hello\nworld")
    assert err.count("[5 tokens,") == 2
    for complaint in (
        "already exists", "unknown command /nonsense", "expected a number", "expected 1 to 10", "takes no system text",
    ):  # fmt: skip
        assert f"{complaint}" in err
    assert err.count("error: ") == 5
    assert "error" not in out


def test_harmony_where_the_checkpoint_has_a_template_for_it(chat, tmp_path):
    """A random model writes letters without a header; they are shown, and the conversation goes on."""
    file = tmp_path / "said.json"
    typed = f"/effort high\n/system Be brief.\nhello\nagain\n/save {file}\n"
    code, _, err = chat("harmony", "--max-new-tokens", 6, "--seed", 1, typed=typed)
    assert code == 0, err
    assert "Harmony chat" in err
    said = json.loads(file.read_text())
    assert (said["effort"], said["instructions"]) == ("high", "Be brief.")
    assert [m["text"] for m in said["messages"] if m["role"] == "user"] == ["hello", "again"]


def test_a_plain_chat_ends_its_turn_before_it_speaks_for_the_user(chat, tmp_path):
    file = tmp_path / "said.json"
    flags = ("--template", "plain", "--system", "Two friends talk.", "--max-new-tokens", 6)
    code, _, err = chat("base", *flags, typed=f"hello\n/save {file}\n")
    assert code == 0
    assert "plain chat" in err
    said = json.loads(file.read_text())
    assert said["system"] == "Two friends talk."
    assert [m["role"] for m in said["messages"]] == ["user", "assistant"]


def test_a_plan_is_tried_without_cutting(chat, folders):
    file = write_plan(folders / "half.json", [[5, 6, 7, 8, 9]] * 2)
    flags = ("--prompt", "abc", "--json", "--temperature", 0, "--max-new-tokens", 20)
    masked, whole = (json.loads(chat("base", *flags, *more)[1])["text"] for more in (("--plan", file), ()))
    assert masked != whole


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("base", ("--temperature", -1), "temperature is -1.0"),
        ("base", ("--reasoning-effort", "huge"), "unknown reasoning effort 'huge'"),
        ("harmony", ("--reasoning-effort", "huge"), "unknown reasoning effort 'huge'"),
        ("base", ("--num-experts-per-tok", 11), "expected 1 to 10"),
        ("base", ("--draft-experts", 11), "expected 1 to 10"),
        ("base", ("--draft", "small", "--prompt-lookup"), "not allowed with"),
        ("base", ("--draft", "DIR/foreign"), "another tokenizer"),
        ("base", ("--plan", "nowhere.json"), "nowhere.json does not exist"),
        ("base", ("--system", "x"), "takes no system text"),
        ("base", ("--max-new-tokens", 0), "max_new_tokens is 0"),
        ("base", ("--device", "abacus"), "abacus"),
        ("base", ("--projections", "int8"), "groups of 32, and blocks.0.attn.out.weight has 72"),
        ("base", ("--projections", "int3"), "invalid choice: 'int3'"),
        ("harmony", ("--prompt", "x" * 600), "context is 512"),
        ("mute", (), "has no tokenizer"),
        ("empty", (), "empty"),
        ("nowhere", (), "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(chat, folders, name, flags, says):
    flags = [str(f).replace("DIR", str(folders)) for f in flags]
    prompt = () if "--prompt" in flags else ("--prompt", "x")
    code, out, err = chat(name, *prompt, *flags)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


def test_json_needs_a_prompt(chat):
    code, out, err = chat("base", "--json")
    assert (code, out) == (2, "")
    assert "give --prompt TEXT" in err
