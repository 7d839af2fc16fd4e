"""One training step on the CPU, xmoe beside transformers' GptOssForCausalLM: seconds, model FLOP/s, peak memory.

Every contestant runs in a process of its own, so that its peak memory is its own, and trains the same weights on the
same batches with the same optimizer (torch's fused AdamW, fp32 master weights). xmoe and one peer after the other
alternate round by round, so that a busy machine harms both alike; a ratio compares the medians of such a pair.

    python benchmarks/train_step.py --config S                      # all peers, bf16 autocast
    python benchmarks/train_step.py --config L --only grouped_mm,grouped_mm+compile
    python benchmarks/train_step.py --config S --dtype float32 --json
    python benchmarks/train_step.py --config S --parity 200         # loss in bf16 beside fp32 instead of speed
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from xmoe import command
from xmoe.errors import ConfigError
from xmoe.kernels import dispatch
from xmoe.model.config import ModelConfig
from xmoe.model.transformer import Transformer, build

_SHARED = {"num_experts_per_tok": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
CONFIGS = {
    "S": ModelConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=6, num_experts=8, intermediate_size=512, **_SHARED
    ),
    "L": ModelConfig(
        vocab_size=32000, hidden_size=512, num_hidden_layers=12, num_experts=16, intermediate_size=512, **_SHARED
    ),
}
BATCH, SEQUENCE, LEARNING_RATE = 4, 512, 3e-4
OURS = "xmoe"
NUDGED = "nudged"  # this code from weights a tenth of a percent away: how far two equally good runs part
CONTESTANTS = {  # name: what it is
    OURS: "this code as installed",
    "portable": "this code without its C kernels",
    "eager": "transformers, experts_implementation eager",
    "grouped_mm": "transformers, experts_implementation grouped_mm",
    "batched_mm": "transformers, experts_implementation batched_mm",
    "eager+compile": "the same under torch.compile",
    "grouped_mm+compile": "the same under torch.compile",
    "batched_mm+compile": "the same under torch.compile",
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def flops_per_step(config: ModelConfig) -> float:
    """Model FLOPs of a step: 3 x the forward pass's matrix products, attention counted over visible keys only."""
    c, D, S = config, config.hidden_size, SEQUENCE
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    weights = D * heads + c.num_attention_heads * c.head_dim * D
    weights += c.num_experts_per_tok * 3 * D * c.intermediate_size + D * c.experts_in_layer(0)
    seen = sum(sum(min(i + 1, c.window(layer) or S) for i in range(S)) / S for layer in range(c.num_hidden_layers))
    forward = 2 * (c.num_hidden_layers * weights + D * c.vocab_size) + 4 * c.num_attention_heads * c.head_dim * seen
    return 3.0 * forward * BATCH * SEQUENCE


# ------------------------------------------------------------------------------------------------ contestants


def text_batches(config: ModelConfig, seed: int) -> Callable[[], Tensor]:
    """Batches of bytes from the source of Python's standard library, so that there is something to learn."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    data = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)

    def batch() -> Tensor:
        starts = torch.randint(0, len(data) - SEQUENCE, (BATCH,), generator=generator).tolist()
        return torch.stack([data[s : s + SEQUENCE] for s in starts])

    return batch


def random_batches(config: ModelConfig, seed: int) -> Callable[[], Tensor]:
    """Batches of random tokens of the whole vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randint(0, config.vocab_size, (BATCH, SEQUENCE), generator=generator)


def our_loss(model: Transformer, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the next token."""
    hidden = model.features(tokens).hidden[:, :-1].flatten(0, 1)
    return dispatch.linear_cross_entropy(hidden, model.unembedding, tokens[:, 1:].flatten())


def their_model(config: ModelConfig, ours: Transformer, implementation: str):
    """transformers' GptOssForCausalLM with the weights of `ours`."""
    from transformers import GptOssConfig, GptOssForCausalLM

    theirs = GptOssConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_local_experts=config.experts_in_layer(0),
        num_experts_per_tok=config.num_experts_per_tok,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        sliding_window=config.sliding_window,
        layer_types=[
            "full_attention" if config.window(i) is None else "sliding_attention"
            for i in range(config.num_hidden_layers)
        ],
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_eps,
        use_cache=False,
    )
    theirs._attn_implementation, theirs._experts_implementation = "eager", implementation
    model = GptOssForCausalLM(theirs).train()
    H, G, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    state = {
        "model.embed_tokens.weight": ours.embed.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.unembedding,
    }
    for i, block in enumerate(ours.blocks):
        at, attn, moe = f"model.layers.{i}.", block.attn, block.moe
        for part in ("weight", "bias"):
            q, k, v = getattr(attn.qkv, part).split([H * Dh, G * Dh, G * Dh])
            state |= {at + f"self_attn.{n}_proj.{part}": t for n, t in (("q", q), ("k", k), ("v", v))}
            state[at + f"self_attn.o_proj.{part}"] = getattr(attn.out, part)
            state[at + f"mlp.router.{part}"] = getattr(moe.router, part)
        state[at + "self_attn.sinks"] = attn.sinks
        state[at + "input_layernorm.weight"] = block.attn_norm.weight
        state[at + "post_attention_layernorm.weight"] = block.moe_norm.weight
        state[at + "mlp.experts.gate_up_proj"] = moe.experts.gate_up.transpose(1, 2)
        state[at + "mlp.experts.gate_up_proj_bias"] = moe.experts.gate_up_bias
        state[at + "mlp.experts.down_proj"] = moe.experts.down.transpose(1, 2)
        state[at + "mlp.experts.down_proj_bias"] = moe.experts.down_bias
    model.load_state_dict(state)
    return model


