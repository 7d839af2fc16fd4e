"""How well a model predicts a text: mean negative log-likelihood of its tokens, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from xmoe.errors import DataError
from xmoe.kernels import dispatch
from xmoe.model.transformer import Transformer

NOT_SCORED = -100


@torch.no_grad()
def mean_loss(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    num_experts_per_tok: int | Sequence[int] | None = None,
) -> float:
    """Mean over scored tokens of -ln p(target), in nats; e to it is the perplexity.

    Args:
        batches: pairs of tokens and targets, int64 [B, S] each; targets of -100 are not scored.
        dtype: compute in it under autocast (bfloat16 from fp32 weights); None computes in the weights' own type.
        num_experts_per_tok: overrides the model's K.

    Raises:
        DataError: nothing is scored.
    """
    was_training = model.training
    model.eval()
    device = model.device
    total, count = 0.0, 0
    try:
        for tokens, targets in batches:
            scored = int((targets != NOT_SCORED).sum())
            if not scored:  # padding altogether, as the last share of a rank may be
                continue
            tokens, targets = tokens.to(device), targets.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                hidden = model.features(tokens, num_experts_per_tok=num_experts_per_tok).hidden
                loss = dispatch.linear_cross_entropy(hidden.flatten(0, 1), model.unembedding, targets.flatten())
            total, count = total + float(loss) * scored, count + scored
    finally:
        model.train(was_training)
    if not count:
        raise DataError("no token to score: the text is empty or all padding")
    return total / count


def perplexity(loss: float) -> float:
    """e to the mean loss; infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Mean loss in nats a token -> bits a byte of text, which compares across tokenizers."""
    return loss / math.log(2) / bytes_per_token
