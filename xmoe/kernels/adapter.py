"""A low-rank change of a weight that itself stays as it is: what an adapter (LoRA, arXiv 2106.09685) is to the kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Adapter(NamedTuple):
    """W becomes W + scale * b a: a [r, in] and b [out, r], or [E, r, in] and [E, out, r] beside the weight of E experts.

    The product is always taken as b (a x), so nothing of W's size comes to be, and W may be packed.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def of(self, expert: int) -> Adapter:
        """That of one expert, where there is one for each."""
        return Adapter(self.a[expert], self.b[expert], self.scale)


def parts(*adapters: Adapter | None) -> tuple[tuple[float, ...], list[Tensor | None]]:
    """Scales (0.0 where there is no adapter), and a, b of each in turn: what an autograd function takes as arguments."""
    tensors = [t for low in adapters for t in ((None, None) if low is None else (low.a, low.b))]
    return tuple(0.0 if low is None else low.scale for low in adapters), tensors
