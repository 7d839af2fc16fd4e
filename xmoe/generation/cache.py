"""KVCache: the keys and values of the tokens so far, so that a new token costs one token of work.

A full-attention layer needs every key, so its buffer grows (by doubling: the copies cost O(1) a token on average). A
sliding layer with window W never looks further back than W - 1 keys, so its buffer is a ring that stops growing at
`W + rollback` keys; a new key overwrites the oldest. Keys in a ring are out of order, which attention does not mind: it
masks by position, and the cache hands it the position of every key it returns.

A *column* is the how-manieth token a row was given, padding included; a *position* is what the rotary embedding sees, -1
for padding. In a left-padded batch all rows share their columns and differ in their positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xmoe.kernels.cpu.decode_step import Room

SLIDING = "sliding_attention"


class KVCache:
    """Keys and values of every layer of one batch.

    config: anything with `layer_types`, `sliding_window`, `num_key_value_heads` and `head_dim` (a ModelConfig).
    reserve: the number of columns to allocate at once; more are added when needed.
    rollback: how many tokens `truncate` must be able to take back. A ring forgets, so this is paid for with `rollback`
        extra keys in each sliding layer; full layers can always go back.

    Dtype and device are those of the first keys. In a row whose padding is not all on the left, a ring counts padding
    columns as if they were tokens: put padding first, or in the last call.
    """

    def __init__(self, config, *, reserve: int = 0, rollback: int = 0) -> None:
        if reserve < 0 or rollback < 0:
            raise ValueError(f"reserve and rollback count tokens and cannot be negative: {reserve}, {rollback}")
        self.config = config
        self.reserve = reserve
        self.rollback = rollback
        self.window = config.sliding_window
        self.ring_size = None if self.window is None else self.window + rollback
        sizes = [self.ring_size if kind == SLIDING else None for kind in config.layer_types]
        self._layers = [_Layer(size) for size in sizes]
        self._length = 0
        self._held_from = 0  # the oldest column that the rings still hold
        self._positions: Tensor | None = None  # [B, capacity], one table for all layers
        self._step: _Step | None = None

    # The four calls of the protocol the model knows ---------------------------------------------------------------

    @property
    def length(self) -> int:
        """Columns so far: the tokens every row was given, padding included."""
        return self._length

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores `k`, `v` [B, S, G, Dh] of one layer; returns all keys and values its S queries may need.

        positions: int64 [B, S], -1 = padding. Returns (k_all, v_all [B, L, G, Dh], k_pos [B, L]); they are views of the
        cache, valid until the next call. Every layer of one step gets the same `positions`; `advance` ends the step.
        """
        if self._step is None or self._step.positions is not positions:
            self._step = self._begin(positions)
        step, store = self._step, self._layers[layer]
        if store.ring_size is None:
            store.make_room(self._length + step.count, k, v, self.reserve)
            store.k[:, self._length : self._length + step.count] = k
            store.v[:, self._length : self._length + step.count] = v
            return *store.first(self._length + step.count), self._positions[:, : self._length + step.count]
        if step.ring_fits:
            store.make_room(min(self._length + step.count, store.ring_size), k, v, self.reserve)
            store.write(step.ring_slots, k, v)
            return *store.first(step.ring_keys), step.ring_positions
        # The chunk would overwrite keys that its own first queries still need: attend to ring + chunk, then keep the tail.
        k_all, v_all = k, v
        if self._length:
            k_old, v_old = store.first(min(self._length, store.ring_size))
            k_all, v_all = torch.cat([k_old, k], 1), torch.cat([v_old, v], 1)
        store.make_room(min(self._length + step.count, store.ring_size), k, v, self.reserve)
        kept = len(step.ring_slots)
        store.write(step.ring_slots, k[:, -kept:], v[:, -kept:])
        return k_all, v_all, step.ring_positions

    def room(self, positions: Tensor, heads: tuple[int, int], dtype: torch.dtype) -> list[Room] | None:
        """For kernels that write new keys themselves, in the place of `update`: where each layer's go; None if not in place.

        positions: int64 [B, S] of the new tokens; heads: G and Dh. None where the tokens need keys that their own would
        overwrite in a ring, or where keys are held in another dtype.
        """
        if self._step is None or self._step.positions is not positions:
            self._step = self._begin(positions)
        step, end = self._step, self._length + positions.shape[1]
        if not step.ring_fits:
            return None
        like = torch.empty(positions.shape[0], 0, *heads, dtype=dtype, device=positions.device)
        new = torch.arange(self._length, end, device=positions.device)
        everything, ring = self._positions[:, :end].contiguous(), None
        rooms = []
        for store in self._layers:
            full = store.ring_size is None
            store.make_room(end if full else min(end, store.ring_size), like, like, self.reserve)
            if store.k.dtype != dtype:
                return None
            if full:
                rooms.append(Room(store.k, store.v, new, end, everything))
            else:
                ring = step.ring_positions.contiguous() if ring is None else ring
                rooms.append(Room(store.k, store.v, step.ring_slots, step.ring_keys, ring))
        return rooms

    def advance(self, n: int) -> None:
        """Counts `n` new columns, after the last layer has stored them."""
        self._length += n
        if self.ring_size is not None:
            self._held_from = max(self._held_from, self._length - self.ring_size)
        self._step = None

    def truncate(self, length: int) -> None:
        """Forgets every column from `length` on, as if they had never been given.

        Going back `rollback` columns from the furthest point reached always works; so does `length` 0, and any length
        while no ring has wrapped. ValueError where a ring has already overwritten keys that the next token would need.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate to {length} columns: the cache holds {self._length}")
        if length and self.ring_size is not None and self._held_from > max(0, length - self.window + 1):
            raise ValueError(
                f"cannot go back from {self._length} to {length} columns: the sliding layers keep window {self.window} "
                f"+ rollback {self.rollback} keys; make the cache with rollback={self._length - length} or more"
            )
        self._length = length
        if length == 0:
            self._held_from = 0
        self._step = None

    # Going back further than a ring remembers ----------------------------------------------------------------------------

    def mark(self) -> Mark:
        """Remembers this point, so that `back_to` can return to it from any later one; copies the rings only."""
        rings = [
            None if store.ring_size is None or store.k is None else (store.k.clone(), store.v.clone())
            for store in self._layers
        ]
        return Mark(self._length, self._held_from, rings)

    def back_to(self, mark: Mark) -> None:
        """Forgets everything after `mark`. The cache must not have been truncated below it in the meantime."""
        for store, ring in zip(self._layers, mark.rings, strict=True):
            if ring is not None:
                store.k, store.v = (t.clone() for t in ring)
        self._length, self._held_from, self._step = mark.length, mark.held_from, None

    # For those who handle the batch -----------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows held; 0 before the first update."""
        return 0 if self._positions is None else self._positions.shape[0]

    def select(self, rows: Tensor | list[int], *, reserve: int = 0) -> KVCache:
        """A new cache of the given rows, in that order and as often as named; this one stays as it is.

        reserve: columns to allocate in the new cache, for what is about to be added.
        """
        new = KVCache(self.config, reserve=max(reserve, self.reserve), rollback=self.rollback)
        new._length, new._held_from = self._length, self._held_from
        if self._positions is None:
            return new
        index = torch.as_tensor(rows, dtype=torch.int64, device=self._positions.device)
        new._positions = self._positions[:, : self._length].index_select(0, index)
        for mine, theirs in zip(self._layers, new._layers, strict=True):
            if mine.k is None:
                continue
            used = self._length if mine.ring_size is None else min(self._length, mine.ring_size)
            wanted = max(reserve, used) if mine.ring_size is None else min(max(reserve, used), mine.ring_size)
            theirs.k, theirs.v = (
                torch.empty(len(index), wanted, *t.shape[2:], dtype=t.dtype, device=t.device) for t in (mine.k, mine.v)
            )
            theirs.k[:, :used] = mine.k[index, :used]
            theirs.v[:, :used] = mine.v[index, :used]
        return new

    def expand(self, batch: int, *, reserve: int = 0) -> KVCache:
        """A new cache of `batch` copies of this one row: a shared prefix is computed once and continued many ways."""
        if self.batch != 1:
            raise ValueError(f"expand copies one row; this cache holds {self.batch}")
        return self.select([0] * batch, reserve=reserve)

    def bytes(self) -> int:
        """Memory held by keys and values now, reserved room included, in bytes."""
        return sum(t.nbytes for store in self._layers for t in (store.k, store.v) if t is not None)

    @staticmethod
    def planned_bytes(config, length: int, *, batch: int = 1, dtype=torch.bfloat16, rollback: int = 0) -> int:
        """Bytes of keys and values at `length` columns: sum over layers of 2 * G * Dh * itemsize * min(length, window)."""
        key_and_value = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
        keys = 0
        for kind in config.layer_types:
            keys += min(length, config.sliding_window + rollback) if kind == SLIDING else length
        return batch * keys * key_and_value

    # How one step lies in the buffers --------------------------------------------------------------------------------

    def _begin(self, positions: Tensor) -> _Step:
        batch, count = positions.shape
        start, end = self._length, self._length + count
        if self._positions is None or self._positions.shape[1] < end:
            self._positions = _grown(self._positions, batch, end, self.reserve, positions)
        self._positions[:, start:end] = positions
        if self.ring_size is None:
            return _Step(positions, count)
        size = self.ring_size
        ring_fits = end <= size or count <= size - self.window + 1
        first_kept = max(start, end - size)
        slots = torch.arange(first_kept, end, device=positions.device) % size
        if ring_fits:
            ring_positions = self._ring_positions(end, max(self._held_from, end - size))
        elif start:
            ring_positions = torch.cat([self._ring_positions(start, self._held_from), positions], 1)
        else:
            ring_positions = positions
        return _Step(positions, count, ring_fits, slots, min(end, size), ring_positions)

    def _ring_positions(self, end: int, oldest: int) -> Tensor:
        """Positions [B, min(end, ring)] by slot when `end` columns have been written; -1 where a slot is out of date."""
        slot = torch.arange(min(end, self.ring_size), device=self._positions.device)
        column = end - 1 - (end - 1 - slot) % self.ring_size
        # After a truncation some slots hold keys of columns that were taken back; their older keys are gone.
        return self._positions[:, column].masked_fill(column < oldest, -1)


