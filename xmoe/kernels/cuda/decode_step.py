"""A whole decode step of a Transformer in one CUDA graph: one token for each of B sequences, without a word from the host.

An ideal kernel of this step takes 4 to 8 microseconds, a launch from Python 20 and more; captured once and replayed, the
step costs what its kernels cost. That asks for fixed addresses and fixed shapes, so everything that changes lives in
device memory: tokens, positions, and how many rows each expert got. Norms, sums of experts and residuals are fused
(`norm`), and so are the rotary embedding and the cache write (`rope`).

A layer launches: norm, qkv, rope + cache, attention, join, out, norm, router, route, gate_up, down. The norm that begins
the next layer adds up the experts of this one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe.errors import ConfigError
from xmoe.kernels.cuda.backend import in_kernel_order
from xmoe.kernels.cuda.decode_attention import decode_attention
from xmoe.kernels.cuda.experts import expert_parts, tile_height
from xmoe.kernels.cuda.norm import Experts, add_and_norm
from xmoe.kernels.cuda.repack import Repacked
from xmoe.kernels.cuda.rope import rope_into_cache
from xmoe.kernels.cuda.routing import choose_and_sort


class DecodeStep:
    """The decode loop of `model` (an `xmoe.model.Transformer`) for B sequences of at most `max_length` tokens.

    model: on the device, in eval mode, packed experts best prepared by `triton_backend.prepare`.
    tables: cos and sin, fp32 [max_length, Dh/2], a row a position (`xmoe.model.rope.rope_tables`).
    greedy: each step writes the likeliest next token into `tokens`, so steps can follow one another; else the caller
        puts them there.

    Attributes:
        tokens, positions: int64 [B], what the next step reads: a token and how many tokens stand before it.
        logits: [B, V], what the last step wrote.
        keys, values: a layer's caches [B, L, G, Dh]; sliding layers have rings of L = window.
    """

    def __init__(
        self, model: nn.Module, batch: int, max_length: int, tables: tuple[Tensor, Tensor], *, greedy: bool = True
    ):
        config = model.config
        self.model, self.greedy, self.max_length = model, greedy, max_length
        self.cos, self.sin = tables
        if self.cos.shape[0] < max_length:
            raise ConfigError(f"the rotary tables have {self.cos.shape[0]} rows; expected max_length, {max_length}")
        for i, block in enumerate(model.blocks):
            if block.moe.router.selection_bias is not None:
                raise ConfigError(f"layer {i}'s router has a selection bias; the decode step chooses by logits alone")
        if any(name.endswith("adapter") for name, _ in model.named_modules()):
            raise ConfigError("the decode step knows no adapters; merge them into the weights first")
        weight = model.embed.weight
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.positions = torch.zeros_like(self.tokens)
        self.logits: Tensor | None = None
        self.length = 0  # the longest sequence so far; the host's own count, for the check in `step`
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in range(len(model.blocks)):
            window = config.window(layer)
            room = max_length if window is None else min(window, max_length)
            shape = batch, room, config.num_key_value_heads, config.head_dim
            self.keys.append(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
            self.values.append(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        # Resolved once: repacking must not happen while a graph is captured.
        self.matrices = [
            (
                in_kernel_order(block.moe.experts.gate_up, paired=True),
                in_kernel_order(block.moe.experts.down, paired=False),
            )
            for block in model.blocks
        ]
        self.masks = [_mask(block.moe.router) for block in model.blocks]
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Read prompts [B, S] of equal length from the start -> logits [B, V] after them; the next step goes on there.

        With `greedy` the likeliest next tokens are put in place, ready for :meth:`step`.
        """
        S = tokens.shape[1]
        if not 1 <= S < self.max_length:
            raise ConfigError(f"prompts have {S} tokens; expected 1 to {self.max_length - 1} (max_length - 1)")
        features = self.model.features(tokens, _Filler(self))
        logits = self.model.unembed(features.hidden[:, -1])
        self.positions.fill_(S)
        self.length = S
        if self.greedy:
            self.tokens.copy_(logits.argmax(-1))
        return logits

    @torch.no_grad()
    def step(self) -> Tensor:
        """One more token for every sequence -> logits [B, V], valid until the next step; replays the graph where captured."""
        if self.length >= self.max_length:
            raise ConfigError(f"sequences have reached {self.length} tokens; max_length is {self.max_length}")
        self.length += 1
        if self.graph is not None:
            self.graph.replay()
        else:
            self.logits = self._run()
        return self.logits

    @torch.no_grad()
    def capture(self) -> None:
        """Record the step as a CUDA graph. Tokens and positions are as before afterwards; caches lose nothing."""
        before = self.tokens.clone(), self.positions.clone()
        stream = torch.cuda.Stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream(self.tokens.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and lets cuBLAS allocate its workspace, which capture forbids
                self._run()
                self._restore(before)
        torch.cuda.current_stream(self.tokens.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._run()
        self._restore(before)
        self.graph = graph

    def _restore(self, before: tuple[Tensor, Tensor]) -> None:
        self.tokens.copy_(before[0])
        self.positions.copy_(before[1])

    def _run(self) -> Tensor:
        model, config = self.model, self.model.config
        residual = F.embedding(self.tokens, model.embed.weight)
        experts: Experts | None = None
        for layer, block in enumerate(model.blocks):
            attention = block.attn
            residual, normed, _ = add_and_norm(residual, block.attn_norm.weight, config.rms_norm_eps, experts=experts)
            qkv = F.linear(normed, attention.qkv.weight, attention.qkv.bias)
            keys, values = self.keys[layer], self.values[layer]
            q = rope_into_cache(qkv, self.cos, self.sin, self.positions, config.num_attention_heads, keys, values)
            mixed = decode_attention(q.unsqueeze(1), keys, values, attention.sinks, lengths=self.positions)
            mixed = F.linear(mixed.flatten(1), attention.out.weight, attention.out.bias)
            experts, residual = self._mixture(layer, residual, mixed)
        _, normed, _ = add_and_norm(residual, model.norm.weight, config.rms_norm_eps, experts=experts)
        logits = F.linear(normed, model.unembedding)
        if self.greedy:
            self.tokens.copy_(logits.argmax(-1))
        self.positions.add_(1)
        return logits

    def _mixture(self, layer: int, residual: Tensor, mixed: Tensor) -> tuple[Experts, Tensor]:
        """The second half of a block, up to sums that the next norm will add."""
        block = self.model.blocks[layer]
        router, stack = block.moe.router, block.moe.experts
        gate_up, down = self.matrices[layer]
        # Weights that are exact in fp16 want fp16 rows: the norm writes them beside its own, rounded once.
        half = isinstance(gate_up, Repacked) and gate_up.exact and residual.dtype == torch.bfloat16
        residual, normed, fp16 = add_and_norm(
            residual, block.moe_norm.weight, self.model.config.rms_norm_eps, delta=mixed, half=half
        )
        logits = F.linear(normed.to(router.weight.dtype), router.weight, router.bias).float()
        E, k = router.weight.shape[0], min(router.num_experts_per_tok, router.num_kept)
        height = tile_height(len(self.tokens) * k, E, gate_up, self.tokens.device)
        indices, weights, rows = choose_and_sort(logits, k, height, self.masks[layer])
        partial, _ = expert_parts(
            fp16 if half else normed,
            rows,
            gate_up,
            stack.gate_up_bias,
            down,
            stack.down_bias,
            limit=stack.limit,
            alpha=1.702,
        )
        return Experts(partial, indices, weights), residual


def _mask(router: nn.Module) -> Tensor | None:
    """0 for the experts that a pruning plan keeps, -inf for the others; None where all are kept."""
    if router.kept is None:
        return None
    return torch.zeros_like(router.kept, dtype=torch.float32).masked_fill(~router.kept, float("-inf"))


class _Filler:
    """The cache that `prefill` shows the model: keeps keys and values where the steps will look for them."""

    length = 0

    def __init__(self, step: DecodeStep):
        self.step = step

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for kept, new in ((self.step.keys[layer], k), (self.step.values[layer], v)):
            S, room = new.shape[1], kept.shape[1]
            last = torch.arange(max(0, S - room), S, device=new.device)
            kept[:, last % room] = new[:, last].to(kept.dtype)
        return k, v, positions

    def advance(self, count: int) -> None:
        """Positions are set by `prefill` itself."""
