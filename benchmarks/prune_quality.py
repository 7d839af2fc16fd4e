"""What each criterion costs: small byte models trained here, pruned by every criterion, and their routers recovered.

    python benchmarks/prune_quality.py --data tinyshakespeare.txt --seeds 0,1,2 --output quality.json

A model has 3 layers of 16 experts, 2 a token, width 64, and is trained for some 600 steps on nine tenths of the text;
routing is recorded on that part, perplexity is measured on the rest. Prints a table of mean and standard error over seeds.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from xmoe import command
from xmoe.compression.apply import mask, prune
from xmoe.compression.plan import plan_pruning
from xmoe.compression.recover import recover
from xmoe.compression.routing import record_routing
from xmoe.model.config import ModelConfig
from xmoe.model.perplexity import mean_loss, perplexity
from xmoe.model.router import load_balancing_loss
from xmoe.model.transformer import build

CONFIG = ModelConfig(
    vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, num_experts=16, num_experts_per_tok=2, sliding_window=64, max_position_embeddings=128,
    initial_context_length=128, tie_word_embeddings=True,
)  # fmt: skip
CRITERIA = (
    "frequency", "soft", "soft_all", "ean", "man", "msan", "reap", "reap_sum", "reap_l2", "weight_norm", "aimer",
    "reconstruction",
)  # fmt: skip
KEEPS = (12, 8, 4)
DRAWS = 8
SEQ, BATCH = 128, 16
AFTER = ", routers recovered"


def rows_of(text: torch.Tensor, count: int, generator: torch.Generator, extra: int = 0) -> torch.Tensor:
    starts = torch.randint(0, len(text) - SEQ - extra, (count,), generator=generator)
    return torch.stack([text[s : s + SEQ + extra] for s in starts])


def train(text: torch.Tensor, seed: int, steps: int):
    """A fresh model after `steps` of AdamW (3e-3, cosine to a tenth) with a load-balancing loss of 0.01 a layer."""
    model = build(CONFIG, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        rows = rows_of(text, BATCH, generator, extra=1)
        out = model(rows[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten())
        (loss + 0.01 * sum(load_balancing_loss(r) for r in out.routing)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def measure(text: torch.Tensor, held_out: torch.Tensor, seed: int, steps: int) -> dict[str, float]:
    """Perplexities of one model under all plans, by names such as "reap_sum 8"."""
    model = train(text, seed, steps)
    generator = torch.Generator().manual_seed(1000 + seed)
    calibration = list(rows_of(text, 256, generator).split(BATCH))
    fresh = list(rows_of(text, 200 * BATCH, generator).split(BATCH))
    ends = held_out[: (len(held_out) - 1) // SEQ * SEQ + 1][: 256 * SEQ + 1]
    test = list(zip(ends[:-1].view(-1, SEQ).split(BATCH), ends[1:].view(-1, SEQ).split(BATCH)))
    stats = record_routing(model, calibration, sample=512)

    def ppl(criterion: str, keep: int, **options) -> float:
        plan = plan_pruning(stats, criterion, keep, model=model, guard=False, **options)
        with mask(model, plan):
            return perplexity(mean_loss(model, test))

    found = {"whole": perplexity(mean_loss(model, test))}
    for keep in KEEPS:
        for criterion in CRITERIA:
            found[f"{criterion} {keep}"] = ppl(criterion, keep)
        draws = [ppl("random", keep, seed=s) for s in range(DRAWS)]
        found[f"random {keep}"] = sum(draws) / DRAWS
        found[f"random, best of {DRAWS} {keep}"] = min(draws)
        for budget in ("sensitivity", "global"):
            found[f"reconstruction, {budget} {keep}"] = ppl("reconstruction", keep, budget=budget)
    again = {criterion: (criterion, {}) for criterion in (*CRITERIA, "random")}  # of random, the first draw alone
    again["reconstruction, sensitivity"] = ("reconstruction", {"budget": "sensitivity"})
    for (name, (criterion, options)), keep in itertools.product(again.items(), KEEPS):
        small = prune(model, plan_pruning(stats, criterion, keep, model=model, guard=False, **options))
        recover(small, model, fresh, train="routers", steps=200)
        found[f"{name}{AFTER} {keep}"] = perplexity(mean_loss(small, test))
    return found


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__, "python benchmarks/prune_quality.py --data tinyshakespeare.txt --output quality.json")
    p.add_argument("--data", required=True, metavar="FILE.txt", help="text to train and measure on")
    p.add_argument("--seeds", default="0,1,2", metavar="0,1,2")
    p.add_argument("--steps", type=int, default=600, help="training steps (default: 600)")
    p.add_argument("--output", metavar="FILE.json", help="also write the figures here; seeds already in it are kept")
    args = p.parse_args(argv)
    content = torch.tensor(list(Path(args.data).read_bytes()))
    cut = len(content) * 9 // 10
    output = Path(args.output) if args.output else None
    found = json.loads(output.read_text()) if output and output.exists() else {}
    for seed in args.seeds.split(","):
        began = time.perf_counter()
        found[seed] = measure(content[:cut], content[cut:], int(seed), args.steps)
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        if output:
            output.write_text(json.dumps(found, indent=1))
    print(table(found))
    return 0


def table(found: dict[str, dict[str, float]]) -> str:
    """Mean over seeds, and standard error, of each plan at each size, as cut and after its routers were recovered."""
    names = list(dict.fromkeys(k.rsplit(" ", 1)[0] for row in found.values() for k in row if k != "whole"))
    names = [name for name in names if not name.endswith(AFTER)]
    whole = [row["whole"] for row in found.values()]
    lines = [
        f"perplexity of the whole model {sum(whole) / len(whole):.2f} ({len(whole)} seeds)",
        "",
        "| kept of 16 | " + " | ".join(f"{keep} | recovered" for keep in KEEPS) + " |",
        "|---|" + "---|" * 2 * len(KEEPS),
    ]
    for name in names:
        cells = [_cell(found, f"{name}{after} {keep}") for keep in KEEPS for after in ("", AFTER)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: dict[str, dict[str, float]], name: str) -> str:
    values = [row[name] for row in found.values() if name in row]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{sum(values) / len(values):.2f} ± {error:.2f}" if values else ""


if __name__ == "__main__":
    command.run(main)
