"""A few tokens through all blocks in one call of C: what one token costs, beside its products, is asking for them.

From Python a layer takes some twenty operations, each of which costs microseconds before it computes anything; a whole
token takes one call here. The arithmetic is that of the modules, kernel by kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xmoe.kernels.cpu.library import DecodeLayer, DecodeStepArguments, run
from xmoe.kernels.cpu.products import MANY_FEW, Stack

MOST_ROWS = MANY_FEW
ALPHA = 1.702


class Layer(NamedTuple):
    """The tensors of one block, all of one dtype (but for packed weights) and contiguous; shapes as in the modules.

    The projections of attention are dense or int8 without zeros, the router is dense, experts have any form.
    """

    attn_norm: Tensor
    qkv: Stack
    qkv_bias: Tensor
    out: Stack
    out_bias: Tensor
    sinks: Tensor
    moe_norm: Tensor
    router: Tensor
    router_bias: Tensor
    gate_up: Stack
    gate_up_bias: Tensor
    down: Stack
    down_bias: Tensor


class Room(NamedTuple):
    """Where one layer keeps keys and values: keys, values [B, R, G, Dh]; slots int64 [S] are the rows that new ones take.

    count rows are in use once they are in; key_positions int64 [B, count] says where they stand.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    count: int
    key_positions: Tensor


class Choice(NamedTuple):
    """How one layer chooses: k experts; kept bool [E] or None; selection_bias fp32 [E] or None. Its window, or None."""

    k: int
    kept: Tensor | None
    selection_bias: Tensor | None
    window: int | None
    limit: float


def decode_step(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    layers: Sequence[Layer],
    rooms: Sequence[Room],
    choices: Sequence[Choice],
    *,
    heads: int,
    intermediate_size: int,
    eps: float,
    norms: bool = False,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """x [B, S, D], B * S up to MOST_ROWS, becomes the stream behind the last block, in place; keys and values go to their rooms.

    cos, sin: fp32 [1 or B, S, Dh/2]. positions: int64 [B, S]. Returns for each layer logits fp32 [T, E], indices int64
    [T, K], weights fp32 [T, K] and, if `norms`, output lengths [T, K], over T = B * S tokens.
    """
    B, S, D = x.shape
    T, E, K = B * S, [layer.router.shape[0] for layer in layers], [choice.k for choice in choices]
    logits = torch.empty(T * sum(E), dtype=torch.float32).split([T * e for e in E])
    indices = torch.empty(T * sum(K), dtype=torch.int64).split([T * k for k in K])
    weights = torch.empty(T * sum(K), dtype=torch.float32).split([T * k for k in K])
    lengths = torch.empty(T * sum(K), dtype=torch.float32).split([T * k for k in K]) if norms else [None] * len(K)
    table = (DecodeLayer * len(layers))()
    for i, (layer, room, choice) in enumerate(zip(layers, rooms, choices)):
        up, down, written = layer.gate_up, layer.down, (logits[i], weights[i], lengths[i], indices[i])
        attention = layer.attn_norm, *layer.qkv[:2], layer.qkv_bias, *layer.out[:2], layer.out_bias, layer.sinks
        experts = *up[:3], layer.gate_up_bias, *down[:3], layer.down_bias
        pointers = (
            *attention, layer.moe_norm, layer.router, layer.router_bias, *experts, *room[:3], room.key_positions,
            choice.kept, choice.selection_bias, *written,
        )  # fmt: skip
        sizes = (
            room.keys.shape[1], room.count, choice.window or 0, E[i], choice.k,
            *layer.qkv[3:], *layer.out[3:], *up[3:], *down[3:], choice.limit, ALPHA,
        )  # fmt: skip
        table[i] = DecodeLayer(*[None if t is None else t.data_ptr() for t in pointers], *sizes)
    G, Dh = rooms[0].keys.shape[2:]
    angle_batch = 0 if cos.shape[0] == 1 else cos.stride(0)
    step = DecodeStepArguments(
        ctypes.addressof(table), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), positions.data_ptr(),
        len(layers), B, S, D, intermediate_size, heads, G, Dh, angle_batch, eps,
    )  # fmt: skip
    run("decode_step", x.dtype, ctypes.addressof(step))
    return [
        (
            logits[i].view(T, e),
            indices[i].view(T, k),
            weights[i].view(T, k),
            None if not norms else lengths[i].view(T, k),
        )
        for i, (e, k) in enumerate(zip(E, K))
    ]
