"""Time and peak memory of recording and pruning a checkpoint of true gpt-oss-20b shapes, beside a plain copy of its bytes.

    python benchmarks/prune.py --layers 3 --folder /tmp/prune-benchmark

The checkpoint has random weights, a few layers, and the published embedding, in shards of 0.9 GB (3 layers: 3.5 GB). Each
job runs in a fresh process, imports included; its peak is the resident memory the system reports for it.

Then what recording costs beside a plain forward pass of the same tokens (without logits, which recording does not compute
either): the two take turns, --rounds times, on that checkpoint with its experts packed and on a small dense model, and the
median of the ratios is told.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from xmoe import command

PRUNE = """
from xmoe.compression.cut import prune_checkpoint
from xmoe.compression.plan import PrunePlan
import sys
L = int(sys.argv[3])
kept = tuple(tuple(range(i % 2, 32, 2)) for i in range(L))
prune_checkpoint(sys.argv[1], PrunePlan("list", "uniform", (32,) * L, 4, kept=kept), sys.argv[2], overwrite=True)
"""
VERIFY = """
from xmoe.compression.verify import verify
import sys
assert verify(sys.argv[1], sys.argv[2]).ok
"""
RECORD = """
from xmoe.compression.routing import record_checkpoint
import sys, torch
record_checkpoint(sys.argv[1], list(torch.randint(0, 200000, (4, 1, 256))))
"""
OVERHEAD = """
import json, statistics, sys, time, torch
import xmoe
from xmoe.compression.routing import record_routing
from xmoe.model.config import preset

source, rounds, batch, length = sys.argv[1], *map(int, sys.argv[2:])
model = xmoe.build(preset("light", vocab_size=8192)) if source == "dense" else xmoe.load(source)[0]
model.eval()
tokens = list(torch.randint(0, model.config.vocab_size, (2, batch, length), generator=torch.Generator().manual_seed(0)))

@torch.no_grad()
def plain():
    for t in tokens:
        model.features(t)

def seconds(job):
    began = time.perf_counter()
    job()
    return time.perf_counter() - began

record = lambda: record_routing(model, tokens)
plain(), record()
pairs = []
for turn in range(rounds):  # who goes first changes with every turn
    first = seconds(record if turn % 2 else plain)
    second = seconds(plain if turn % 2 else record)
    pairs.append((second, first) if turn % 2 else (first, second))
print(json.dumps({
    "plain_seconds": statistics.median(p for p, _ in pairs), "record_seconds": statistics.median(r for _, r in pairs),
    "ratio": statistics.median(r / p for p, r in pairs), "rounds": rounds,
}))
"""
OVERHEADS = {
    "dense, small: 2 x 4 x 256 tokens": ("dense", 4, 256),
    "packed, true shapes: 2 x 512 tokens": ("source", 1, 512),
}


def make_checkpoint(folder: Path, layers: int) -> None:
    """Random bytes under the names and shapes of the published hf-mxfp4 layout."""
    import torch

    from xmoe.checkpoint.config_writing import config_text
    from xmoe.checkpoint.layouts import LAYOUTS, native_shapes, stored_shapes
    from xmoe.checkpoint.shard_writer import ShardWriter
    from xmoe.model.config import preset

    config, layout = preset("gpt_oss_20b", num_hidden_layers=layers), LAYOUTS["hf-mxfp4"]
    shapes = native_shapes(config)
    tensors = {}
    for rule in layout.rules(config):
        dtype = torch.uint8 if rule.kind == "packed" else torch.bfloat16
        tensors |= {n: (dtype, s) for n, s in stored_shapes(rule, config, shapes[rule.native]).items()}
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, tensors, max_shard_bytes=900_000_000) as writer:
        for name, (dtype, shape) in tensors.items():
            rows = max(1, (1 << 25) // math.prod(shape[1:]))
            for start in range(0, shape[0], rows):
                part = (min(rows, shape[0] - start), *shape[1:])
                if dtype == torch.bfloat16:
                    value = torch.ones(part) if "norm" in name else torch.randn(part, generator=generator) * 0.02
                else:
                    low, high = (112, 118) if name.endswith("_scales") else (0, 256)
                    value = torch.randint(low, high, part, generator=generator, dtype=torch.uint8)
                writer.append(name, value.to(dtype))
    (folder / "config.json").write_text(config_text(config, layout), encoding="utf-8")


def measured(words: list[str]) -> tuple[float, float]:
    """Seconds and peak megabytes of one process."""
    began = time.perf_counter()
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words[0]} failed")
    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return time.perf_counter() - began, usage.ru_maxrss * scale / 1e6


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__, "python benchmarks/prune.py --layers 3 --folder /tmp/prune-benchmark")
    p.add_argument(
        "--folder", default="prune-benchmark", metavar="DIR", help="where to work; the source stays for a next run"
    )
    p.add_argument(
        "--layers", type=int, default=3, metavar="N", help="0.49 GB each, and 2.3 GB of embeddings (default: 3)"
    )
    p.add_argument("--skip-record", action="store_true", help="copy, prune and verify only")
    p.add_argument(
        "--rounds", type=int, default=6, metavar="N", help="pairs of a plain and a recorded pass (default: 6; 0: none)"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args(argv)
    root = Path(args.folder)
    source = root / "source"
    if not source.exists():
        # In a process of its own: what this one has ever held would count as the peak of every job that it starts.
        child = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(source, args.layers))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit("the checkpoint could not be made")
    size = sum(f.stat().st_size for f in source.iterdir())
    found = {}
    try:
        for name, code, words in (
            ("copy", None, ["cp", "-r", str(source), str(root / "copy")]),
            ("prune 32 -> 16", PRUNE, [str(source), str(root / "pruned"), str(args.layers)]),
            ("verify", VERIFY, [str(source), str(root / "pruned")]),
            ("record 1,024 tokens", RECORD, [str(source)]),
        ):
            if code is RECORD and args.skip_record:
                continue
            found[name] = measured(words if code is None else [sys.executable, "-c", code, *words])
    finally:
        for made in ("copy", "pruned"):
            shutil.rmtree(root / made, ignore_errors=True)
    overheads = {}
    if args.rounds and not args.skip_record:
        for name, (which, batch, length) in OVERHEADS.items():
            words = [str(source) if which == "source" else which, str(args.rounds), str(batch), str(length)]
            child = subprocess.run([sys.executable, "-c", OVERHEAD, *words], stdout=subprocess.PIPE, check=True)
            overheads[name] = json.loads(child.stdout.splitlines()[-1])
    if args.json:
        jobs = {k: {"seconds": s, "peak_mb": m} for k, (s, m) in found.items()}
        print(json.dumps({"bytes": size, **jobs, "recording": overheads}))
    else:
        print(f"{size / 1e9:.2f} GB in {args.layers} layers of 32 experts\n| job | seconds | peak MB |\n|---|---|---|")
        for name, (seconds, peak) in found.items():
            print(f"| {name} | {seconds:.1f} | {peak:.0f} |")
        if overheads:
            print("\n| recording | plain forward, s | recorded, s | ratio |\n|---|---|---|---|")
        for name, o in overheads.items():
            print(f"| {name} | {o['plain_seconds']:.2f} | {o['record_seconds']:.2f} | {o['ratio']:.3f} |")
    return 0


if __name__ == "__main__":
    command.run(main)
