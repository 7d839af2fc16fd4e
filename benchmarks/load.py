"""Time and peak memory from a checkpoint folder to the first token, ours beside transformers.

A random checkpoint of true GPT-OSS-20B tensor shapes with a few layers is written to a temporary folder (deleted
afterwards), brought into the page cache, and opened by each engine in a process of its own, so that its peak memory is
its own. Imports do not count as loading; they do count as memory. Peak memory is the high-water mark of the resident
set, mapped file pages included, and is compared with the bytes of the weights.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from decode_cpu_engines import peak_bytes

from xmoe import command
from xmoe.errors import ConfigError
from xmoe.outputs import new_file

EXAMPLE = "python benchmarks/load.py --layers 3 --output benchmarks/results/load.json"
ENGINES = ("xmoe packed", "xmoe huge pages", "xmoe dense", "transformers")
PROMPT = [1, 22, 333, 4444, 5, 66, 777, 8888]


def main(argv: list[str] | None = None) -> int:
    """Exit 1 where an engine could not be measured."""
    p = command.parser(__doc__.splitlines()[0], EXAMPLE)
    p.add_argument("--layers", type=int, default=3, metavar="N", help="of 24 (default: 3; 0.48 GB each)")
    p.add_argument("--vocab-size", type=int, default=201088, metavar="N", help="default: 201088, the true one (2.3 GB)")
    p.add_argument("--checkpoint", metavar="DIR", help="a checkpoint to load instead of a random one (hf-mxfp4)")
    p.add_argument("--engines", default=",".join(ENGINES), metavar="NAME,...", help=f"default: {','.join(ENGINES)}")
    p.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="runs of each of ours; the peer runs once (default: 3)"
    )
    p.add_argument("--folder", metavar="DIR", help="where the temporary checkpoint goes (default: the system's choice)")
    p.add_argument("--output", metavar="FILE.json", help="where the readings go")
    p.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.add_argument("--measure", nargs=2, metavar=("ENGINE", "FOLDER"), help="one engine, as the child of a run")
    args = p.parse_args(argv)
    if args.measure:
        return _measure(args.measure[0], Path(args.measure[1]))
    engines = args.engines.split(",")
    if unknown := [e for e in engines if e not in ENGINES]:
        raise ConfigError(f"unknown engine {unknown[0]!r}; expected some of {', '.join(ENGINES)}")
    if not 1 <= args.layers <= 24 or args.vocab_size < 10_000 or args.repeat < 1:
        raise ConfigError("expected 1 to 24 --layers, a --vocab-size of 10,000 or more and a --repeat of at least 1")
    with tempfile.TemporaryDirectory(prefix="xmoe-load-", dir=args.folder) as room:
        folder = Path(args.checkpoint or room)
        nbytes = _bytes(folder) if args.checkpoint else write_checkpoint(folder, args.layers, args.vocab_size)
        readings = [_best(engine, folder, nbytes, args.repeat) for engine in engines]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "bytes": nbytes,
        "readings": readings,
    }
    print(json.dumps(result) if args.json else table(result))
    if args.output:
        with new_file(args.output, args.overwrite) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any("seconds_to_load" not in r for r in readings) else 0


def write_checkpoint(folder: Path, layers: int, vocab_size: int) -> int:
    """A random hf-mxfp4 checkpoint of 20B's tensor shapes; returns the bytes of its tensors."""
    import torch

    from xmoe.checkpoint.config_writing import config_text
    from xmoe.checkpoint.layouts import LAYOUTS, native_shapes, stored_shapes
    from xmoe.checkpoint.shard_writer import ShardWriter
    from xmoe.model.config import preset

    config, layout = preset("gpt_oss_20b", num_hidden_layers=layers, vocab_size=vocab_size), LAYOUTS["hf-mxfp4"]
    shapes = native_shapes(config)
    tensors = {}
    for rule in layout.rules(config):
        dtype = torch.uint8 if rule.kind == "packed" else torch.bfloat16
        tensors |= {n: (dtype, s) for n, s in stored_shapes(rule, config, shapes[rule.native]).items()}
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, tensors, max_shard_bytes=2_000_000_000) as writer:
        for name, (dtype, shape) in tensors.items():
            rows, width = shape[0], shape[1:]
            step = max(1, (64 << 20) // max(torch.Size(width).numel(), 1)) if width else rows
            for start in range(0, rows, step):
                part = (min(step, rows - start), *width)
                if name.endswith("_blocks"):
                    piece = torch.randint(0, 256, part, dtype=dtype, generator=generator)
                elif name.endswith("_scales"):  # 0.02 wide, as initialised weights are
                    piece = torch.randint(119, 122, part, dtype=dtype, generator=generator)
                elif "norm" in name:
                    piece = torch.ones(part, dtype=dtype)
                else:
                    piece = torch.empty(part, dtype=dtype).normal_(std=0.02, generator=generator)
                writer.append(name, piece)
        total = writer.total_bytes
    (folder / "config.json").write_text(config_text(config, layout), encoding="utf-8")
    return total


def _bytes(folder: Path) -> int:
    from xmoe.checkpoint.opened import Checkpoint

    return Checkpoint(folder).reader.total_bytes


def _best(engine: str, folder: Path, nbytes: int, repeat: int) -> dict:
    """The run that loaded fastest, with the largest peak of all runs and the seconds of each."""
    runs = []
    for _ in range(repeat if engine.startswith("xmoe") else 1):
        for file in folder.glob("*.safetensors"):  # a warm page cache, for everyone alike
            with open(file, "rb", buffering=0) as f:
                while f.read(64 << 20):
                    pass
        child = subprocess.run(
            [sys.executable, __file__, "--measure", engine, str(folder)], capture_output=True, text=True, check=False
        )
        if child.returncode:
            last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
            return {"engine": engine, "failed": last[:300]}
        runs.append(json.loads(child.stdout.splitlines()[-1]))
    best = min(runs, key=lambda r: r["seconds_to_load"])
    best["peak_bytes"] = max(r["peak_bytes"] for r in runs)
    best["seconds_to_load_of_runs"] = [r["seconds_to_load"] for r in runs]
    return {"engine": engine, **best, "peak_over_weights": best["peak_bytes"] / nbytes, "runs": len(runs)}


def _measure(engine: str, folder: Path) -> int:
    """Child: load, run one prompt, report."""
    import torch

    if engine == "transformers":
        from transformers import AutoModelForCausalLM, Mxfp4Config

        def load():
            decode = Mxfp4Config(dequantize=True)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=decode)
    else:
        import xmoe
        from xmoe.model import transformer  # noqa: F401  imports are no part of loading

        load_ours = xmoe.load

        def load():
            experts = "dense" if engine.endswith("dense") else "mxfp4"
            return load_ours(folder, experts=experts, huge_pages=engine.endswith("huge pages"))[0]

    tokens = torch.tensor([PROMPT])
    imported = peak_bytes()
    start = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    after_load = peak_bytes()
    with torch.no_grad():
        token = int(model(tokens).logits[0, -1].argmax())
    done = time.perf_counter()
    print(
        json.dumps(
            {
                "seconds_to_load": loaded - start,
                "seconds_to_first_token": done - start,
                "peak_bytes": peak_bytes(),
                "peak_bytes_after_load": after_load,
                "peak_bytes_imports": imported,
                "first_token": token,
                "threads": torch.get_num_threads(),
            }
        )
    )
    sys.stdout.flush()
    os._exit(0)  # tearing gigabytes down is nobody's interest


def table(result: dict) -> str:
    """Readings as text."""
    lines = [
        f"{result['layers']} layers of gpt-oss-20b, {result['bytes'] / 1e9:.2f} GB, page cache warm",
        f"{'':<16}{'load s':>9}{'first token s':>15}{'peak GB':>10}{'peak/weights':>14}",
    ]
    for r in result["readings"]:
        if "failed" in r:
            lines.append(f"{r['engine']:<16} not measured: {r['failed']}")
            continue
        lines.append(
            f"{r['engine']:<16}{r['seconds_to_load']:>9.2f}{r['seconds_to_first_token']:>15.2f}"
            f"{r['peak_bytes'] / 1e9:>10.2f}{r['peak_over_weights']:>14.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
