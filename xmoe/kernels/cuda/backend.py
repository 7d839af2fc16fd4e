"""The Triton kernels under the signatures of `dispatch`: what runs on CUDA. Importing this file imports no triton.

How `dispatch` calls it::

    from xmoe.kernels.cuda import backend as triton_backend                       # cheap everywhere
    why_not = triton_backend.reason(x.device, x.dtype)            # None, or one clause for `describe`
    if why_not is None and triton_backend.takes(gate_up, down):   # the second only for `experts`
        return triton_backend.experts(x, indices, weights, gate_up, ...)

:func:`experts`, :func:`attention`, :func:`rms_norm` and :func:`rope` have the signatures of `reference` and are
differentiable (packed experts in x and the routing weights). Under autocast they compute in its dtype from whatever they
are given. `linear` and `linear_cross_entropy` have no kernel here: cuBLAS is the fast path. Where `reason` is not None on
CUDA, `grouped_mm.experts` has the same signature and needs torch alone.

Call :func:`prepare` once after loading a packed model onto the GPU. Without it the first use of each packed weight makes
a second, repacked copy beside it.
"""

from __future__ import annotations

import functools
import importlib.util
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xmoe.kernels.adapter import Adapter
from xmoe.kernels.reference import swiglu
from xmoe.quantization.packed import PackedWeight

if TYPE_CHECKING:
    from xmoe.kernels.cuda.repack import Repacked

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DECODE_ROWS = 64  # queries that share a key-value head, up to which the keys are split among programs instead
_copies: weakref.WeakKeyDictionary[PackedWeight, tuple] = weakref.WeakKeyDictionary()


def reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run for tensors of this device and dtype; None when they can."""
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA devices, not on {device.type}"
    if dtype not in DTYPES:
        return f"the Triton kernels know float16, bfloat16 and float32, not {dtype}"
    return _machine_reason(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _machine_reason(index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if torch.version.hip is not None:
        return "the Triton kernels use NVIDIA instructions and this torch is built for ROCm"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the Triton kernels need compute capability 8.0 or higher, this device has {major}.{minor}"
    return None


def takes(*weights: Tensor | PackedWeight) -> bool:
    """Whether :func:`experts` has a product for these weights: dense ones, and MXFP4 among the packed formats."""
    return all(isinstance(w, Tensor) or w.format == "mxfp4" for w in weights)


def prepare(model: nn.Module) -> int:
    """Put every MXFP4 weight of `model` into kernel order, in place, one at a time; returns how many there were.

    Their bytes in a saved checkpoint stay the same: see :class:`xmoe.kernels.cuda.repack.RepackedWeight`.
    """
    from xmoe.kernels.cuda.repack import RepackedWeight

    changed = 0
    for path, parent in list(model.named_modules()):
        if isinstance(parent, PackedWeight) and parent.factors:  # factors are none of these kernels' work
            continue
        for name, child in list(parent.named_children()):
            if type(child) is PackedWeight and child.format == "mxfp4":
                # the weight itself, or a part of one whose experts differ in form: there its name is a number
                setattr(parent, name, RepackedWeight(child, paired="gate_up" in (name, path.rpartition(".")[2])))
                changed += 1
    return changed


def in_kernel_order(weight: Tensor | PackedWeight, *, paired: bool | None) -> Tensor | Repacked:
    """What the kernels take for this weight: itself when dense, else its repacked form, remembered while it lives.

    paired: whether SwiGLU will follow; None where either order will do.
    """
    if isinstance(weight, Tensor):
        return weight
    from xmoe.kernels.cuda.repack import RepackedWeight, repack

    if isinstance(weight, RepackedWeight):
        return weight.repacked
    blocks, scales = weight.blocks, weight.scales
    state = blocks.data_ptr(), blocks._version, scales.data_ptr(), scales._version
    known = _copies.get(weight)
    if known is None or known[0] != state or paired not in (None, known[1].paired):
        known = _copies[weight] = state, repack(blocks, scales, paired=bool(paired))
    return known[1]


def _autocast(x: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`xmoe.kernels.reference.rms_norm`."""
    from xmoe.kernels.cuda.norm import rms_norm

    return rms_norm(x.to(_autocast(x)), weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.rope`."""
    from xmoe.kernels.cuda.rope import rope

    return rope(x.to(_autocast(x)), cos, sin)


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
    """See :func:`xmoe.kernels.reference.attention`; few queries over many keys take the split kernel."""
    dtype = _autocast(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, sinks))
    if q_pos is not None and rows <= _DECODE_ROWS and not differentiable:
        from xmoe.kernels.cuda.decode_attention import decode_attention as attend
    else:
        from xmoe.kernels.cuda.flash_attention import flash_attention as attend
    return attend(q, k, v, sinks, window=window, q_pos=q_pos, k_pos=k_pos, scale=scale)


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
    """See :func:`xmoe.kernels.reference.experts`. With adapters the products run one by one, the activation between them."""
    if gate_up_adapter is not None or down_adapter is not None:
        hidden = expert_linear(x, indices, gate_up, gate_up_bias, gate_up_adapter).flatten(0, 1)
        slots = indices.reshape(-1, 1)
        out = expert_linear(swiglu(hidden, limit, alpha), slots, down, down_bias, down_adapter)
        out = out.view(*indices.shape, -1).float()
        y = (out * weights.float().unsqueeze(-1)).sum(1).to(hidden.dtype)
        return y, out.detach().norm(dim=-1) if norms else None
    from xmoe.kernels.cuda.experts import ExpertsFunction, experts_forward

    dtype = _autocast(x)
    up, low = in_kernel_order(gate_up, paired=True), in_kernel_order(down, paired=False)
    up, low = (w.to(dtype) if isinstance(w, Tensor) else w for w in (up, low))
    x, weights = x.to(dtype), weights.float()
    given = x, weights, up, gate_up_bias, low, down_bias
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given):
        return ExpertsFunction.apply(*given, indices, limit, alpha, norms)
    y, lengths, _, _ = experts_forward(
        x, indices, weights, up, gate_up_bias, low, down_bias, limit=limit, alpha=alpha, norms=norms
    )
    return y, lengths


def expert_linear(
    x: Tensor, indices: Tensor, weight: Tensor | PackedWeight, bias: Tensor, adapter: Adapter | None = None
) -> Tensor:
    """One product for each slot: x [T, D] with weight [E, N, D] and bias [E, N] of expert indices[t, k] -> [T, K, N].

    Differentiable in x, in what is dense and in the adapter, which is added over the same sorted rows; unused slots give
    0. The weight may be packed and frozen: gradients flow through it.
    """
    from xmoe.kernels.cuda.experts import ExpertLinearFunction, sort_for

    dtype = _autocast(x)
    packed = in_kernel_order(weight, paired=None)
    packed = packed.to(dtype) if isinstance(packed, Tensor) else packed
    (T, K), E = indices.shape, weight.shape[0]
    rows = sort_for(indices, E, packed)
    # Rows from offsets[E] on belong to no expert: their order is unset, nothing is written to them, and `where` keeps
    # whatever stands in their gradient away from x.
    in_use = torch.arange(T * K, device=x.device) < rows.offsets[-1]
    slot = rows.order.long().masked_fill(~in_use, T * K)
    taken = torch.where(in_use.unsqueeze(1), x.to(dtype)[slot.clamp(max=T * K - 1) // K], 0)
    out = ExpertLinearFunction.apply(taken, packed, bias, rows)
    if adapter is not None:
        a, b = adapter.a.to(dtype), adapter.b.to(dtype)
        inside = ExpertLinearFunction.apply(taken, a, bias.new_zeros(E, adapter.rank), rows) * adapter.scale
        inside = torch.where(in_use.unsqueeze(1), inside, 0)
        out = out + ExpertLinearFunction.apply(inside, b, torch.zeros_like(bias), rows)
    place = slot.new_zeros(T * K + 1).scatter(0, slot, torch.arange(T * K, device=x.device))[:-1]
    return out[place].masked_fill((indices < 0).view(-1, 1), 0.0).view(T, K, -1)
