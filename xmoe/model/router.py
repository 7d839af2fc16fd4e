"""The router: which experts a token visits and with what weight; and what can be said about its decisions.

Routing is a value, not a side effect: the model returns it, and losses, metrics, recording and pruning read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe.errors import ConfigError
from xmoe.kernels import dispatch
from xmoe.model.adapter import LoRA


class Routing(NamedTuple):
    """What one layer's router decided for T tokens (T = B * S, padding included; callers mask it).

    logits: fp32 [T, E], the router's raw output. indices: int64 [T, K]. weights: fp32 [T, K], rows sum to 1.
    output_norm: fp32 [T, K], length of each chosen expert's output before weighting; None unless asked for.
    """

    logits: Tensor
    indices: Tensor
    weights: Tensor
    output_norm: Tensor | None = None


class Router(nn.Module):
    """A linear layer scores E experts, the best K stay, and a softmax over those K weighs them, all in fp32.

    That softmax equals the full softmax renormalised over the chosen, so dropping an expert needs no correction: its
    logit goes and the next one steps in. With K = 1 the weight is 1 whatever the logits are, so the language-model loss
    gives this router no gradient; see `docs/reasoning_effort.md`.
    """

    def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.adapter: LoRA | None = None
        self.num_experts_per_tok = num_experts_per_tok
        # bool [E], or None for all: experts outside it are never chosen. It tries a pruning plan without cutting.
        self.register_buffer("kept", None, persistent=False)
        self.register_buffer("kept_ids", None, persistent=False)  # the same as ascending ids
        self.num_kept = num_experts
        # fp32 [E], or None: added for the choice only, never to the weights (auxiliary-loss-free balancing).
        self.register_buffer("selection_bias", None, persistent=False)

    def keep_only(self, ids: Sequence[int] | None) -> None:
        """Never choose experts outside `ids`, as if they were cut away; None allows all again."""
        E = self.weight.shape[0]
        self.kept, self.kept_ids, self.num_kept = None, None, E
        if ids is not None:
            self.kept_ids = torch.tensor(sorted(set(ids)), device=self.weight.device)
            self.num_kept = len(self.kept_ids)
            self.kept = torch.zeros(E, dtype=torch.bool, device=self.weight.device)
            self.kept[self.kept_ids] = True

    def forward(self, x: Tensor, num_experts_per_tok: int | None = None) -> Routing:
        """x [T, D] -> :class:`Routing`. `num_experts_per_tok` overrides the model's K for this call.

        On packed or bf16 models the product runs in x's dtype, as the published implementations do; in training
        (fp32 parameters, also under autocast) it runs in fp32. Scores and softmax are fp32 always.
        """
        k = self.num_experts_per_tok if num_experts_per_tok is None else num_experts_per_tok
        if not 1 <= k <= self.weight.shape[0]:
            raise ConfigError(
                f"num_experts_per_tok is {k}; expected 1 to {self.weight.shape[0]}, the experts of a layer"
            )
        with torch.autocast(x.device.type, enabled=False):
            given = x.to(self.weight.dtype)
            # Decoding wants the short way. Training keeps torch's product: rounding decides between experts, and a run
            # should part from the same run in other micro-batches, or from last month's, as late as it can.
            linear = F.linear if torch.is_grad_enabled() else dispatch.linear
            logits = linear(given, self.weight, self.bias)
            if self.adapter is not None:
                logits = logits + self.adapter(given)
        scores = logits.detach() if self.selection_bias is None else logits.detach().float() + self.selection_bias
        if self.kept_ids is None:
            indices = scores.topk(k, dim=-1).indices
        else:  # among the kept alone: top-k breaks ties by position, and this is what the cut model would choose
            best = scores.index_select(-1, self.kept_ids).topk(min(k, self.num_kept), dim=-1).indices
            indices = self.kept_ids[best]
        logits = logits.float()
        return Routing(logits, indices, logits.gather(-1, indices).softmax(-1))


def tokens_per_expert(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """int64 [E]: how many (token, slot) pairs each expert received. mask: bool [T], True for real tokens."""
    chosen = routing.indices if mask is None else routing.indices[mask]
    return torch.bincount(chosen.reshape(-1), minlength=routing.logits.shape[-1])


def load_balancing_loss(routing: Routing, mask: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """E * sum_e load_e * P_e, a scalar: 1.0 when even for every K, E/K when K experts take all.

    load_e is expert e's share of all T*K pairs (no gradient), P_e the mean over tokens of the full softmax (gradient).
    Switch Transformer's loss (arXiv 2101.03961) with the load normalised by K.

    Args:
        mask: bool [T], True for real tokens; padding counts for nothing.
        counts: int64 [E] to take the load from instead of this batch's: the counts of the whole step (accumulated or
            summed over ranks) make this the loss of the global batch, since it is linear in P (arXiv 2501.11873).
    """
    if counts is None:
        counts = tokens_per_expert(routing, mask)
    load = counts.float() / counts.sum().clamp(min=1)
    probabilities = routing.logits.softmax(-1)
    mean = probabilities.mean(0) if mask is None else _masked_mean(probabilities, mask)
    return routing.logits.shape[-1] * (load * mean).sum()


def z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean squared logsumexp of the router's logits, a scalar: keeps them from drifting (arXiv 2202.08906)."""
    squared = routing.logits.logsumexp(-1).square()
    return squared.mean() if mask is None else _masked_mean(squared, mask)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))
    return (values * weight).sum(0) / weight.sum().clamp(min=1)


class RouterHealth(NamedTuple):
    """One layer's balance, from counts over a window: see :func:`router_health`."""

    max_violation: float
    entropy: float
    dead: int
    top_weight: float | None


def router_health(counts: Tensor, top_weight: Tensor | None = None, dead_below: float = 0.1) -> RouterHealth:
    """Balance of one layer from counts [E].

    max_violation: busiest expert's load over the mean, minus 1 (0 when even; arXiv 2408.15664). entropy: of the load,
    divided by ln E (1 when even). dead: experts with less than `dead_below` of a fair share. top_weight: mean weight of
    the first choice.
    """
    load = counts.double() / counts.sum().clamp(min=1)
    E = load.numel()
    entropy = -(load * load.clamp(min=1e-30).log()).sum() / torch.tensor(float(max(E, 2))).log()
    return RouterHealth(
        max_violation=float(load.max() * E - 1),
        entropy=float(entropy) if E > 1 else 1.0,
        dead=int((load < dead_below / E).sum()),
        top_weight=None if top_weight is None else float(top_weight),
    )
