"""The one place that decides which implementation of an operation runs.

Order: an explicit `with use("reference"):`, else Triton on CUDA, else C on the CPU where it was built and the dtype and
shape allow, else the portable path in PyTorch. :func:`describe` says what was chosen and why; nothing falls back in
silence. Mixed precision follows `torch.autocast`: inside it, operations compute in its dtype from fp32 parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from xmoe.errors import ConfigError
from xmoe.kernels import cpu, memory, portable, reference
from xmoe.quantization.packed import PackedWeight

BACKENDS = ("reference", "portable", "cpu")
_forced: list[str] = []


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every operation inside the block on one backend: reference, portable or cpu."""
    if backend not in BACKENDS:
        raise ConfigError(f"kernel backend {backend!r} is unknown; choose {', '.join(BACKENDS)}")
    if backend == "cpu" and not cpu.available():
        raise ConfigError(f"kernel backend 'cpu' is not there: {cpu.reason()}; choose portable or reference")
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def _choose(x: Tensor, fits_c: bool = True) -> ModuleType:
    """The module whose operation takes x. `fits_c`: whether everything but device and dtype suits the C kernels."""
    forced = _forced[-1] if _forced else None
    if forced == "reference":
        return reference
    if x.device.type == "cpu" and torch.is_grad_enabled():
        memory.keep_freed_pages()
    if forced == "portable" or x.device.type != "cpu" or not cpu.available():
        return portable
    return cpu if fits_c and cpu.compute_dtype(x) in cpu.ELEMENTS else portable


def describe(device: torch.device | str, dtype: torch.dtype) -> str:
    """Which path the operations take on this device in this dtype, and why: a line each where they differ."""
    device = torch.device(device)
    if _forced:
        return f"kernels: {_forced[-1]}, as `use` asks"
    if device.type != "cpu":
        return f"kernels: portable PyTorch on {device.type}"
    if not cpu.available():
        return f"kernels: portable PyTorch on the CPU, because {cpu.reason()}"
    if dtype not in cpu.ELEMENTS:
        return f"kernels: portable PyTorch on the CPU, because the C kernels know bfloat16 and float32, not {dtype}"
    return f"kernels: {cpu.describe()}; experts in packed formats: portable PyTorch, decoded one at a time"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear`."""
    return _choose(x).linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`xmoe.kernels.reference.rms_norm`; inside autocast the result has its dtype."""
    return _choose(x).rms_norm(x, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.rope`."""
    return _choose(x).rope(x, cos, sin)


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
    backend = _choose(q, fits_c=q.shape[-1] % 2 == 0)
    return backend.attention(q, k, v, sinks, window=window, q_pos=q_pos, k_pos=k_pos, scale=scale)


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
    backend = _choose(x, fits_c=isinstance(gate_up, Tensor) and isinstance(down, Tensor))
    return backend.experts(
        x, indices, weights, gate_up, gate_up_bias, down, down_bias, limit=limit, alpha=alpha, norms=norms
    )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear_cross_entropy`."""
    return _choose(hidden).linear_cross_entropy(hidden, weight, targets)
