"""What training minimises: cross entropy of the next token plus the router's own losses, reported term by term.

    total = lm + load_balancing_coef * sum over layers of LBL + z_loss_coef * sum over layers of z

The sum over layers, not the mean, so that each router feels the same pressure in a deep model as in a shallow one; what is
*reported* is the mean, where 1.0 says even for any depth, E and K. Layers with a single expert have nothing to balance and are
left out.

Why k = 1 needs help: the routing weights are a softmax over the chosen logits, so with one expert the weight is 1 whatever the
logits are and the language-model term gives that router no gradient at all. Only LBL and z then move it, and neither knows
which expert is the right one. `EffortSampler` therefore draws the number of experts anew for each step: the steps with two or
four experts teach the router an order, and the first of that order is what a step (or a user) with one expert gets.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xmoe.kernels import dispatch
from xmoe.model.router import Routing, load_balancing_loss, tokens_per_expert, z_loss
from xmoe.model.transformer import Features, Transformer


class Losses(NamedTuple):
    """Scalars, fp32. `total` is what gradients come from; `load_balancing` and `z` are means over layers, unweighted."""

    total: Tensor
    lm: Tensor
    load_balancing: Tensor
    z: Tensor


class StepLoad:
    """Rows per expert of each layer, added up over the micro batches of one optimizer step and over all ranks.

    The load-balancing loss is linear in the mean probabilities P, so a micro batch that takes its *load* from a larger batch
    contributes exactly its part of that batch's loss. A micro batch that balanced alone would forbid experts to specialise
    on what happens to be in it (arXiv 2501.11873). The m-th micro batch knows the m rows of counts up to its own, the last
    one knows the whole step; over ranks each knows all.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(self, routing: Sequence[Routing], mask: Tensor | None) -> list[Tensor]:
        """Count one micro batch and return the counts so far, int64 [E] a layer."""
        new = [tokens_per_expert(r, mask) for r in routing]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            together = torch.cat(new)  # one all-reduce for all layers
            torch.distributed.all_reduce(together)
            new = list(together.split([n.numel() for n in new]))
        self.rows = [a + b for a, b in zip(self.rows, new)] if self.rows else new
        return self.rows


def training_loss(
    features: Features,
    unembedding: Tensor,
    targets: Tensor,
    load: StepLoad,
    *,
    load_balancing_coef: float,
    z_loss_coef: float,
    mask: Tensor | None = None,
) -> Losses:
    """The losses of one micro batch, as means over its tokens.

    Args:
        features: hidden [B, S, D] and one `Routing` a layer.
        unembedding: [V, D].
        targets: int64 [B, S]; -100 where there is nothing to predict.
        load: counts of this step's earlier micro batches; this one is added.
        mask: bool [B, S], True for real tokens; None where there is no padding. Padding counts for no term.
    """
    flat = None if mask is None else mask.reshape(-1)
    rows = load.add(features.routing, flat)
    hidden = features.hidden
    lm = dispatch.linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), unembedding, targets.reshape(-1))
    balance, squares = [], []
    for routing, counts in zip(features.routing, rows):
        if counts.numel() > 1:
            balance.append(load_balancing_loss(routing, flat, counts))
            squares.append(z_loss(routing, flat))
    if not balance:
        return Losses(lm, lm, torch.ones_like(lm), torch.zeros_like(lm))
    lb, z = torch.stack(balance), torch.stack(squares)
    total = lm + load_balancing_coef * lb.sum() + z_loss_coef * z.sum()
    return Losses(total, lm, lb.mean(), z.mean())


class SelectionBias:
    """Balancing without an auxiliary loss (arXiv 2408.15664): a bias per expert that takes part in the choice only.

    After each step the bias of an expert with less than its share rises by `rate` and that of one with more falls, and the
    mean is taken out. No file format has room for such a bias (GPT-OSS's router bias also changes the weights), so over the
    last `FADE` of the run it is scaled down to exactly 0: the model that is saved at the end routes as the one that trained.
    """

    FADE = 0.2

    def __init__(self, model: Transformer, rate: float) -> None:
        self.rate = rate
        self.routers = [block.moe.router for block in model.blocks]
        self.bias = [torch.zeros(r.weight.shape[0], dtype=torch.float32, device=r.weight.device) for r in self.routers]

    @torch.no_grad()
    def update(self, rows: Sequence[Tensor], progress: float) -> None:
        """Move after a step with row counts `rows` [E] a layer; `progress` is the finished fraction of the run, 0..1."""
        for bias, counts in zip(self.bias, rows):
            counts = counts.to(bias.device, torch.float32)
            bias += self.rate * torch.sign(counts.mean() - counts)
            bias -= bias.mean()
        self.apply(progress)

    def apply(self, progress: float) -> None:
        """Hand the faded bias to the routers; none at all once the run is over."""
        fade = min(1.0, (1.0 - progress) / self.FADE)
        for router, bias in zip(self.routers, self.bias):
            router.selection_bias = bias * fade if fade > 0 else None

    def state_dict(self) -> dict:
        return {"bias": self.bias}

    def load_state_dict(self, state: dict) -> None:
        self.bias = [new.to(old.device) for new, old in zip(state["bias"], self.bias)]


class EffortSampler:
    """Draws how many experts a token visits in a step, so that one checkpoint serves every reasoning effort.

    Args:
        experts: effort -> experts per token, from the model's `reasoning_effort` table, for example {low: 1, medium: 2, high: 4}.
        weights: effort -> how often, in any unit. Compute grows with the mean of k, so this is also the price.
        per_layer: draw for each layer by itself (arXiv 2509.26520) instead of once for the whole step.
        layers: of the model.

    The draw depends on the seed and the step alone, so a resumed run draws what it would have drawn.
    """

    def __init__(
        self, experts: dict[str, int], weights: dict[str, float], per_layer: bool, layers: int, seed: int
    ) -> None:
        self.choices = [experts[effort] for effort in weights]
        self.weights = list(weights.values())
        self.per_layer, self.layers, self.seed = per_layer, layers, seed

    def draw(self, step: int) -> int | list[int]:
        """k of this step, or one a layer."""
        generator = random.Random(f"effort {self.seed} {step}")
        if self.per_layer:
            return generator.choices(self.choices, self.weights, k=self.layers)
        return generator.choices(self.choices, self.weights)[0]
