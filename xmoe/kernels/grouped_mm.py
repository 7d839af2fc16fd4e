"""Experts through `torch.nn.functional.grouped_mm`: for GPUs where Triton is not to be had, and to measure ours against.

One sort, one gather, a grouped product for gate_up and one for down, offsets on the device. On CUDA it wants 16-bit
weights whose rows are multiples of 16 bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe.kernels.reference import swiglu
from xmoe.quantization.packed import PackedWeight


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
    """See :func:`xmoe.kernels.reference.experts`; packed weights are decoded whole, in x's dtype, factors run as they are."""
    T, K = indices.shape
    E = gate_up_bias.shape[0]
    expert = torch.where(indices < 0, E, indices).flatten()  # unused slots go last, beyond every group
    order = expert.argsort(stable=True)
    counts = torch.zeros(E + 1, dtype=torch.int32, device=x.device)
    ends = counts.index_add(0, expert, torch.ones_like(expert, dtype=torch.int32)).cumsum(0, dtype=torch.int32)[:E]
    expert = expert[order]
    used, which = (expert < E).unsqueeze(1), expert.clamp(max=E - 1)
    rows = torch.where(used, x[order // K], 0)
    # What grouped_mm leaves beyond the last group is not set; `where` keeps it, and its gradient, out.
    hidden = torch.where(used, _product(rows, gate_up, ends), 0) + gate_up_bias.to(x.dtype)[which]
    active = torch.where(used, swiglu(hidden, limit, alpha), 0)
    out = _product(active, down, ends) + down_bias.to(x.dtype)[which]
    out = torch.where(used, out, 0)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=x.device))
    slots = out[back].view(T, K, -1).float()
    y = (slots * weights.unsqueeze(-1)).sum(1).to(x.dtype)
    return y, slots.detach().norm(dim=-1) if norms else None


def _product(rows: Tensor, weight: Tensor | PackedWeight, ends: Tensor) -> Tensor:
    """rows [R, in] times the [out, in] matrix of each row's expert."""
    if isinstance(weight, Tensor):
        parts = [weight]
    else:
        parts = weight.factors[::-1] or (weight,)
        parts = [w if isinstance(w, Tensor) else w.decode(dtype=rows.dtype) for w in parts]
    for part in parts:
        rows = F.grouped_mm(rows, part.to(rows.dtype).transpose(1, 2), offs=ends)
    return rows
