"""Which steps of generation one call in C takes, and what it needs of the modules: see `xmoe.kernels.cpu.decode_step`.

It serves a few tokens behind a cache on the CPU, where nothing is unusual: experts in MXFP4 or as they were trained, one
dtype, no gradients, no adapters, no hooks, no other dispatcher. Everything else goes from module to module as always, with
the same result up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from xmoe.kernels import dispatch
from xmoe.kernels.cpu.decode_step import Choice, Layer
from xmoe.model.experts import Experts, local_dispatch
from xmoe.model.router import Routing


def take(
    blocks: Sequence[nn.Module],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: object,
    experts_per_tok: Sequence[int | None],
    *,
    eps: float,
    norms: bool,
) -> tuple[Routing, ...] | None:
    """x [B, S, D] through all blocks, in place; returns each layer's routing, or None (x untouched) where it is not ours.

    cos, sin fp32 [1 or B, S, Dh/2]; positions int64 [B, S]; `cache` has had no update for these tokens.
    """
    run = dispatch.decode_step(x)
    room: Callable | None = getattr(cache, "room", None)
    if run is None or room is None:
        return None
    layers = [_layer(block, x.dtype) for block in blocks]
    if not all(layers):
        return None
    choices = [_choice(block, k) for block, k in zip(blocks, experts_per_tok)]
    if not all(choices):
        return None
    attention = blocks[0].attn
    rooms = room(positions, (attention.kv_heads, attention.head_dim), x.dtype)
    if rooms is None:
        return None
    found = run(
        x, cos.contiguous(), sin.contiguous(), positions.contiguous(), layers, rooms, choices,
        heads=attention.heads, eps=eps, norms=norms,
    )  # fmt: skip
    return tuple(Routing(*each) for each in found)


def _layer(block: nn.Module, dtype: torch.dtype) -> Layer | None:
    """The tensors of a block; None where it is not as the kernel takes it."""
    attn, moe = block.attn, block.moe
    router, experts = moe.router, moe.experts
    modules = (block, block.attn_norm, attn, attn.qkv, attn.out, block.moe_norm, moe, router, experts)
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules):
        return None
    if moe.dispatcher is not local_dispatch or type(experts) is not Experts:
        return None
    adapters = attn.qkv.adapter, attn.out.adapter, router.adapter, experts.gate_up_adapter, experts.down_adapter
    if any(adapter is not None for adapter in adapters):
        return None
    gate_up, down = experts.gate_up, experts.down
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        gate_up_forms, down_forms = (gate_up, None), (down, None)
    elif dispatch.packed_in_c(gate_up, down):
        gate_up_forms, down_forms = (gate_up.blocks, gate_up.scales), (down.blocks, down.scales)
    else:
        return None
    found = Layer(
        block.attn_norm.weight, attn.qkv.weight, attn.qkv.bias, attn.out.weight, attn.out.bias, attn.sinks,
        block.moe_norm.weight, router.weight, router.bias,
        *gate_up_forms, experts.gate_up_bias, *down_forms, experts.down_bias,
    )  # fmt: skip
    whole = all(t is None or (t.is_contiguous() and t.dtype in (dtype, torch.uint8)) for t in found)
    return found if whole else None


def _choice(block: nn.Module, k: int | None) -> Choice | None:
    """How this layer chooses; None where its number of experts is one that the router itself must refuse."""
    router = block.moe.router
    k = router.num_experts_per_tok if k is None else k
    if not 1 <= k <= router.weight.shape[0]:
        return None
    bias = router.selection_bias
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        return None
    return Choice(min(k, router.num_kept), router.kept, bias, block.attn.window, block.moe.experts.limit)
