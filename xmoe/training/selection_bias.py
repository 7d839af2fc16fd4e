"""Balancing without an auxiliary loss (arXiv 2408.15664): a bias per expert that takes part in the choice only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xmoe.model.transformer import Transformer


class SelectionBias:
    """Moves each router's `selection_bias` after every step.

    The bias of an expert with less than its share rises by `rate`, that of one with more falls, and the mean is taken out. No
    published layout has room for such a bias (GPT-OSS's router bias also changes the weights), so over the last `FADE` of the
    run it is scaled down to exactly 0: the model that is saved at the end routes as the one that trained.
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
