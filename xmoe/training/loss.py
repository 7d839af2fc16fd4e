"""What training minimises: cross entropy of the next token plus the router's own losses, reported term by term.

    total = lm + load_balancing_coef * sum over layers of LBL + z_loss_coef * sum over layers of z

The sum over layers, not the mean, so that each router feels the same pressure in a deep model as in a shallow one; what is
*reported* is the mean, where 1.0 says even for any depth, E and K. Layers with a single expert have nothing to balance and are
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xmoe.kernels import dispatch
from xmoe.model.router import Routing, load_balancing_loss, tokens_per_expert, z_loss
from xmoe.model.transformer import Features


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
