"""Low-rank experts, plain and fitted to their inputs: what is saved, and what it costs on text that neither has seen.

    python benchmarks/low_rank_quality.py --data tinyshakespeare.txt --output low_rank.json

The byte model of `prune_quality.py` (3 layers of 16 experts, 2 a token, width 64, 600 steps), factored at several fractions;
factors are fitted to 32,768 tokens of the training part. Perplexity, the layers' output errors and the count of experts
whose own output error is smaller when fitted are taken on the held-out tenth.
"""

from __future__ import annotations

import statistics
import time

import torch
from byte_models import Pairs, add_flags, batches_of, of_seeds

from xmoe import command
from xmoe.compression.expert_inputs import LayerInputs
from xmoe.compression.reconstruction import expert_output
from xmoe.compression.reduce import reduce
from xmoe.compression.reduction_report import mixture
from xmoe.compression.routing import record_routing
from xmoe.model.perplexity import mean_loss, perplexity
from xmoe.model.transformer import Transformer

FRACTIONS = (0.25, 0.5, 0.75)
KINDS = ("plain", "whitened")


@torch.no_grad()
def output_errors(model, small, inputs: torch.Tensor) -> tuple[float, dict[tuple[int, int], float]]:
    """||y' - y|| / ||y||, mean over layers; and for each expert the length of its weighted output's error."""
    layers, experts = [], {}
    for layer, (old, new, x) in enumerate(zip(model.blocks, small.blocks, inputs)):
        y = mixture(old.moe, x)
        layers.append(float((mixture(new.moe, x) - y).norm() / y.norm()))
        fed = LayerInputs(old.moe, x)
        for e in range(len(old.moe.experts.down_bias)):
            rows, g = fed.of(e)
            difference = expert_output(new.moe.experts, e, rows)[1] - expert_output(old.moe.experts, e, rows)[1]
            experts[layer, e] = float((difference * g.unsqueeze(1)).norm())
    return sum(layers) / len(layers), experts


def measure(model: Transformer, text: torch.Tensor, test: Pairs, seed: int) -> dict:
    """All figures of one model."""
    calibration = batches_of(text, 256, torch.Generator().manual_seed(1000 + seed))
    fresh = record_routing(model, [tokens for tokens, _ in test], sample=16_384).sample
    counts = record_routing(model, calibration).moments["count"]
    enough = {(int(i), int(e)) for i, e in (counts >= model.config.intermediate_size).nonzero()}
    found: dict = {"whole": perplexity(mean_loss(model, test)), "enough": len(enough), "experts": counts.numel()}
    for fraction in FRACTIONS:
        errors = {}
        for kind in KINDS:
            fitted = {"batches": calibration, "whiten": True} if kind == "whitened" else {}
            began = time.perf_counter()
            small, (stage,) = reduce(model, ["low-rank"], fraction, **fitted)
            seconds = time.perf_counter() - began
            mean, errors[kind] = output_errors(model, small, fresh)
            found[f"{kind} {fraction}"] = {
                "perplexity": perplexity(mean_loss(small, test)), "output_error": mean, "seconds": seconds,
                "weight_error": statistics.mean(stage.weight_error), "detail": stage.detail,
                "bytes": [stage.bytes_before, stage.bytes_after],
            }  # fmt: skip
        better = sum(errors["whitened"][place] < errors["plain"][place] for place in enough)
        found[f"whitened {fraction}"]["better"] = better
    return found


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__, "python benchmarks/low_rank_quality.py --data tinyshakespeare.txt")
    add_flags(p)
    p.add_argument("--output", metavar="FILE.json", help="also write the figures here")
    args = p.parse_args(argv)
    print(table(of_seeds(args, measure)))
    return 0


def table(found: dict[str, dict]) -> str:
    """Means over seeds."""
    rows = list(found.values())
    lines = [
        f"perplexity of the whole model {statistics.mean(r['whole'] for r in rows):.3f} ({len(rows)} seeds)",
        "",
        "| bytes removed | ranks | perplexity plain | whitened | output error plain | whitened | experts better whitened |",
        "|---|---|---|---|---|---|---|",
    ]
    for fraction in FRACTIONS:
        pair = [[r[f"{kind} {fraction}"] for r in rows] for kind in KINDS]
        before, after = pair[0][0]["bytes"]
        better, enough = sum(x["better"] for x in pair[1]), sum(r["enough"] for r in rows)
        ranks = pair[0][0]["detail"].removeprefix("rank ").removesuffix(", plain")
        cells = [f"{1 - after / before:.1%}", ranks]
        cells += [f"{statistics.mean(x['perplexity'] for x in side):.2f}" for side in pair]
        cells += [f"{statistics.mean(x['output_error'] for x in side):.3f}" for side in pair]
        lines.append("| " + " | ".join([*cells, f"{better} of {enough}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
