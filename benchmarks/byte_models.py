"""Small byte models for tables of quality: trained here on nine tenths of a text, measured on the rest, once a seed.

A model has 3 layers of 16 experts, 2 a token, and width 64; some 600 steps bring it to text that is worth a perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from xmoe.model.config import ModelConfig
from xmoe.model.router import load_balancing_loss
from xmoe.model.transformer import Transformer, build

CONFIG = ModelConfig(
    vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, num_experts=16, num_experts_per_tok=2, sliding_window=64, max_position_embeddings=128,
    initial_context_length=128, tie_word_embeddings=True,
)  # fmt: skip
SEQ, BATCH = 128, 16

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def add_flags(p: argparse.ArgumentParser) -> None:
    """Which text, which models."""
    p.add_argument("--data", required=True, metavar="FILE.txt", help="text to train and measure on")
    p.add_argument("--seeds", default="0,1,2", metavar="0,1,2")
    p.add_argument("--steps", type=int, default=600, help="training steps (default: 600)")


def of_seeds(
    args: argparse.Namespace,
    measure: Callable[[Transformer, torch.Tensor, Pairs, int], dict],
    found: dict | None = None,
) -> dict[str, dict]:
    """What `measure(model, text it was trained on, held-out batches, seed)` says of each seed, by seed.

    Args:
        args: --data, --seeds, --steps and --output, which is written anew after every seed.
        found: what is known of other seeds.
    """
    content = torch.tensor(list(Path(args.data).read_bytes()))
    cut = len(content) * 9 // 10
    text, test = content[:cut], held_out(content[cut:])
    found = dict(found or {})
    for seed in args.seeds.split(","):
        began = time.perf_counter()
        found[seed] = measure(train(text, int(seed), args.steps), text, test, int(seed))
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        if args.output:
            Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    return found


def train(text: torch.Tensor, seed: int, steps: int) -> Transformer:
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


def rows_of(text: torch.Tensor, count: int, generator: torch.Generator, extra: int = 0) -> torch.Tensor:
    """[count, SEQ + extra] bytes from random places."""
    starts = torch.randint(0, len(text) - SEQ - extra, (count,), generator=generator)
    return torch.stack([text[s : s + SEQ + extra] for s in starts])


def batches_of(text: torch.Tensor, count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """`count` rows from random places, [BATCH, SEQ] each but the last."""
    return list(rows_of(text, count, generator).split(BATCH))


def held_out(text: torch.Tensor) -> Pairs:
    """Batches of up to 256 rows from the beginning of `text`, and what follows each byte."""
    ends = text[: (len(text) - 1) // SEQ * SEQ + 1][: 256 * SEQ + 1]
    return list(zip(ends[:-1].view(-1, SEQ).split(BATCH), ends[1:].view(-1, SEQ).split(BATCH)))