def contestant(name: str, config: ModelConfig) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    """The model of a contestant and its loss as a function of tokens."""
    ours = build(config, seed=0)
    if name == NUDGED:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in ours.parameters():
                p.mul_(1 + 1e-3 * torch.randn(p.shape, generator=generator))
    if name in (OURS, NUDGED):
        return ours, lambda tokens: our_loss(ours, tokens)
    if name == "portable":

        def portable(tokens: Tensor) -> Tensor:
            with dispatch.use("portable"):
                return our_loss(ours, tokens)

        return ours, portable
    implementation, _, compiled = name.partition("+")
    theirs = their_model(config, ours, implementation)
    called = torch.compile(theirs) if compiled else theirs
    return theirs, lambda tokens: called(input_ids=tokens, labels=tokens, use_cache=False).loss


def work(name: str, config: ModelConfig, dtype: torch.dtype, text: bool, memory_gb: float, batches: int = 1) -> None:
    """A contestant's process: reads "steps N" lines, trains so many steps, answers with a line of JSON."""
    limit = int(memory_gb * 2**30) + ((8 << 30) if "compile" in name else 0)  # compiling maps much that it never fills
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    model, loss_of = contestant(name, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    batch = (text_batches if text else random_batches)(config, seed=batches)
    for line in sys.stdin:
        seconds, losses = [], []
        for _ in range(int(line)):
            tokens = batch()
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_of(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        print("answer " + json.dumps({"seconds": seconds, "losses": losses, "peak_gb": peak}), flush=True)


class Process:
    """A contestant at work in a process of its own."""

    def __init__(self, name: str, arguments: argparse.Namespace, dtype: str, text: bool):
        command_line = [sys.executable, __file__, "--config", arguments.config, "--dtype", dtype, "--worker", name]
        command_line += ["--memory-gb", str(arguments.memory_gb), "--batches", str(arguments.batches)]
        command_line += ["--text"] if text else []
        self.name, self._memory_gb = name, arguments.memory_gb
        self._process = subprocess.Popen(
            command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.first = 0.0
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_gb = 0.0

    def steps(self, count: int) -> list[float]:
        """Train so many steps; their seconds. Raises RuntimeError with the last line of what went wrong."""
        try:
            self._process.stdin.write(f"{count}\n")
            self._process.stdin.flush()
            line = next((x for x in self._process.stdout if x.startswith("answer ")), None)
        except BrokenPipeError:
            line = None
        if line is None:
            printed = self._process.stderr.read().strip().splitlines() or [f"exit {self._process.wait()}"]
            starved = any(sign in printed[-1] for sign in ("allocate memory", "bad_alloc", "MemoryError"))
            raise RuntimeError(f"needs more than {self._memory_gb:g} GB" if starved else printed[-1][:160])
        answer = json.loads(line.removeprefix("answer "))
        self.peak_gb = answer["peak_gb"]
        self.losses += answer["losses"]
        return answer["seconds"]

    def warm_up(self, count: int) -> None:
        """First steps, which allocate and perhaps compile; the first one's time is kept."""
        self.first = self.steps(count)[0]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


# ------------------------------------------------------------------------------------------------ the runs


def compare(arguments: argparse.Namespace, names: list[str]) -> list[dict]:
    """A row of figures for xmoe and for each contestant, each measured in turns with xmoe."""
    work_per_step = flops_per_step(CONFIGS[arguments.config])
    ours = Process(OURS, arguments, arguments.dtype, text=False)
    ours.warm_up(2)
    rows = []
    try:
        for name in [n for n in names if n != OURS]:
            peer = Process(name, arguments, arguments.dtype, text=False)
            try:
                peer.warm_up(2)
                mine, its = [], []
                for _ in range(arguments.rounds):
                    mine += ours.steps(arguments.steps)
                    its += peer.steps(arguments.steps)
            except RuntimeError as error:
                rows.append({"name": name, "error": str(error)})
                continue
            finally:
                peer.close()
            ours.seconds += mine
            rows.append(_row(peer, its, work_per_step, statistics.median(its) / statistics.median(mine)))
        own = ours.seconds or ours.steps(arguments.rounds * arguments.steps)
        return [_row(ours, own, work_per_step, 1.0), *rows]
    finally:
        ours.close()


def _row(process: Process, seconds: list[float], work_per_step: float, ratio: float) -> dict:
    median = statistics.median(seconds)
    return {
        "name": process.name,
        "step_seconds": round(median, 4),
        "xmoe_is_faster_by": round(ratio, 3),
        "gflops": round(work_per_step / median / 1e9, 1),
        "tokens_per_second": round(BATCH * SEQUENCE / median),
        "peak_gb": round(process.peak_gb, 3),
        "first_step_seconds": round(process.first, 2),
        "loss_after_2_steps": round(process.losses[1], 4),
    }


def parity(arguments: argparse.Namespace) -> dict:
    """Loss of the same run on text in bf16 (fp32 masters) and in fp32.

    Training amplifies any rounding, so two exact codes part as well. Two yardsticks say how far: fp32 from weights moved
    by a tenth of a percent, and the portable path in bf16, which rounds at other places than the C kernels.
    """
    runs = {
        "bfloat16": (OURS, "bfloat16"),
        "float32": (OURS, "float32"),
        "float32_nudged": (NUDGED, "float32"),
        "portable_bfloat16": ("portable", "bfloat16"),
    }
    curves = {}
    for label, (name, dtype) in runs.items():
        process = Process(name, arguments, dtype, text=True)
        try:
            while (
                len(process.losses) < arguments.parity
            ):  # in small turns: a worker ends at its next one if we are killed
                process.steps(min(10, arguments.parity - len(process.losses)))
            curves[label] = process.losses
        finally:
            process.close()
    tail = max(1, arguments.parity // 4)
    ends = {label: statistics.mean(curve[-tail:]) for label, curve in curves.items()}
    return {
        "steps": arguments.parity,
        "mean_loss_of_last_quarter": {label: round(x, 4) for label, x in ends.items()},
        "bfloat16_minus_float32": round(ends["bfloat16"] - ends["float32"], 4),
        "float32_nudged_minus_float32": round(ends["float32_nudged"] - ends["float32"], 4),
        "portable_bfloat16_minus_float32": round(ends["portable_bfloat16"] - ends["float32"], 4),
    }


def table(rows: list[dict]) -> str:
    """The figures for a terminal."""
    lines = [f"{'':20}{'s/step':>8}{'xmoe is':>10}{'GFLOP/s':>9}{'peak GB':>9}{'memory':>8}{'first':>8}{'loss':>9}"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['name']:20}{row['error']}")
            continue
        share = rows[0]["peak_gb"] / row["peak_gb"]
        lines.append(
            f"{row['name']:20}{row['step_seconds']:8.3f}{row['xmoe_is_faster_by']:9.2f}x{row['gflops']:9.0f}"
            f"{row['peak_gb']:9.2f}{share:7.2f}x{row['first_step_seconds']:7.1f}s{row['loss_after_2_steps']:9.4f}"
        )
    lines.append("memory: xmoe's peak over this one's; first: seconds of the first step, compilation included")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__, "python benchmarks/train_step.py --config S --only grouped_mm,grouped_mm+compile")
    p.add_argument("--config", choices=sorted(CONFIGS), default="S", help="model size (default: S)")
    p.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="bfloat16 is autocast (default)")
    p.add_argument(
        "--only", default="", metavar="NAME,...", help=f"contestants beside {OURS}: {', '.join(CONTESTANTS)}"
    )
    p.add_argument("--rounds", type=int, default=3, help="turns of each pair (default: 3)")
    p.add_argument("--steps", type=int, default=2, help="steps a turn (default: 2)")
    p.add_argument("--memory-gb", type=float, default=21.0, help="address space of a contestant (default: 21)")
    p.add_argument("--parity", type=int, default=0, metavar="STEPS", help="compare losses in bf16 and fp32 instead")
    p.add_argument("--batches", type=int, default=1, metavar="SEED", help="which batches are drawn (default: 1)")
    p.add_argument("--json", action="store_true", help="print one JSON object on standard output and nothing else")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    p.add_argument("--text", action="store_true", help=argparse.SUPPRESS)
    arguments = p.parse_args(argv)
    if arguments.worker:
        work(
            arguments.worker,
            CONFIGS[arguments.config],
            DTYPES[arguments.dtype],
            arguments.text,
            arguments.memory_gb,
            arguments.batches,
        )
        return 0
    if arguments.parity:
        result = parity(arguments)
        print(json.dumps(result) if arguments.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
        return 0
    names = [n for n in arguments.only.split(",") if n] or list(CONTESTANTS)
    if unknown := [n for n in names if n not in CONTESTANTS]:
        raise ConfigError(f"unknown contestant {', '.join(unknown)}; expected some of {', '.join(CONTESTANTS)}")
    rows = compare(arguments, names)
    about = {
        "config": arguments.config,
        "dtype": arguments.dtype,
        "batch": [BATCH, SEQUENCE],
        "threads": torch.get_num_threads(),
        "kernels": dispatch.describe("cpu", DTYPES[arguments.dtype]),
        "torch": torch.__version__,
    }
    if arguments.json:
        print(json.dumps({**about, "rows": rows}))
    else:
        print(", ".join(f"{k} {v}" for k, v in about.items()), table(rows), sep="\n")
    return 0


if __name__ == "__main__":
    command.run(main)
