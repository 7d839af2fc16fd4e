"""Which steps of generation one call in C takes, and what it needs of the modules: see `xmoe.kernels.cpu.decode_step`.

It serves a few tokens behind a cache on the CPU, where nothing is unusual: experts dense or packed, one dtype, no gradients,
no adapters, no hooks, no other dispatcher. Everything else goes from module to module as always, with the same result up
to rounding.
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
        heads=attention.heads, intermediate_size=blocks[0].moe.experts.down.shape[2], eps=eps, norms=norms,
    )  # fmt: skip
    return tuple(Routing(*each) for each in found)


def _layer(block: nn.Module, dtype: torch.dtype) -> Layer | None:
    """The tensors of a block; None where it is not as the kernel takes it.

    Asked for every token and layer, so it looks straight into the modules' own dictionaries: nn.Module's way to an
    attribute costs half a microsecond, forty times a layer.
    """
    parts = block._modules
    attn, moe, attn_norm, moe_norm = parts["attn"], parts["moe"], parts["attn_norm"], parts["moe_norm"]
    qkv, out, router, experts = (
        attn._modules["qkv"],
        attn._modules["out"],
        moe._modules["router"],
        moe._modules["experts"],
    )
    for module in (block, attn_norm, attn, qkv, out, moe_norm, moe, router, experts):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return None
    if moe.dispatcher is not local_dispatch or type(experts) is not Experts:
        return None
    adapted = [module._modules.get("adapter") for module in (qkv, out, router)]
    adapted += [experts._modules.get(name) for name in ("gate_up_adapter", "down_adapter")]
    if any(adapter is not None for adapter in adapted):
        return None
    weights = experts._parameters
    stacks = dispatch.decode_stacks(*(weights[n] if n in weights else experts._modules[n] for n in ("gate_up", "down")))
    if stacks is None:
        return None
    gate_up, down = stacks
    projections = [
        dispatch.decode_projection(m._parameters.get("weight", m._modules.get("weight")), dtype) for m in (qkv, out)
    ]
    if any(p is None for p in projections):
        return None
    found = Layer(
        attn_norm._parameters["weight"], projections[0], qkv._parameters["bias"], projections[1], out._parameters["bias"],
        attn._parameters["sinks"], moe_norm._parameters["weight"], router._parameters["weight"], router._parameters["bias"],
        gate_up, weights["gate_up_bias"], down, weights["down_bias"],
    )  # fmt: skip
    for t in (*found, *(w.values for w in (gate_up, down) if not w.form)):
        if isinstance(t, Tensor) and (t.dtype is not dtype or not t.is_contiguous()):
            return None
    return found


def _choice(block: nn.Module, k: int | None) -> Choice | None:
    """How this layer chooses; None where its number of experts is one that the router itself must refuse."""
    attn, moe = block._modules["attn"], block._modules["moe"]
    router, experts = moe._modules["router"], moe._modules["experts"]
    k = router.num_experts_per_tok if k is None else k
    if not 1 <= k <= router._parameters["weight"].shape[0]:
        return None
    bias = router._buffers["selection_bias"]
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        return None
    return Choice(min(k, router.num_kept), router._buffers["kept"], bias, attn.window, experts.limit)
