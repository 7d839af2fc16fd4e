"""Peak memory and tokens a second of training adapters beside packed experts, at gpt-oss-20b's true layer shapes.

A random checkpoint of a few layers is written to a temporary folder (deleted afterwards). Each reading is a process of
its own that opens it, adds adapters, and trains for some steps on random tokens in bf16; its peak is the high-water mark
of its resident set, mapped file pages and the interpreter included. "forward only" is the same batch without gradients
through the same model without adapters.
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

EXAMPLE = "python benchmarks/lora.py --layers 4 --output benchmarks/results/lora_cpu.json"
KINDS = ("train", "train, recomputing", "forward only")


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__.splitlines()[0], EXAMPLE)
    p.add_argument("--layers", type=int, default=4, metavar="N", help="of 24 (default: 4; 0.48 GB each)")
    p.add_argument("--vocab-size", type=int, default=16384, metavar="N", help="default: 16384; the true one is 201088")
    p.add_argument("--tokens", type=int, default=512, metavar="N", help="tokens of a step, one row (default: 512)")
    p.add_argument("--steps", type=int, default=3, metavar="N", help="timed steps behind one to warm up (default: 3)")
    p.add_argument("--attention", type=int, default=16, metavar="R", help="rank (default: 16)")
    p.add_argument("--experts", type=int, default=8, metavar="R", help="rank (default: 8)")
    p.add_argument("--folder", metavar="DIR", help="where the temporary checkpoint goes (default: the system's choice)")
    p.add_argument("--output", metavar="FILE.json", help="where the readings go")
    p.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.add_argument("--measure", nargs=2, metavar=("KIND", "FOLDER"), help="one reading, as the child of a run")
    args = p.parse_args(argv)
    if args.measure:
        return _measure(args, *args.measure)
    if not 1 <= args.layers <= 24 or args.vocab_size < 10_000 or min(args.tokens, args.steps) < 1:
        raise ConfigError("expected 1 to 24 --layers, a --vocab-size of 10,000 or more, and positive counts")
    with tempfile.TemporaryDirectory(prefix="xmoe-lora-", dir=args.folder) as folder:
        nbytes = write_checkpoint(Path(folder), args.layers, args.vocab_size)
        readings = [_child(args, kind, folder) for kind in KINDS]
    result = {
        "layers": args.layers, "vocab_size": args.vocab_size, "tokens": args.tokens, "bytes": nbytes,
        "rank": {"attention": args.attention, "experts": args.experts}, "readings": readings,
    }  # fmt: skip
    print(json.dumps(result) if args.json else table(result))
    if args.output:
        with new_file(args.output, args.overwrite) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _child(args, kind: str, folder: str) -> dict:
    flags = [f"--{n}={getattr(args, n)}" for n in ("tokens", "steps", "attention", "experts")]
    words = [sys.executable, __file__, "--measure", kind, folder, *flags]
    child = subprocess.run(words, capture_output=True, text=True, check=False)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise SystemExit(f"{kind}: {last[:300]}")
    return {"kind": kind, **json.loads(child.stdout.splitlines()[-1])}


def _measure(args, kind: str, folder: str) -> int:
    """Child: load, train or run, tell time and memory."""
    import torch

    import xmoe
    from xmoe.device import peak_memory
    from xmoe.kernels import dispatch
    from xmoe.training.adapters import LoRAConfig, add_adapters
    from xmoe.training.optim import OptimConfig, Optimizer

    model, _ = xmoe.load(folder)
    trains, parameters = kind.startswith("train"), 0
    if trains:
        add_adapters(model, LoRAConfig(rank={"attention": args.attention, "experts": args.experts}))
        optimizer = Optimizer(model.train(), OptimConfig(name="adamw", lr=1e-4, weight_decay=0.0), args.steps + 1)
        parameters = sum(p.numel() for p in optimizer.parameters)
        model.recompute = kind.endswith("recomputing")
    tokens = torch.randint(0, 10_000, (1, args.tokens + 1), generator=torch.Generator().manual_seed(0))
    seconds, losses = [], []
    for step in range(args.steps + 1):
        began = time.perf_counter()
        with torch.set_grad_enabled(trains), torch.autocast("cpu", torch.bfloat16):
            hidden = model.features(tokens[:, :-1]).hidden
            loss = dispatch.linear_cross_entropy(hidden[0], model.unembedding, tokens[0, 1:])
        if trains:
            loss.backward()
            optimizer.step(step)
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
    reading = {
        "trained_parameters": parameters,
        "peak_bytes": peak_memory(torch.device("cpu")),
        "tokens_per_second": args.tokens / statistics.median(seconds[1:]),
        "losses": losses,
        "threads": torch.get_num_threads(),
        "path": dispatch.describe("cpu", torch.bfloat16),
    }
    print(json.dumps(reading))
    return 0


def table(result: dict) -> str:
    """Readings as text."""
    GB = 1e9
    lines = [
        f"{result['layers']} layers of gpt-oss-20b's shapes, vocabulary {result['vocab_size']}, {result['tokens']} tokens a "
        f"step, rank {result['rank']}; the checkpoint has {result['bytes'] / GB:.2f} GB",
        f"{'':<20}{'trained':>12}{'peak GB':>10}{'peak / checkpoint':>20}{'tokens/s':>10}",
    ]
    for r in result["readings"]:
        lines.append(
            f"{r['kind']:<20}{r['trained_parameters'] / 1e6:>10.1f} M{r['peak_bytes'] / GB:>10.2f}"
            f"{r['peak_bytes'] / result['bytes']:>20.2f}{r['tokens_per_second']:>10.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
