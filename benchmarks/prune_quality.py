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
from pathlib import Path

import torch
from byte_models import BATCH, Pairs, add_flags, batches_of, of_seeds

from xmoe import command
from xmoe.compression.apply import mask, prune
from xmoe.compression.plan import plan_pruning
from xmoe.compression.recover import recover
from xmoe.compression.routing import record_routing
from xmoe.model.perplexity import mean_loss, perplexity
from xmoe.model.transformer import Transformer

CRITERIA = (
    "frequency", "soft", "soft_all", "ean", "man", "msan", "reap", "reap_sum", "reap_l2", "weight_norm", "aimer",
    "reconstruction",
)  # fmt: skip
KEEPS = (12, 8, 4)
DRAWS = 8
AFTER = ", routers recovered"


def measure(model: Transformer, text: torch.Tensor, test: Pairs, seed: int) -> dict[str, float]:
    """Perplexities of one model under all plans, by names such as "reap_sum 8"."""
    generator = torch.Generator().manual_seed(1000 + seed)
    calibration = batches_of(text, 256, generator)
    fresh = batches_of(text, 200 * BATCH, generator)
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
    add_flags(p)
    p.add_argument("--output", metavar="FILE.json", help="also write the figures here; seeds already in it are kept")
    args = p.parse_args(argv)
    known = Path(args.output) if args.output else None
    print(table(of_seeds(args, measure, json.loads(known.read_text()) if known and known.exists() else {})))
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
