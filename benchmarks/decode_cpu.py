"""Tokens a second on the CPU at true GPT-OSS-20B width with packed experts: the C kernels beside portable PyTorch.

A random checkpoint of a few layers and a small vocabulary is written to a temporary folder (deleted afterwards) and read
by each engine in a process of its own: a prompt of --prompt tokens at once, then --tokens one at a time behind a prompt
of 16. Engines take turns, --rounds times; the median and the best of all rounds are told, since other work on the
machine slows single runs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load import write_checkpoint

from xmoe import command
from xmoe.errors import ConfigError
from xmoe.outputs import new_file

EXAMPLE = "python benchmarks/decode_cpu.py --layers 4 --output benchmarks/results/decode_cpu.json"
ENGINES = ("xmoe", "xmoe portable")


def main(argv: list[str] | None = None) -> int:
    """Exit 1 where an engine could not be measured."""
    p = command.parser(__doc__.splitlines()[0], EXAMPLE)
    p.add_argument("--layers", type=int, default=4, metavar="N", help="of 24 (default: 4; 0.5 GB each)")
    p.add_argument("--vocab-size", type=int, default=16384, metavar="N", help="default: 16384; the true one is 201088")
    p.add_argument("--engines", default=",".join(ENGINES), metavar="NAME,...", help=f"default: {','.join(ENGINES)}")
    p.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the long prompt (default: 512)")
    p.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens decoded one at a time (default: 32)")
    p.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="times that every engine has its turn (default: 1)"
    )
    p.add_argument("--folder", metavar="DIR", help="where the temporary checkpoint goes (default: the system's choice)")
    p.add_argument("--output", metavar="FILE.json", help="where the readings go")
    p.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.add_argument("--measure", nargs=2, metavar=("ENGINE", "FOLDER"), help="one engine, as the child of a run")
    args = p.parse_args(argv)
    if args.measure:
        return _measure(*args.measure, args.prompt, args.tokens)
    engines = args.engines.split(",")
    if unknown := [e for e in engines if e not in ENGINES]:
        raise ConfigError(f"unknown engine {unknown[0]!r}; expected some of {', '.join(ENGINES)}")
    if not 1 <= args.layers <= 24 or args.vocab_size < 10_000 or min(args.prompt, args.tokens, args.rounds) < 1:
        raise ConfigError("expected 1 to 24 --layers, a --vocab-size of 10,000 or more, and positive counts")
    with tempfile.TemporaryDirectory(prefix="xmoe-decode-", dir=args.folder) as folder:
        nbytes = write_checkpoint(Path(folder), args.layers, args.vocab_size)
        runs = [_child(e, folder, args.prompt, args.tokens) for _ in range(args.rounds) for e in engines]
    result = {
        "layers": args.layers,
        "vocab_size": args.vocab_size,
        "bytes": nbytes,
        "prompt": args.prompt,
        "readings": [_summary(e, [r for r in runs if r["engine"] == e]) for e in engines],
    }
    print(json.dumps(result) if args.json else table(result))
    if args.output:
        with new_file(args.output, args.overwrite) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any("failed" in r for r in result["readings"]) else 0


def _child(engine: str, folder: str, prompt: int, tokens: int) -> dict:
    counts = ["--prompt", str(prompt), "--tokens", str(tokens)]
    child = subprocess.run(
        [sys.executable, __file__, "--measure", engine, folder, *counts], capture_output=True, text=True, check=False
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        return {"engine": engine, "failed": last[:300]}
    return {"engine": engine, **json.loads(child.stdout.splitlines()[-1])}


def _summary(engine: str, runs: list[dict]) -> dict:
    """Medians and bests over an engine's runs, in tokens a second."""
    if failed := [r for r in runs if "failed" in r]:
        return failed[0]
    answer = {"engine": engine, "threads": runs[0]["threads"], "path": runs[0]["path"]}
    for what, count in (("prefill", runs[0]["prompt"]), ("decode", 1)):
        seconds = [s for r in runs for s in r[f"{what}_seconds"]]
        answer[f"{what}_tokens_per_second"] = count / statistics.median(seconds)
        answer[f"{what}_tokens_per_second_best"] = count / min(seconds)
    return answer


def _measure(engine: str, folder: str, prompt: int, tokens: int) -> int:
    """Child: load, warm up, time each step."""
    import contextlib

    import torch

    import xmoe
    from xmoe.generation.cache import KVCache
    from xmoe.kernels import dispatch

    model = xmoe.load(folder)[0]
    forced = dispatch.use("portable") if engine.endswith("portable") else contextlib.nullcontext()

    def new_cache():
        return KVCache(model.config, reserve=prompt + tokens + 16)

    def step(ids, cache):
        return model.unembed(model.features(ids, cache).hidden[:, -1:])

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 10_000, (1, prompt), generator=generator)
    prefill, decoding = [], []
    with torch.inference_mode(), forced:
        path = dispatch.describe("cpu", torch.bfloat16)
        for _ in range(3):
            start = time.perf_counter()
            step(ids, new_cache())
            prefill.append(time.perf_counter() - start)
        cache = new_cache()
        token = step(ids[:, :16], cache)[:, -1].argmax(-1, keepdim=True)
        for _ in range(tokens + 4):
            start = time.perf_counter()
            token = step(token, cache)[:, -1].argmax(-1, keepdim=True)
            decoding.append(time.perf_counter() - start)
    reading = {"prompt": prompt, "prefill_seconds": prefill[1:], "decode_seconds": decoding[4:]}  # the first warm up
    print(json.dumps({**reading, "threads": torch.get_num_threads(), "path": path}))
    return 0


def table(result: dict) -> str:
    """Readings as text."""
    heading = f"prefill of {result['prompt']}"
    lines = [
        f"{result['layers']} layers of gpt-oss-20b's width, vocabulary {result['vocab_size']}; tokens/s, median (best)",
        f"{'':<16}{'decode':>18}{heading:>22}",
    ]
    for r in result["readings"]:
        if "failed" in r:
            lines.append(f"{r['engine']:<16} not measured: {r['failed']}")
            continue
        pairs = [(r[f"{w}_tokens_per_second"], r[f"{w}_tokens_per_second_best"]) for w in ("decode", "prefill")]
        decode, prefill = (f"{median:.1f} ({best:.1f})" for median, best in pairs)
        lines.append(f"{r['engine']:<16}{decode:>18}{prefill:>22}")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
