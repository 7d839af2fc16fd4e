"""The whole network: embedding, blocks, final norm, unembedding. tokens -> logits and routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from xmoe.errors import ConfigError
from xmoe.kernels import dispatch
from xmoe.model import decode_step
from xmoe.model.attention import Attention, Cache, Linear
from xmoe.model.config import ModelConfig, preset
from xmoe.model.experts import Experts, MoE
from xmoe.model.rope import concentration, inverse_frequencies, rope_tables
from xmoe.model.router import Router, Routing
from xmoe.quantization.packed import PackedWeight


class Features(NamedTuple):
    """hidden: [B, S, D] after the final norm. routing: one :class:`Routing` a layer."""

    hidden: Tensor
    routing: tuple[Routing, ...]


class Output(NamedTuple):
    """logits: [B, S, V]. routing: one :class:`Routing` a layer, over T = B * S tokens."""

    logits: Tensor
    routing: tuple[Routing, ...]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32, rounded once (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return dispatch.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """weight [V, D]; looks tokens up, and serves as unembedding where the two are tied."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MoE(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, layer)
        self.moe_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = MoE(config, layer)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        cache: Cache | None,
        num_experts_per_tok: int | None,
        norms: bool,
    ) -> tuple[Tensor, Routing]:
        """x [B, S, D] -> x after this block, and what its router decided."""
        x = x + self.attn(self.attn_norm(x), cos, sin, positions, cache)
        mixture, routing = self.moe(self.moe_norm(x), num_experts_per_tok, norms)
        return x + mixture, routing


class Transformer(nn.Module):
    """A Mixture-of-Experts language model of GPT-OSS's architecture.

    Parameters are created empty (on the `meta` device if one says `with torch.device("meta")`); :func:`init_weights`
    or a checkpoint fills them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute = False  # activation checkpointing: keep a block's input only, run it again in the backward pass
        self._concentration = concentration(config)
        self._inverse: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the embedding is."""
        return self.embed.weight.device

    @property
    def unembedding(self) -> Tensor | PackedWeight:
        """[V, D], or packed [1, V, D]: the head's weight, or the embedding's where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        *,
        positions: Tensor | None = None,
        num_experts_per_tok: int | Sequence[int] | None = None,
        norms: bool = False,
    ) -> Output:
        """tokens int64 [B, S] -> :class:`Output`.

        Args:
            cache: keys and values of what came before; tokens continue it.
            positions: int64 [B, S], -1 for padding (never a key; its own outputs mean nothing). None counts on from the
                cache's length, or from 0.
            num_experts_per_tok: overrides the config's K, for all layers or one a layer.
            norms: fill `Routing.output_norm`.
        """
        hidden, routing = self.features(
            tokens, cache, positions=positions, num_experts_per_tok=num_experts_per_tok, norms=norms
        )
        return Output(self.unembed(hidden), routing)

    def features(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        *,
        positions: Tensor | None = None,
        num_experts_per_tok: int | Sequence[int] | None = None,
        norms: bool = False,
    ) -> Features:
        """As :meth:`forward` without the unembedding, which callers apply to the places they need."""
        B, S = tokens.shape
        start = cache.length if cache is not None else 0
        counted = torch.arange(start, start + S, device=tokens.device).unsqueeze(0)
        if positions is None and cache is not None:
            positions = counted.expand(B, S)
        if self._inverse is None or self._inverse.device != tokens.device:
            self._inverse = inverse_frequencies(self.config).to(tokens.device)
        cos, sin = rope_tables(counted if positions is None else positions, self._inverse, self._concentration)
        per_layer = self._experts_per_layer(num_experts_per_tok)
        x = self.embed(tokens)
        if cache is not None:
            eps = self.config.rms_norm_eps
            decided = decode_step.take(self.blocks, x, cos, sin, positions, cache, per_layer, eps=eps, norms=norms)
            if decided is not None:
                cache.advance(S)
                return Features(self.norm(x), decided)
        routing: list[Routing] = []
        for block, k in zip(self.blocks, per_layer):
            arguments = (x, cos, sin, positions, cache, k, norms)
            if self.recompute and self.training and torch.is_grad_enabled():
                x, decided = recompute(block, *arguments, use_reentrant=False)
            else:
                x, decided = block(*arguments)
            routing.append(decided)
        if cache is not None:
            cache.advance(S)
        return Features(self.norm(x), tuple(routing))

    def unembed(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] after the final norm -> logits [..., V]."""
        return dispatch.unembed(hidden, self.unembedding)

    def _experts_per_layer(self, k: int | Sequence[int] | None) -> Sequence[int | None]:
        layers = len(self.blocks)
        if k is None or isinstance(k, int):
            return [k] * layers
        if len(k) != layers:
            raise ConfigError(f"num_experts_per_tok lists {len(k)} layers; expected {layers}, or one number")
        return k


def init_weights(model: Transformer, seed: int = 0) -> Transformer:
    """Fill every parameter, in place: matrices N(0, initializer_range) truncated at 3 sigma, those that write to the
    residual stream scaled by 1 / sqrt(2 L), norms 1, biases and sinks 0 (OLMoE's recipe, arXiv 2409.02060).
    """
    config = model.config
    generator = torch.Generator(device="cpu").manual_seed(seed)
    std = config.initializer_range
    residual = std / math.sqrt(2 * config.num_hidden_layers)

    def normal(parameter: Tensor, std: float) -> None:
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std, generator=generator)
        parameter.copy_(drawn)

    with torch.no_grad():
        normal(model.embed.weight, std)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, Attention):
                normal(module.qkv.weight, std)
                normal(module.out.weight, residual)
                for zero in (module.qkv.bias, module.out.bias, module.sinks):
                    zero.zero_()
            elif isinstance(module, Router):
                normal(module.weight, std)
                module.bias.zero_()
            elif isinstance(module, Experts):
                normal(module.gate_up, std)
                normal(module.down, residual)
                module.gate_up_bias.zero_()
                module.down_bias.zero_()
        if model.head is not None:
            normal(model.head.weight, std)
    return model


def build(
    config: ModelConfig | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> Transformer:
    """A freshly initialised :class:`Transformer` of a config or a preset's name, on `device`, in `dtype` (None: fp32)."""
    if isinstance(config, str):
        config = preset(config)
    try:
        with torch.device(device):
            model = Transformer(config)
        model = model.to(dtype or torch.float32)
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, torch.cuda.OutOfMemoryError) or ("alloc" not in str(e) and "overflow" not in str(e).lower()):
            raise
        raise ConfigError(
            f"no memory here for a model of {config.parameter_count():.3g} parameters; make it smaller"
        ) from e
    return init_weights(model, seed)
