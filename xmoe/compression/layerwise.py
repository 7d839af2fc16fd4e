"""Through a model one layer at a time, with the MoE's inputs in view; the layers may be in memory or come from disk.

`Transformer.forward` takes all layers at once and returns what the routers decided. Some questions need more than that
(what would the experts that were *not* chosen have said?) and some models do not fit in memory. Both are served by the
same walk: batches wait between layers as [B, S, D] tensors, a layer is visited by all of them, then it may go.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.weights import stream_layers
from xmoe.compression.identity import hash_of
from xmoe.errors import DataError
from xmoe.model.config import ModelConfig
from xmoe.model.rope import concentration, inverse_frequencies, rope_tables
from xmoe.model.router import Routing
from xmoe.model.transformer import Block


class Batch(NamedTuple):
    """tokens int64 [B, S]; mask bool [B, S] or None, True for real tokens; positions [B, S] or None (0 .. S-1)."""

    tokens: Tensor
    mask: Tensor | None
    positions: Tensor | None

    @property
    def real_tokens(self) -> int:
        return self.tokens.numel() if self.mask is None else int(self.mask.sum())


class Visit(NamedTuple):
    """One batch in one layer: real tokens only.

    inputs [T, D]: what the MoE receives, after its norm. routing: over the same T tokens.
    """

    batch: int
    inputs: Tensor
    routing: Routing


class StoredModel:
    """A checkpoint in the place of a model for whoever looks at one layer after the other: memory holds one, packed.

    Attributes:
        config: of the model. hash: as :func:`~xmoe.compression.identity.model_hash` of it.
    """

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto"):
        self.config, self.hash = checkpoint.config, hash_of(checkpoint.config, checkpoint.weight)
        self._source = (checkpoint, device, dtype)

    @property
    def blocks(self) -> Iterator[Block]:
        """The layers, first to last, read from disk each time."""
        for block in stream_layers(*self._source):
            yield block
            del block
            return_freed_memory()


def as_batches(batches: Iterable, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """Tensors [B, S], (tokens, mask) pairs, or anything with `.tokens` and perhaps `.mask`, as :class:`Batch`.

    A mask may pad on either side; positions count real tokens, and padding gets -1.
    """
    for item in batches:
        tokens, mask = (item, None) if isinstance(item, Tensor) else _fields(item)
        if tokens.dim() != 2:
            raise DataError(f"a batch has shape {list(tokens.shape)}; expected token ids [batch, sequence]")
        tokens = tokens.to(device)
        if mask is None or bool(mask.all()):
            yield Batch(tokens, None, None)
            continue
        mask = mask.to(device=device, dtype=torch.bool)
        counted = mask.long().cumsum(-1) - 1
        yield Batch(tokens, mask, counted.masked_fill(~mask, -1))


def _fields(item) -> tuple[Tensor, Tensor | None]:
    if hasattr(item, "tokens"):
        return item.tokens, getattr(item, "mask", None)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    raise DataError(
        f"a batch is a {type(item).__name__}; expected token ids [batch, sequence], or a pair of ids and mask"
    )


def real_routing(routing: Routing, mask: Tensor | None) -> Routing:
    """`routing` over the real tokens only."""
    if mask is None:
        return routing
    chosen = mask.reshape(-1)
    return Routing(*(None if t is None else t[chosen] for t in routing))


def through_block(
    block: Block, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, norms: bool = True
) -> tuple[Tensor, Tensor, Routing]:
    """As calling `block` (bit for bit), and the MoE's inputs [B, S, D] between the two outputs."""
    x = x + block.attn(block.attn_norm(x), cos, sin, positions, None)
    inputs = block.moe_norm(x)
    mixture, routing = block.moe(inputs, None, norms)
    return x + mixture, inputs, routing


@torch.no_grad()
def walk(
    config: ModelConfig,
    hidden: list[Tensor],
    layers: Iterable[Block],
    batches: list[Batch],
    visit: Callable[[int, Block, Iterator[Visit]], None],
    norms: bool = True,
) -> list[Tensor]:
    """Send `batches` through `layers`; `visit(layer, block, visits)` sees every layer once, with all batches passing by.

    `hidden` holds the embedded tokens [B, S, D] of each batch. It is overwritten and returned: what leaves the last block,
    before the final norm.
    """
    inverse = inverse_frequencies(config)
    scale = concentration(config)

    def passing(block: Block) -> Iterator[Visit]:
        for i, batch in enumerate(batches):
            x = hidden[i]
            at = torch.arange(x.shape[1], device=x.device).unsqueeze(0) if batch.positions is None else batch.positions
            cos, sin = rope_tables(at, inverse.to(x.device), scale)
            hidden[i], inputs, routing = through_block(block, x, cos, sin, batch.positions, norms)
            flat = inputs.reshape(-1, inputs.shape[-1])
            flat = flat if batch.mask is None else flat[batch.mask.reshape(-1)]
            yield Visit(i, flat, real_routing(routing, batch.mask))

    for layer, block in enumerate(layers):
        visits = passing(block)
        visit(layer, block, visits)
        for _ in visits:  # a visitor may look at some batches only; the rest must pass all the same
            pass
        del block, visits  # a layer from disk makes room before the next one is read
        return_freed_memory()
    return hidden


def return_freed_memory() -> None:
    """glibc keeps what decoding experts freed, in pieces too small for the next layer, and would so grow layer by layer."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
