"""The one place that decides which implementation of an operation runs.

Order: an explicit `with use("reference"):`, else Triton on CUDA, else C on the CPU where it was built and the dtype and
shape allow, else the portable path in PyTorch. :func:`describe` says what was chosen and why; nothing falls back in
silence. Mixed precision follows `torch.autocast`: inside it, operations compute in its dtype from fp32 parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from xmoe.errors import ConfigError
from xmoe.kernels import reference
from xmoe.quantization.packed import PackedWeight

BACKENDS = ("reference", "portable", "cpu", "triton")
_forced: list[str] = []


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every operation inside the block on one backend: reference, portable, cpu or triton."""
    if backend not in BACKENDS:
        raise ConfigError(f"kernel backend {backend!r} is unknown; choose {', '.join(BACKENDS)}")
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear`."""
    return reference.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`xmoe.kernels.reference.rms_norm`."""
    return reference.rms_norm(x, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.rope`."""
    return reference.rope(x, cos, sin)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *,
    window: int | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See :func:`xmoe.kernels.reference.attention`."""
    return reference.attention(q, k, v, sinks, window=window, q_pos=q_pos, k_pos=k_pos, scale=scale)


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor | PackedWeight,
    gate_up_bias: Tensor,
    down: Tensor | PackedWeight,
    down_bias: Tensor,
    *,
    limit: float = 7.0,
    alpha: float = 1.702,
    norms: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`xmoe.kernels.reference.experts`."""
    return reference.experts(
        x, indices, weights, gate_up, gate_up_bias, down, down_bias, limit=limit, alpha=alpha, norms=norms
    )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear_cross_entropy`."""
    return reference.linear_cross_entropy(hidden, weight, targets)