@dataclass(frozen=True)
class Mark:
    """A point of a cache: its length, and what its rings held there."""

    length: int
    held_from: int
    rings: list[tuple[Tensor, Tensor] | None]


@dataclass
class _Step:
    """What all layers of one forward pass share: where new keys go and which positions the returned keys have."""

    positions: Tensor
    count: int
    ring_fits: bool = True
    ring_slots: Tensor | None = None
    ring_keys: int = 0
    ring_positions: Tensor | None = None


class _Layer:
    """Key and value buffers [B, capacity, G, Dh] of one layer; `ring_size` None grows without end."""

    def __init__(self, ring_size: int | None) -> None:
        self.ring_size = ring_size
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def make_room(self, columns: int, k: Tensor, v: Tensor, reserve: int) -> None:
        if self.k is None or self.k.shape[1] < columns:
            self.k = _grown(self.k, k.shape[0], columns, reserve, k, self.ring_size)
            self.v = _grown(self.v, v.shape[0], columns, reserve, v, self.ring_size)

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.k.index_copy_(1, slots, k.to(self.k.dtype))
        self.v.index_copy_(1, slots, v.to(self.v.dtype))

    def first(self, keys: int) -> tuple[Tensor, Tensor]:
        return self.k[:, :keys], self.v[:, :keys]


def _grown(
    old: Tensor | None, batch: int, columns: int, reserve: int, like: Tensor, limit: int | None = None
) -> Tensor:
    """A buffer of at least `columns` columns (twice the old one, the reserve, never above `limit`) that begins with `old`."""
    capacity = max(columns, reserve, 0 if old is None else 2 * old.shape[1])
    if limit is not None:
        capacity = min(capacity, limit)
    new = torch.empty(batch, capacity, *like.shape[2:], dtype=like.dtype, device=like.device)
    if old is not None:
        new[:, : old.shape[1]] = old
    return new
