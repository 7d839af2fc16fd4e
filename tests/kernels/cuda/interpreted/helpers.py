"""Plain counterparts and poisoned buffers for the interpreted kernel tests."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """Checkpoint bytes [E, N, K/32, 16] and [E, N, K/32] -> float64 [E, N, K], by the table of the OCP format."""
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    values = E2M1.double()[nibbles.long()] * torch.exp2(scales.double() - 127).unsqueeze(-1)
    return values.flatten(-2)


def random_packed(E: int, N: int, K: int, low: int = 118, high: int = 124, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Blocks and scales of random codes, scales in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (E, N, K // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(low, high, (E, N, K // 32), dtype=torch.uint8, generator=generator)


def swiglu(h: Tensor, limit: float = 7.0, alpha: float = 1.702) -> Tensor:
    """[..., 2F] of alternating gate and up -> [..., F]."""
    gate, up = h[..., 0::2].clamp(max=limit), h[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||, infinite where anything is not finite."""
    out, expected = out.detach().double(), expected.detach().double()
    assert out.shape == expected.shape, (out.shape, expected.shape)
    if not bool(torch.isfinite(out).all()):
        return float("inf")
    return float((out - expected).norm() / expected.norm().clamp(min=1e-30))


def poisoned(t: Tensor, margin: int = 512) -> Tensor:
    """A copy of `t` that lies between two margins of NaN (255 in integers): a stray read spoils the result."""
    whole = torch.empty(t.numel() + 2 * margin, dtype=t.dtype)
    whole.fill_(float("nan") if t.is_floating_point() else -1 if t.dtype.is_signed else 255)
    view = whole[margin : margin + t.numel()].view(t.shape)
    view.copy_(t)
    return view


@contextlib.contextmanager
def poisoned_outputs():
    """Every tensor the wrappers allocate starts as NaN (or -1) with a margin, which must be untouched at the end."""
    made: list[tuple[Tensor, int]] = []
    margin = 256
    plain = torch.Tensor.new_empty

    def new_empty(self, *shape, dtype=None, device=None, **other):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = 1
        for n in shape:
            size *= n
        whole = plain(self, size + 2 * margin, dtype=dtype or self.dtype, device=device or self.device, **other)
        bad = float("nan") if whole.is_floating_point() else 165 if whole.dtype == torch.uint8 else -7
        whole.fill_(bad)
        made.append((whole, size))
        return whole[margin : margin + size].view(shape)

    torch.Tensor.new_empty = new_empty
    try:
        yield
    finally:
        torch.Tensor.new_empty = plain
    for whole, size in made:
        for edge in (whole[:margin], whole[margin + size :]):
            untouched = edge.isnan() if edge.is_floating_point() else edge == (165 if edge.dtype == torch.uint8 else -7)
            assert bool(untouched.all()), "a kernel wrote outside its output"
