"""Tokens a second on the CPU at true GPT-OSS-20B width with packed experts, ours beside llama.cpp, transformers and mlx-lm.

A random checkpoint of a few layers and a small vocabulary is written to a temporary folder (deleted afterwards) and read
by each engine in a process of its own: a prompt of --prompt tokens at once, then --tokens one at a time behind a prompt
of 16. The first pass over a prompt does not count there: engines differ in what they do when they load and what at first
use, so the time to the first token behind the prompt of 16, loading included, is told beside it. Engines take turns,
--rounds times, and medians over all rounds are told, since other work on the machine slows single runs. With --turns all
engines stay loaded and decode in turn, a fraction of a second each: the fair comparison where the machine's own speed
changes from second to second, if they fit in memory together. llama.cpp reads the same weights from a GGUF file that its
own converter (--converter) makes of the checkpoint. Peers run in --peer-python; what that interpreter cannot import is left
out and named.

    pip install llama-cpp-python mlx[cpu] mlx-lm        # the peers, compiled here where there is no wheel
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from decode_cpu_engines import DISTRIBUTIONS, ENGINES
from load import write_checkpoint
from tqdm import tqdm

from xmoe import command
from xmoe.errors import ConfigError
from xmoe.outputs import new_file

EXAMPLE = (
    "python benchmarks/decode_cpu.py --turns 40 --tokens 16 --peer-python PEERS/bin/python --converter LLAMA/convert.py"
)
CHILD = Path(__file__).with_name("decode_cpu_engines.py")
PREFILLS = 4
"""How often the long prompt is read where engines take turns."""


def main(argv: list[str] | None = None) -> int:
    """Exit 1 where an engine failed; one that is not installed is left out."""
    p = command.parser(__doc__.splitlines()[0], EXAMPLE)
    p.add_argument("--layers", type=int, default=4, metavar="N", help="of 24 (default: 4; 0.5 GB each)")
    p.add_argument("--vocab-size", type=int, default=16384, metavar="N", help="default: 16384; the true one is 201088")
    p.add_argument("--checkpoint", metavar="DIR", help="a checkpoint to read instead of a random one (hf-mxfp4)")
    p.add_argument("--engines", default=",".join(ENGINES), metavar="NAME,...", help=f"default: {','.join(ENGINES)}")
    p.add_argument("--peer-python", default=sys.executable, metavar="FILE", help="interpreter that runs the peers")
    p.add_argument("--converter", metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py, which makes its GGUF file")
    p.add_argument("--gguf", metavar="FILE", help="the weights of --checkpoint, already converted")
    p.add_argument("--gguf-q8-0", metavar="FILE", help="the same with all but the experts in Q8_0")
    p.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the long prompt (default: 512)")
    p.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens decoded one at a time (default: 32)")
    p.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="of every engine (default: all)")
    p.add_argument("--seconds", type=float, default=20.0, help="most time of a run's decoding (default: 20)")
    p.add_argument("--rounds", type=int, default=1, metavar="N", help="turns of every engine (default: 1)")
    p.add_argument("--turns", type=int, default=0, metavar="N", help="load all engines at once and decode in N turns")
    p.add_argument("--folder", metavar="DIR", help="where the temporary files go (default: the system's choice)")
    p.add_argument("--output", metavar="FILE.json", help="where the readings go")
    p.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = p.parse_args(argv)
    engines = args.engines.split(",")
    if unknown := [e for e in engines if e not in ENGINES]:
        raise ConfigError(f"unknown engine {unknown[0]!r}; expected some of {', '.join(ENGINES)}")
    if (
        not 1 <= args.layers <= 24
        or args.vocab_size < 32
        or min(args.prompt, args.tokens, args.rounds) < 1
        or args.turns < 0
    ):
        raise ConfigError("expected 1 to 24 --layers, a --vocab-size of 32 or more, and positive counts")
    if args.turns and args.rounds > 1:
        raise ConfigError("--turns and --rounds are two ways of taking turns; give one of them")
    gguf = {rest: file for rest, file in (("bf16", args.gguf), ("q8_0", args.gguf_q8_0)) if file}
    if gguf and not args.checkpoint:
        raise ConfigError("--gguf and --gguf-q8-0 need the --checkpoint whose weights they hold")
    with tempfile.TemporaryDirectory(prefix="xmoe-decode-", dir=args.folder) as room:
        folder = Path(args.checkpoint or room)
        if not args.checkpoint:
            write_checkpoint(folder, args.layers, args.vocab_size)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        options = {n: getattr(args, n) for n in ("prompt", "tokens", "threads", "seconds", "turns")} | {"gguf": gguf}
        options |= {"vocab_size": config["vocab_size"], "context": args.prompt + args.tokens + 32}
        absent = {}
        for engine, rest in (("llama.cpp", "bf16"), ("llama.cpp q8_0", "q8_0")):
            if engine not in engines or rest in gguf:
                continue
            if not args.converter:
                absent[engine] = {"left_out": "no GGUF file: give --converter, --gguf or --gguf-q8-0"}
                continue
            gguf[rest] = str(Path(room, f"model-{rest}.gguf"))
            made = {"converter": args.converter, "gguf": gguf[rest], "rest": rest}
            if failed := _child(args.peer_python, "convert", folder, made).get("failed"):
                absent[engine] = {"failed": f"the converter: {failed}"}
        present = {e: _interpreter(e, args.peer_python) for e in engines if e not in absent}
        if args.turns:
            runs = _in_turns(present, folder, options)
        else:
            runs = {e: [] for e in present}
            for _ in range(args.rounds):
                for e, python in present.items():
                    runs[e].append(_child(python, e, folder, options))
        nbytes = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"processor": _processor(), "threads": args.threads, "python": platform.python_version()},
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "bytes": nbytes,
        "prompt": args.prompt,
        "rounds": args.rounds,
        "turns": args.turns,
        "readings": summaries({e: [absent[e]] if e in absent else runs[e] for e in engines}),
    }
    print(json.dumps(result) if args.json else table(result))
    if args.output:
        with new_file(args.output, args.overwrite) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any("failed" in r for r in result["readings"]) else 0


def _interpreter(engine: str, peer_python: str) -> str:
    return sys.executable if DISTRIBUTIONS[engine] == "xmoe" else peer_python


def _child(python: str, engine: str, folder: Path, options: dict) -> dict:
    """The JSON object that the child prints; {"failed": why} where it ends otherwise."""
    try:
        child = _start(python, engine, folder, options)
        printed, errors = child.communicate()
    except OSError as error:
        return {"failed": f"{python} does not run: {error.strerror}"}
    if child.returncode:
        return {"failed": _last_line(errors, child.returncode)}
    return json.loads(printed.splitlines()[-1]) if printed.strip() else {}


def _start(python: str, engine: str, folder: Path, options: dict) -> subprocess.Popen:
    return subprocess.Popen(
        [python, str(CHILD), engine, str(folder), json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"OMP_NUM_THREADS": str(options.get("threads", os.cpu_count()))},
    )


def _last_line(errors: str, code: int) -> str:
    return (errors.strip().splitlines() or [f"exit code {code}"])[-1][:300]


def _in_turns(present: dict[str, str], folder: Path, options: dict) -> dict[str, list[dict]]:
    """Engine -> a run for every turn, all engines loaded one after the other first; each run has its own decoding.

    Prompts are read by turns too, a few times in all; a run takes the readings of the last time.
    """
    children, opened, runs = {}, {}, {}
    try:
        for e, python in present.items():
            try:
                child = _start(python, e, folder, options)
            except OSError as error:
                runs[e] = [{"failed": f"{python} does not run: {error.strerror}"}]
                continue
            children[e] = child
            if (first := _answer(child)) is None:
                runs[e] = [{"failed": _last_line(child.stderr.read(), child.wait())}]
            elif "left_out" in first:
                runs[e] = [first]
            else:
                opened[e], runs[e] = first, []
        for turn in tqdm(range(options["turns"]), desc="turns", disable=None):
            if turn % (-(-options["turns"] // PREFILLS)) == 0:
                for e, first in opened.items():
                    if first["prefill_tokens"] == options["prompt"]:
                        first["prefill_seconds"] = _answer(children[e], "prefill") or first["prefill_seconds"]
            for e, first in opened.items():
                if (seconds := _answer(children[e], "decode")) is None:
                    runs[e] = [{"failed": _last_line(children[e].stderr.read(), children[e].wait())}]
                else:
                    runs[e].append(first | {"decode_seconds": seconds})
            opened = {e: first for e, first in opened.items() if "failed" not in runs[e][0]}
    finally:
        for child in children.values():
            child.kill()
            child.communicate()
    return runs


def _answer(child: subprocess.Popen, ask: str = "") -> dict | list | None:
    """What the child prints next, once asked; None where it has ended."""
    try:
        if ask:
            child.stdin.write(ask + "\n")
            child.stdin.flush()
    except OSError:
        return None
    line = child.stdout.readline()
    return json.loads(line) if line.strip() else None


def summaries(runs: dict[str, list[dict]]) -> list[dict]:
    """One reading an engine: medians over its runs in tokens a second, and how the first engine's compare with them.

    `logits_distance` is ||theirs - ours|| / ||ours|| behind the short prompt: engines that round differently stay within
    some percent of each other, another function would not.
    """
    readings, first = [], None
    for engine, its in runs.items():
        if bad := next((r for r in its if "failed" in r or "left_out" in r), None):
            readings.append({"engine": engine, **bad})
            continue
        answer = {"engine": engine} | {n: its[0][n] for n in ("version", "path", "prefill_tokens")}
        for what, count in (("decode", 1), ("prefill", its[0]["prefill_tokens"])):
            seconds = [s for r in its for s in r[f"{what}_seconds"]]
            answer[f"{what}_tokens_per_second"] = count / statistics.median(seconds)
            of_rounds = [count / statistics.median(r[f"{what}_seconds"]) for r in its]
            answer[f"{what}_tokens_per_second_of_rounds"] = of_rounds
        for what in ("load_seconds", "first_token_seconds"):
            answer[what] = min(r[what] for r in its)
        answer["peak_bytes"] = max(r["peak_bytes"] for r in its)
        if first is None:
            first, logits = answer, its[0]["logits"]
        else:
            for what in ("decode", "prefill"):
                mine, its_own = (r[f"{what}_tokens_per_second_of_rounds"] for r in (first, answer))
                answer[f"{what}_ratio"] = statistics.median(a / b for a, b in zip(mine, its_own, strict=True))
            answer["logits_distance"] = math.dist(its[0]["logits"], logits) / math.hypot(*logits)
        readings.append(answer)
    return readings


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(result: dict) -> str:
    """Readings as text; a ratio says how many times as fast the first engine is, by the median of the rounds."""
    first = next((r["engine"] for r in result["readings"] if "path" in r), "")
    lines = [
        f"{result['layers']} layers, width {result['hidden_size']}, vocabulary {result['vocab_size']}, "
        f"{result['bytes'] / 1e9:.2f} GB; {result['machine']['threads']} threads, "
        + (f"{result['turns']} turns" if result.get("turns") else f"{result['rounds']} rounds"),
        f"{'tokens/s':<24}{'decode':>9}{first + ' is':>10}{'prefill':>10}{first + ' is':>10}{'load s':>9}"
        f"{'first token s':>15}{'peak GB':>9}{'logits differ':>15}",
    ]
    for r in result["readings"]:
        if "path" not in r:
            why = f"left out: {r['left_out']}" if "left_out" in r else f"failed: {r['failed']}"
            lines.append(f"{r['engine']:<24} {why}")
            continue
        cells = [f"{r['engine']:<24}"]
        for what in ("decode", "prefill"):
            ratio = f"{r[f'{what}_ratio']:.2f}x" if f"{what}_ratio" in r else ""
            cells.append(f"{r[f'{what}_tokens_per_second']:>{9 if what == 'decode' else 10}.1f}{ratio:>10}")
        differ = f"{100 * r['logits_distance']:.1f} %" if "logits_distance" in r else ""
        cells.append(
            f"{r['load_seconds']:>9.2f}{r['first_token_seconds']:>15.2f}{r['peak_bytes'] / 1e9:>9.2f}{differ:>15}"
        )
        if r["prefill_tokens"] != result["prompt"]:
            cells.append(f"   prefill of {r['prefill_tokens']} only")
        lines.append("".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
