"""The decoding benchmark: every engine is measured alike, ratios are of rounds, absent peers are named."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from xmoe.checkpoint.weights import save
from xmoe.model.config import ModelConfig

FILE = Path(__file__).parents[2] / "benchmarks" / "decode_cpu.py"
TINY = ModelConfig(
    vocab_size=75, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=96, num_experts=5, num_experts_per_tok=2, sliding_window=7, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    return importlib.import_module("decode_cpu")


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    return importlib.import_module("decode_cpu_engines")


class Counting:
    """An engine that answers with how many tokens it has read since the last reset, and notes what it was fed."""

    def __init__(self):
        self.fed, self.seen = [], 0

    def reset(self):
        self.seen = 0

    def feed(self, tokens):
        self.fed.append(list(tokens))
        self.seen += len(tokens)
        return self.seen

    def logits(self):
        return [float(self.seen)]


def run(engine: str, decode: list[float], prefill: list[float], logits: list[float]) -> dict:
    return {
        "version": "1", "path": engine, "prefill_tokens": 8, "decode_seconds": decode, "prefill_seconds": prefill,
        "load_seconds": 1.0, "first_token_seconds": 2.5, "peak_bytes": 10**9, "logits": logits,
    }  # fmt: skip


def test_a_quick_engine_reads_the_prompt_and_decodes_what_it_says(engines):
    engine, ids = Counting(), list(range(40))
    answer = engines.measure(engine, ids, tokens=5, seconds=1e3)
    assert answer["prefill_tokens"] == 40 and len(answer["prefill_seconds"]) == 2 and len(answer["decode_seconds"]) == 5
    assert answer["logits"] == [16.0], "engines are compared behind the short prompt"
    assert answer["first_prompt_seconds"] > 0 and list(map(len, engine.fed[:5])) == [16, 16, 40, 40, 40]
    single = [f[0] for f in engine.fed if len(f) == 1]
    assert single == [0, *range(17, 16 + engines.WARM + 5)], "each token is the one the engine chose"


def test_a_slow_engine_reads_the_short_prompt_only(engines):
    engine = Counting()
    answer = engines.measure(engine, list(range(40)), tokens=50, seconds=0.0)
    assert answer["prefill_tokens"] == 16 and len(answer["decode_seconds"]) == 2
    assert max(map(len, engine.fed)) == 16


def test_ratios_are_medians_of_rounds_and_distances_relative(bench):
    ours = [run("a", [0.1], [1.0], [3.0, 4.0]), run("a", [0.4], [1.0], [3.0, 4.0]), run("a", [0.1], [2.0], [3.0, 4.0])]
    theirs = [
        run("b", [0.2], [4.0], [3.0, 3.0]),
        run("b", [0.4], [2.0], [3.0, 3.0]),
        run("b", [0.4], [2.0], [3.0, 3.0]),
    ]
    first, second = bench.summaries({"xmoe": ours, "llama.cpp": theirs})
    assert first["decode_tokens_per_second"] == 10 and "decode_ratio" not in first
    assert second["decode_ratio"] == pytest.approx(2.0) and second["prefill_ratio"] == pytest.approx(2.0)
    assert second["prefill_tokens_per_second"] == 4 and second["logits_distance"] == pytest.approx(0.2)


def test_every_engine_has_its_line(bench):
    runs = {
        "xmoe": [run("a", [0.1], [1.0], [1.0])],
        "llama.cpp": [{"left_out": "ModuleNotFoundError: No module named 'llama_cpp'"}],
        "mlx-lm": [run("b", [0.2], [1.0], [1.5]), {"failed": "Killed"}],
        "transformers eager": [run("c", [0.2], [4.0], [1.5])],
    }
    result = {
        "layers": 2, "hidden_size": 64, "vocab_size": 75, "bytes": 10**9, "prompt": 512, "rounds": 1,
        "machine": {"threads": 2}, "readings": bench.summaries(runs),
    }  # fmt: skip
    lines = bench.table(result).splitlines()
    assert len(lines) == 6 and "left out: ModuleNotFoundError" in lines[3] and "failed: Killed" in lines[4]
    assert "2.00x" in lines[5] and "4.00x" in lines[5] and "50.0 %" in lines[5] and "prefill of 8 only" in lines[5]


def test_it_runs_ours_and_names_what_is_not_there(random_model, tmp_path):
    save(random_model(TINY), tmp_path / "checkpoint", layout="hf-mxfp4")
    command = [
        sys.executable,
        str(FILE),
        "--checkpoint",
        str(tmp_path / "checkpoint"),
        "--prompt",
        "20",
        "--tokens",
        "2",
    ]
    command += [
        "--engines",
        "xmoe,xmoe huge pages,xmoe int8,xmoe portable,llama.cpp",
        "--output",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    ours, huge, rounded, portable, llama = result["readings"]
    assert result["layers"] == 2 and result["vocab_size"] == 75 and result["date"] and ours["version"]
    assert all(r["first_token_seconds"] > r["load_seconds"] > 0 for r in (ours, huge, rounded, portable))
    assert huge["logits_distance"] == 0.0 and portable["logits_distance"] < 0.05
    assert 0 < rounded["logits_distance"] < 0.2
    assert llama == {"engine": "llama.cpp", "left_out": "no GGUF file: give --converter, --gguf or --gguf-q8-0"}
    assert "left out: no GGUF file" in done.stdout


def test_engines_that_take_turns_stay_loaded(random_model, tmp_path):
    """Two of ours, three turns: a run for every turn, prompts read in between, and ratios of the turns."""
    save(random_model(TINY), tmp_path / "checkpoint", layout="hf-mxfp4")
    command = [
        sys.executable,
        str(FILE),
        "--checkpoint",
        str(tmp_path / "checkpoint"),
        "--prompt",
        "20",
        "--tokens",
        "3",
    ]
    command += ["--engines", "xmoe,xmoe huge pages,llama.cpp", "--turns", "3", "--json", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, huge, llama = json.loads(done.stdout)["readings"]
    for reading in (ours, huge):
        assert len(reading["decode_tokens_per_second_of_rounds"]) == 3
        assert len(set(reading["prefill_tokens_per_second_of_rounds"])) == 3, "the prompt was read again for every turn"
    assert huge["decode_ratio"] > 0 and huge["logits_distance"] == 0.0 and "left_out" in llama


def test_an_engine_that_ends_in_its_turn_is_told(bench, monkeypatch, tmp_path):
    """One fails when it loads and one at its first turn, with the last line of what it printed; the others go on."""
    child = tmp_path / "child.py"
    child.write_text(
        "import json, sys\n"
        "if sys.argv[1] == 'absent': print(json.dumps({'left_out': 'not here'})); sys.exit()\n"
        "if sys.argv[1] == 'broken': sys.exit('no memory')\n"
        "print(json.dumps({'prefill_tokens': 9, 'prefill_seconds': [1.0]}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    if sys.argv[1] == 'dies': sys.exit('killed at last')\n"
        "    print(json.dumps([2.0]), flush=True)\n"
    )
    monkeypatch.setattr(bench, "CHILD", child)
    present = dict.fromkeys(["fine", "absent", "broken", "dies"], sys.executable) | {"gone": str(tmp_path / "python")}
    runs = bench._in_turns(present, tmp_path, {"turns": 2, "prompt": 512, "threads": 1})
    assert runs["fine"] == [{"prefill_tokens": 9, "prefill_seconds": [1.0], "decode_seconds": [2.0]}] * 2
    assert runs["absent"] == [{"left_out": "not here"}] and runs["broken"] == [{"failed": "no memory"}]
    assert runs["dies"] == [{"failed": "killed at last"}] and "does not run" in runs["gone"][0]["failed"]


@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_converter_runs_as_it_is_where_there_is_a_tokenizer(engines, tmp_path, tokenizer):
    """A stand-in with llama.cpp's file names: `set_vocab` is replaced only where there is no vocabulary to read."""
    llama, folder = tmp_path / "llama", tmp_path / "model"
    (llama / "conversion").mkdir(parents=True)
    folder.mkdir()
    (llama / "conversion" / "__init__.py").touch()
    (llama / "conversion" / "gpt_oss.py").write_text(
        "class Writer:\n    def __init__(self): self.said = []\n"
        "    def __getattr__(self, name): return lambda value: self.said.append([name, value])\n"
        "class GptOssModel:\n    gguf_writer, hparams = Writer(), {'vocab_size': 75}\n"
        "    def set_vocab(self): self.gguf_writer.said.append('read')\n"
    )
    (llama / "convert_hf_to_gguf.py").write_text(
        "import sys, json\nfrom conversion.gpt_oss import GptOssModel\nmodel = GptOssModel()\nmodel.set_vocab()\n"
        "open(sys.argv[3], 'w').write(json.dumps([sys.argv[1:], model.gguf_writer.said]))\n"
    )
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    options = {"converter": str(llama / "convert_hf_to_gguf.py"), "gguf": str(tmp_path / "out.gguf"), "rest": "q8_0"}
    command = [sys.executable, engines.__file__, "convert", str(folder), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given, said = json.loads((tmp_path / "out.gguf").read_text())
    assert given == [str(folder), "--outfile", options["gguf"], "--outtype", "q8_0"]
    assert said == (["read"] if tokenizer else [["add_tokenizer_model", "none"], ["add_vocab_size", 75]])


def test_an_absent_interpreter_is_a_failure_that_is_told(bench, tmp_path):
    answer = bench._child(str(tmp_path / "python"), "llama.cpp", tmp_path, {"threads": 1})
    assert "does not run" in answer["failed"]


def test_wrong_use_is_one_line_and_exit_2():
    cases = {
        "unknown engine 'abacus'": ["--engines", "abacus"],
        "need the --checkpoint": ["--gguf", "x"],
        "give one": ["--turns", "2", "--rounds", "2"],
    }
    for said, flags in cases.items():
        done = subprocess.run([sys.executable, str(FILE), *flags], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr and not done.stdout
