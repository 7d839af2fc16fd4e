"""Act, in memory: mask(model, plan) to try a plan without cutting, prune(model, plan) to cut.

An expert is a row of the router and of every expert tensor, so to prune is to select rows; packed experts stay packed and
no byte of them changes. The rows keep their ascending order: top-k breaks ties by position, and sums run in that order.
Removing an expert equals setting its router logit to minus infinity, since the softmax is over the chosen logits only.
"""

from __future__ import annotations

import dataclasses
from types import TracebackType

import torch
from torch import nn

from xmoe.compression.identity import model_hash
from xmoe.compression.plan import PrunePlan
from xmoe.errors import ConfigError
from xmoe.model.adapter import adapters
from xmoe.model.config import ModelConfig
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight


def check(model: Transformer, plan: PrunePlan) -> None:
    """ConfigError unless `plan` was made for this model."""
    config = model.config
    counts = [config.experts_in_layer(i) for i in range(config.num_hidden_layers)]
    plan.check_model(counts, model_hash(model) if plan.model else "")


class mask:
    """Try a plan: experts that it drops are never chosen, as if they were cut away. Takes effect at once.

        with mask(model, plan):          # the model is itself again afterwards
            ...
        masked = mask(model, plan)       # until masked.remove()

    Logits equal those of the pruned model bit for bit in bfloat16, ties included: a masked router takes the top-k of the
    kept logits alone. In fp32 the router's product over fewer rows may round differently, by 1e-7.
    """

    def __init__(self, model: Transformer, plan: PrunePlan):
        check(model, plan)
        self._routers = [block.moe.router for block in model.blocks]
        self._before = [(r.kept_ids, r.num_experts_per_tok) for r in self._routers]
        for router, kept in zip(self._routers, plan.kept):
            router.keep_only(kept)
            router.num_experts_per_tok = plan.experts_per_token

    def remove(self) -> None:
        """Allow all experts again (those that were allowed before)."""
        for router, (kept, k) in zip(self._routers, self._before):
            router.keep_only(None if kept is None else kept.tolist())
            router.num_experts_per_tok = k

    def __enter__(self) -> mask:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def pruned_config(config: ModelConfig, plan: PrunePlan) -> ModelConfig:
    """The config after the cut: counts, K, and the effort table clipped to what the smallest layer keeps."""
    fewest = min(plan.counts)
    effort = config.reasoning_effort and {name: min(k, fewest) for name, k in config.reasoning_effort.items()}
    return dataclasses.replace(
        config, num_experts=plan.counts, num_experts_per_tok=plan.experts_per_token, reasoning_effort=effort
    )


@torch.no_grad()
def prune(model: Transformer, plan: PrunePlan) -> Transformer:
    """A new model without the experts that `plan` drops; the old one is unharmed and shares no tensor with it.

    Raises:
        ConfigError: the plan is another model's, or the model carries adapters.
    """
    check(model, plan)
    if adapters(model):
        raise ConfigError("the model carries adapters, which a cut would lose; merge them first, or prune its base")
    with torch.device("meta"):
        small = Transformer(pruned_config(model.config, plan))
    for old, new, kept in zip(model.blocks, small.blocks, plan.kept):
        for name in ("gate_up", "down"):
            if isinstance(weight := getattr(old.moe.experts, name), PackedWeight):
                new.moe.experts.pack(name, weight.select_experts(kept))
    for name, parameter in model.named_parameters():
        kept = parameter.data[list(plan.kept[_layer(name)])] if _is_by_expert(name) else parameter.data.clone()
        owner, _, leaf = name.rpartition(".")
        setattr(small.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    for old, new, kept in zip(model.blocks, small.blocks, plan.kept):
        if (bias := old.moe.router.selection_bias) is not None:
            new.moe.router.selection_bias = bias[list(kept)]
    small.recompute = model.recompute
    return small.train(model.training)


def _is_by_expert(name: str) -> bool:
    """Whether the native tensor `name` has the expert on dimension 0: router and experts do, nothing else."""
    return ".moe.router." in name or ".moe.experts." in name


def _layer(name: str) -> int:
    return int(name.split(".")[1])  # blocks.{layer}.…
