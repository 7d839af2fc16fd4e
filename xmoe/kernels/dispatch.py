"""The one place that decides which implementation of an operation runs.

Order: an explicit `with use("reference"):`, else Triton on CUDA, else C on the CPU where it was built and the dtype and
shape allow, else the portable path in PyTorch. :func:`describe` says what was chosen and why; nothing falls back in
silence. Mixed precision follows `torch.autocast`: inside it, operations compute in its dtype from fp32 parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from xmoe.errors import ConfigError
from xmoe.kernels import memory, reference
from xmoe.kernels.adapter import Adapter
from xmoe.kernels.cpu import backend as cpu
from xmoe.kernels.cpu import decode_step as cpu_decode_step
from xmoe.kernels.cpu import packed as cpu_packed
from xmoe.kernels.cpu.products import FORMS, Stack, few_weight, packed_parts, takes_packed
from xmoe.kernels.cuda import backend as triton_backend
from xmoe.kernels.portable import backend as portable
from xmoe.quantization.packed import PackedWeight

BACKENDS = ("reference", "portable", "cpu", "triton")
_forced: list[str] = []


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every operation inside the block on one backend: reference, portable, cpu or triton.

    Under cpu and triton, what that backend has no kernel for is still portable.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"kernel backend {backend!r} is unknown; choose {', '.join(BACKENDS)}")
    if backend == "cpu" and not cpu.available():
        raise ConfigError(f"kernel backend 'cpu' is not there: {cpu.reason()}; choose portable or reference")
    if backend == "triton" and not torch.cuda.is_available():
        raise ConfigError(
            "kernel backend 'triton' needs a CUDA device, and there is none; choose portable or reference"
        )
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def _choose(x: Tensor, c_takes: bool = True, triton_takes: bool = True) -> ModuleType:
    """The module whose operation takes x; the flags say whether the other arguments suit the C and Triton kernels."""
    forced = _forced[-1] if _forced else None
    if forced == "reference":
        return reference
    if x.device.type == "cpu":
        if torch.is_grad_enabled():
            memory.keep_freed_pages()
        if c_takes and forced in (None, "cpu") and cpu.available() and cpu.compute_dtype(x) in cpu.ELEMENTS:
            return cpu
        return portable
    runs = triton_takes and forced in (None, "triton")
    if runs and triton_backend.reason(x.device, portable.compute_dtype(x)) is None:
        return triton_backend
    return portable


def describe(device: torch.device | str, dtype: torch.dtype) -> str:
    """Which path the operations take on this device in this dtype, and why; one sentence."""
    device = torch.device(device)
    forced = _forced[-1] if _forced else None
    if forced in ("reference", "portable"):
        kept = f"; {portable.describe()}" if forced == "portable" and device.type == "cpu" else ""
        return f"{forced} PyTorch on {device.type}, as `use` asks{kept}"
    if device.type != "cpu":
        why_not = triton_backend.reason(device, dtype)
        if why_not is not None:
            return f"portable PyTorch on {device.type}: {why_not}"
        return f"Triton kernels on {device.type}; plain products and the loss: PyTorch; int8, int4 and low-rank experts: portable"
    if not cpu.available():
        return f"portable PyTorch on the CPU: {cpu.reason()}; {portable.describe()}"
    if dtype not in cpu.ELEMENTS:
        return f"portable PyTorch on the CPU: the C kernels know bfloat16 and float32, not {dtype}"
    return f"{cpu.describe()}; {cpu_packed.describe()}"


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear`."""
    return _choose(x, triton_takes=False).linear(x, weight, bias)


def unembed(hidden: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """hidden [..., D] times weight [V, D] -> logits; of a few rows, as generation has them, in the way of a decode step."""
    backend = _choose(hidden, triton_takes=False)
    return cpu.linear(hidden, weight, few=cpu.MANY_FEW) if backend is cpu else backend.linear(hidden, weight)


def adapter_product(x: Tensor, adapter: Adapter) -> Tensor:
    """See :func:`xmoe.kernels.reference.adapter_product`; taken in x's type, or in autocast's."""
    backend, dtype = _choose(x, triton_takes=False), portable.compute_dtype(x)
    # The C products round fp32 weights on the way and give fp32 gradients; others want one type for both.
    a, b = (t if backend is cpu else t.to(dtype) for t in (adapter.a, adapter.b))
    return backend.linear(backend.linear(x, a) * adapter.scale, b)


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
    backend = _choose(q, c_takes=q.shape[-1] % 2 == 0)
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
    gate_up_adapter: Adapter | None = None,
    down_adapter: Adapter | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`xmoe.kernels.reference.experts`."""
    dense = isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    packed = not isinstance(gate_up, Tensor) and not isinstance(down, Tensor) and cpu_packed.takes(gate_up, down)
    backend = _choose(
        x, c_takes=packed or cpu.takes(gate_up, down), triton_takes=dense or triton_backend.takes(gate_up, down)
    )
    if backend is cpu and packed:
        backend = cpu_packed
    layer = gate_up, gate_up_bias, down, down_bias
    adapters = {"gate_up_adapter": gate_up_adapter, "down_adapter": down_adapter}
    return backend.experts(x, indices, weights, *layer, limit=limit, alpha=alpha, norms=norms, **adapters)


def decode_step(x: Tensor) -> Callable | None:
    """What takes the few tokens x [B, S, D] through all blocks in one call, or None where the modules must do it.

    See :func:`xmoe.kernels.cpu.decode_step.decode_step`; the caller knows what the modules hold.
    """
    rows = x.shape[0] * x.shape[1]
    if x.device.type != "cpu" or not 0 < rows <= cpu_decode_step.MOST_ROWS or torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or _choose(x) is not cpu:
        return None
    return cpu_decode_step.decode_step


def decode_projection(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Stack | None:
    """A projection of attention as the decode step takes it in `dtype`: dense or symmetric int8; None where it is neither."""
    stack = few_weight(weight, dtype)
    return None if stack is None or stack.zeros is not None or stack.form not in (0, FORMS["int8"]) else stack


def decode_stacks(gate_up: Tensor | PackedWeight, down: Tensor | PackedWeight) -> tuple[Stack, Stack] | None:
    """The expert weights of a layer as the decode step takes them; None where it takes no such form, or not both together."""
    found = []
    for weight in (gate_up, down):
        if isinstance(weight, Tensor):
            found.append(Stack(weight))
        elif takes_packed(weight):
            found.append(packed_parts(weight))
        else:
            return None
    mxfp4 = [stack.form == FORMS["mxfp4"] for stack in found]  # which has a kernel of its own
    return tuple(found) if mxfp4[0] == mxfp4[1] else None


def linear_cross_entropy(hidden: Tensor, weight: Tensor | PackedWeight, targets: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear_cross_entropy`; a packed weight [1, V, D] is decoded for it."""
    if isinstance(weight, PackedWeight):
        weight = weight.decode(dtype=hidden.dtype)[0]
    return _choose(hidden, triton_takes=False).linear_cross_entropy(hidden, weight, targets)
