"""Keys and values of shared prefixes: many rows continue from few, and rows of one batch may have unequal lengths.

The generation cache grows in place and counts columns; here nothing is ever appended twice, rows are read by several
batches, and padding lies between a short prefix and its continuation. Attention masks by position, so padding keys
(position -1) may lie anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PrefixCache:
    """The cache protocol of the model (`length`, `update`, `advance`) for one step that continues `parent`'s rows.

    config: the model's. parent: None at the root. rows: which parent row each row of this batch continues.
    keep: whether anything will continue this step; without it no key outlives its layer.
    """

    def __init__(self, config, parent: PrefixCache | None = None, rows: list[int] | None = None, keep: bool = True):
        self.config = config
        self.keep = keep
        self.length = 0  # rows differ in length: callers pass positions, and nobody needs this count
        self._parent = parent
        self._rows = None if rows is None or parent is None else torch.tensor(rows, device=parent.device)
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._positions: dict[int | None, Tensor] = {}  # window -> positions of the stored keys
        self._newest: dict[int, Tensor] = {}  # window -> columns of the keys that later tokens can still see

    @property
    def device(self) -> torch.device:
        return next(iter(self._positions.values())).device

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [B, S, G, Dh] at positions [B, S] -> the parents' keys and these, [B, P + S, G, Dh], and their positions."""
        window = self.config.window(layer)
        if self._parent is not None:
            old_k, old_v = self._parent._stored[layer]
            k, v = torch.cat([self._pick(old_k), k], 1), torch.cat([self._pick(old_v), v], 1)
            if window not in self._positions:
                self._positions[window] = torch.cat([self._pick(self._parent._positions[window]), positions], 1)
        elif window not in self._positions:
            self._positions[window] = positions
        seen = self._positions[window]
        if self.keep:
            self._stored[layer] = self._visible_later(window, k, v)
        return k, v, seen

    def advance(self, count: int) -> None:
        """The step is over: sliding layers' positions follow the keys that were kept."""
        for window, columns in self._newest.items():
            self._positions[window] = self._positions[window].gather(1, columns)
        self._newest = {}
        self._parent = None

    def _pick(self, stored: Tensor) -> Tensor:
        if stored.shape[0] == 1:
            return stored.expand(len(self._rows), *stored.shape[1:])
        return stored.index_select(0, self._rows)

    def _visible_later(self, window: int | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A sliding layer's later queries see the newest W - 1 keys at most; the others need not be carried along."""
        if window is None or k.shape[1] < window:
            return k.contiguous(), v.contiguous()  # not a slice that would hold the queries' memory too
        if window not in self._newest:
            self._newest[window] = self._positions[window].topk(window - 1, dim=1).indices
        columns = self._newest[window][:, :, None, None]
        return k.take_along_dim(columns, 1), v.take_along_dim(columns, 1)
