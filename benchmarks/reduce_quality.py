"""Methods in sequence: what they save, what they cost on held-out text, and what training the packed experts wins back.

    python benchmarks/reduce_quality.py --data tinyshakespeare.txt --seeds 0 --output reduce.json

The byte model of `prune_quality.py` (3 layers of 16 experts, 2 a token, width 64, 600 steps) in bfloat16. Low-rank factors
are fitted to 32,768 tokens of the training part; afterwards the experts are distilled from the whole model for some steps on
fresh rows of that part and stored again in the form they had. Perplexity is taken on the held-out tenth.
"""

from __future__ import annotations

import copy
import statistics
import sys
from functools import partial

import torch
from byte_models import BATCH, Pairs, add_flags, batches_of, of_seeds

from xmoe import command
from xmoe.compression.recover import recover
from xmoe.compression.reduce import reduce
from xmoe.model.perplexity import mean_loss, perplexity
from xmoe.model.transformer import Transformer

FRACTION = 0.4
SEQUENCES = (
    "int8", "int4", "mxfp4", "low-rank", "low-rank,int8", "low-rank,mxfp4", "int8,low-rank", "magnitude,mxfp4",
    "neurons,low-rank", "neurons,int4",
)  # fmt: skip


def measure(model: Transformer, text: torch.Tensor, test: Pairs, seed: int, recovery: int) -> dict:
    """All figures of one model."""
    model = model.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1000 + seed)
    calibration = batches_of(text, 256, generator)
    fresh = batches_of(text, recovery * BATCH, generator) if recovery else []

    def ppl(model) -> float:
        return perplexity(mean_loss(model, test))

    found: dict = {"whole": ppl(model)}
    for sequence in SEQUENCES:
        small, stages = reduce(model, sequence.split(","), FRACTION, batches=calibration, whiten="low-rank" in sequence)
        row = {"bytes": [stages[0].bytes_before, stages[-1].bytes_after], "detail": [s.detail for s in stages]}
        row |= {"perplexity": ppl(small), "output_error": statistics.mean(stages[-1].output_error)}
        if recovery:
            student = copy.deepcopy(small)
            result = recover(student, model, fresh, train="experts", steps=recovery)
            row |= {"recovered": ppl(student), "kl": [result.before, result.trained, result.stored]}
        found[sequence] = row
        print(f"seed {seed}, {sequence}: {row}", file=sys.stderr)
    return found


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__, "python benchmarks/reduce_quality.py --data tinyshakespeare.txt --seeds 0")
    add_flags(p)
    p.add_argument("--recover", type=int, default=200, metavar="N", help="steps of recovery, 0 for none (default: 200)")
    p.add_argument("--output", metavar="FILE.json", help="also write the figures here")
    args = p.parse_args(argv)
    print(table(of_seeds(args, partial(measure, recovery=args.recover))))
    return 0


def table(found: dict[str, dict]) -> str:
    """Means over seeds."""
    rows = list(found.values())
    lines = [
        f"perplexity of the whole model {statistics.mean(r['whole'] for r in rows):.3f} ({len(rows)} seeds)",
        "",
        "| methods | bytes removed | perplexity | recovered | KL before | trained | as stored |",
        "|---|---|---|---|---|---|---|",
    ]
    for sequence in SEQUENCES:
        own = [r[sequence] for r in rows]
        before, after = own[0]["bytes"]
        cells = [
            sequence.replace(",", ", "),
            f"{1 - after / before:.1%}",
            f"{statistics.mean(o['perplexity'] for o in own):.2f}",
        ]
        if "recovered" in own[0]:
            cells.append(f"{statistics.mean(o['recovered'] for o in own):.2f}")
            cells += [
                "" if own[0]["kl"][0] is None else f"{statistics.mean(o['kl'][i] for o in own):.4f}" for i in range(3)
            ]
        lines.append("| " + " | ".join(cells + [""] * (7 - len(cells))) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
