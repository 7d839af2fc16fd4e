"""Low rank: a weight [out, in] stored, and run, as two thin factors: left [out, r] times right [r, in].

With inputs of second moment G = L L^T (Cholesky; the identity where none is given), let U hold the first r left singular
vectors of W L. Then W' = U U^T W is the matrix of rank r with the least output error (Eckart and Young, applied to W L):

    mean over inputs x of ||W x - W' x||^2 = ||(W - W') L||_F^2 = sum of the squared singular values that were discarded

SVD-LLM (arXiv 2403.07378) writes the same matrix as U S V^T L^-1; since S V^T = U^T W L, the inverse cancels, and nothing
here divides by an L that may be close to singular. Factors take r (out + in) numbers, less than the out * in of the
whole if and only if r < out * in / (out + in).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xmoe.errors import CheckpointError, ConfigError


class Factors(NamedTuple):
    """left float64 [out, r] and right float64 [r, in], column i of one as long as row i of the other, strongest first.

    lost: the root of the sum of the squared singular values that were discarded.
    """

    left: Tensor
    right: Tensor
    lost: float


def factor(weight: Tensor, rank: int, moment: Tensor | None = None) -> Factors:
    """The best factors of rank `rank` for `weight` [out, in], in float64.

    Args:
        moment: second moment [in, in] of the inputs, positive definite; None weighs all directions alike (plain SVD).
    """
    out, width = weight.shape
    if not 1 <= rank <= min(out, width):
        raise ConfigError(f"rank {rank} of a {out} x {width} matrix: expected 1 to {min(out, width)}")
    w = weight.detach().double()
    if not bool(torch.isfinite(w).all()):
        raise CheckpointError("the weights hold NaN or infinity, which have no singular values")
    scaled = w if moment is None else w @ torch.linalg.cholesky(moment.double())
    # Eigenvectors of the smaller product of the two: several times faster than an SVD. Squaring costs singular values
    # below 1e-8 of the largest their digits, and those are the ones to discard.
    tall = out > width
    values, vectors = torch.linalg.eigh(scaled.T @ scaled if tall else scaled @ scaled.T)  # ascending
    top = vectors[:, -rank:].flip(1)
    basis = torch.linalg.qr(scaled @ top).Q if tall else top
    right = basis.T @ w
    size = right.norm(dim=1).sqrt()  # shared between both, so that neither factor has all of the range
    size = torch.where(size > 0, size, 1.0)
    lost = float(values[: values.numel() - rank].clamp(min=0).sum().sqrt())
    return Factors(basis * size, right / size.unsqueeze(1), lost)


def encode(weight: Tensor, rank: int) -> dict[str, Tensor]:
    """Plain SVD of every expert of [E, out, in]: left [E, out, r] and right [E, r, in] in the weight's own type."""
    found = [factor(matrix, rank) for matrix in weight]
    return {
        "left": torch.stack([f.left for f in found]).to(weight.dtype),
        "right": torch.stack([f.right for f in found]).to(weight.dtype),
    }


def decode(tensors: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The product [E, out, in], summed in float32 and rounded once."""
    return torch.bmm(tensors["left"].float(), tensors["right"].float()).to(dtype)


def check_shapes(left: Tensor, right: Tensor) -> None:
    """Raise :class:`CheckpointError` unless the two are floating point [E, out, r] and [E, r, in] of one type."""
    fits = left.ndim == right.ndim == 3 and left.shape[0] == right.shape[0] and left.shape[2] == right.shape[1]
    if not fits or left.dtype != right.dtype or not left.dtype.is_floating_point:
        raise CheckpointError(
            f"factors [experts, out, rank] and [experts, rank, in] of one floating point type expected, found "
            f"{list(left.shape)} {left.dtype} and {list(right.shape)} {right.dtype}"
        )
