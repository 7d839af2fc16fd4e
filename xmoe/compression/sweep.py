"""Quality against size for many plans from one recording: each is tried by masking, no checkpoint is written."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from xmoe.compression.apply import mask, pruned_config
from xmoe.compression.layerwise import as_batches
from xmoe.compression.plan import PrunePlan, plan_pruning
from xmoe.compression.routing import RoutingStats
from xmoe.model.perplexity import NOT_SCORED, mean_loss, perplexity
from xmoe.model.transformer import Transformer
from xmoe.quantization.compound import MixedWeight
from xmoe.quantization.packed import one


class SweepRow(NamedTuple):
    """One plan's result. keep 0 and criterion "none": the whole model. bytes: of all tensors after the cut."""

    criterion: str
    budget: str
    keep: float
    seed: int
    experts: int
    parameters: int
    bytes: int
    loss: float
    perplexity: float


def sweep(
    model: Transformer,
    stats: RoutingStats,
    criteria: Sequence[str],
    keeps: Sequence[int | float],
    batches: Iterable,
    *,
    budget: str = "uniform",
    random_draws: int = 8,
    dtype: torch.dtype | None = None,
) -> list[SweepRow]:
    """Loss on `batches` (forms as for recording) of the whole model and of every criterion at every size.

    `random` is drawn `random_draws` times with seeds 0, 1, ..., a row each.
    """
    text = list(scored(batches))
    everything = PrunePlan("none", budget, stats.num_experts, stats.num_experts_per_tok, _all(stats.num_experts))
    plans = [(everything, 0.0, 0)]
    for criterion in criteria:
        for keep in keeps:
            for seed in range(random_draws if criterion == "random" else 1):
                plan = plan_pruning(stats, criterion, keep, budget=budget, model=model, seed=seed)
                plans.append((plan, float(keep), seed))
    rows = []
    for plan, keep, seed in tqdm(plans, desc="trying plans", disable=None):
        with mask(model, plan):
            loss = mean_loss(model, text, dtype=dtype)
        rows.append(
            SweepRow(
                plan.criterion,
                plan.budget,
                keep,
                seed,
                sum(plan.counts),
                pruned_config(model.config, plan).parameter_count(),
                pruned_bytes(model, plan),
                loss,
                perplexity(loss),
            )
        )
    return rows


def scored(batches: Iterable) -> Iterable[tuple[Tensor, Tensor]]:
    """(tokens, targets) of calibration batches: every token's target is the next one of its row, padding has none."""
    for batch in as_batches(batches):
        targets = torch.full_like(batch.tokens, NOT_SCORED)
        targets[:, :-1] = batch.tokens[:, 1:]
        if batch.mask is not None:
            targets[:, :-1].masked_fill_(~(batch.mask[:, 1:] & batch.mask[:, :-1]), NOT_SCORED)
        yield batch.tokens, targets


def pruned_bytes(model: Transformer, plan: PrunePlan) -> int:
    """Bytes of the model's tensors as they are held, without the rows that the plan drops."""
    total = 0
    for name, tensor in model.state_dict().items():
        if ".moe.router." in name or ".moe.experts." in name:
            if any(f".moe.experts.{weight}." in f"{name}." for weight in ("gate_up", "down")):
                continue  # below: experts may differ in form
            layer = int(name.split(".")[1])
            total += tensor.nbytes // plan.num_experts[layer] * plan.counts[layer]
        else:
            total += tensor.nbytes
    for block, kept in zip(model.blocks, plan.kept):
        for weight in (block.moe.experts.gate_up, block.moe.experts.down):
            total += sum(one(weight, e).nbytes for e in kept)
            total += len(kept) if isinstance(weight, MixedWeight) else 0  # which part each is in
    return total


def _all(counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(E)) for E in counts)


def write_csv(rows: Sequence[SweepRow], file: Path) -> None:
    """One line a plan."""
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(SweepRow._fields)
        writer.writerows(rows)


_COLOURS = ("#1b6ca8", "#c8553d", "#3c8d5a", "#8a5fb0", "#b8860b", "#4a4a4a", "#d1698d", "#2a9d9d")


def draw(rows: Sequence[SweepRow], file: Path) -> None:
    """Perplexity (logarithmic) against megabytes, one line a criterion, as an SVG file that needs no library to read.

    Several draws of one size are averaged.
    """
    width, height, left, top, right, bottom = 640, 400, 62, 16, 150, 44
    sizes = [r.bytes / 1e6 for r in rows]
    heights = [math.log(max(min(r.perplexity, 1e12), 1.0)) for r in rows]
    low_x, high_x, low_y, high_y = min(sizes), max(sizes), min(heights), max(heights)

    def place(size: float, value: float) -> str:
        x = left + (size - low_x) / ((high_x - low_x) or 1) * (width - left - right)
        y = height - bottom - (value - low_y) / ((high_y - low_y) or 1) * (height - top - bottom)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left},{top} V{height - bottom} H{width - right}" fill="none" stroke="#888"/>',
        f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">megabytes</text>',
        f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" text-anchor="middle">perplexity</text>',
    ]
    for value in (low_y, (low_y + high_y) / 2, high_y):
        x, y = place(low_x, value).split(",")
        parts.append(f'<text x="{float(x) - 6}" y="{y}" text-anchor="end">{math.exp(value):.3g}</text>')
    for size in (low_x, high_x):
        x, y = place(size, low_y).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 16}" text-anchor="middle">{size:.3g}</text>')
    whole = [r for r in rows if r.criterion == "none"]
    for i, criterion in enumerate(dict.fromkeys(r.criterion for r in rows if r.criterion != "none")):
        colour, points = _COLOURS[i % len(_COLOURS)], {}
        for r in [*whole, *(r for r in rows if r.criterion == criterion)]:
            points.setdefault(r.bytes / 1e6, []).append(math.log(max(min(r.perplexity, 1e12), 1.0)))
        line = [place(size, sum(values) / len(values)) for size, values in sorted(points.items())]
        parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.extend(f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="{colour}"/>' for p in line)
        parts.append(f'<text x="{width - right + 12}" y="{top + 14 + 18 * i}" fill="{colour}">{criterion}</text>')
    file.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
