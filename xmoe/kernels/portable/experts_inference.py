"""The experts where no gradient is wanted: on the CPU, with the weights as the left factor of each product.

W x^T rather than x W^T: oneDNN rearranges its right factor before it multiplies. That is an expert's few rows here, and
there it would be a matrix of 33 MB; at 16 to 64 rows the products take a fifth to a third less time. Rows therefore
stand as columns from the gathering of an expert's tokens to the scattering of its answers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xmoe.kernels.adapter import Adapter


def by_expert(indices: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Slots of `indices` [T, K] sorted by expert, those below 0 left out, and how many each expert has."""
    slots = indices.flatten()
    order = torch.argsort(torch.where(slots < 0, experts, slots), stable=True)
    counts = torch.bincount(slots[slots >= 0], minlength=experts).tolist()
    return order[: sum(counts)], counts


def stretches(counts: list[int], order: Tensor):
    """(expert, the slots it serves, where its rows lie) for every expert that has rows."""
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, order[start : start + count], slice(start, start + count)
        start += count


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Callable[[int], tuple[Tensor, ...]],
    gate_up_bias: Tensor,
    down: Callable[[int], tuple[Tensor, ...]],
    down_bias: Tensor,
    limit: float,
    alpha: float,
    norms: bool,
    gate_up_adapter: Adapter | None,
    down_adapter: Adapter | None,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`xmoe.kernels.reference.experts`; `gate_up` and `down` give the matrices of an expert, outer first.

    x [T, D] in the dtype of the products.
    """
    (T, D), K = x.shape, indices.shape[1]
    order, counts = by_expert(indices, len(gate_up_bias))
    out = torch.zeros(T * K, D, dtype=x.dtype, device=x.device)
    lengths = torch.zeros(T * K, dtype=torch.float32, device=x.device) if norms else None
    for e, place, _ in stretches(counts, order):
        given = x.index_select(0, place // K).t()
        h = _product(gate_up(e), given)
        _adapt(h, given, gate_up_adapter, e)
        h += gate_up_bias[e].to(x.dtype).unsqueeze(1)
        gate, up = h[0::2].float().clamp_(max=limit), h[1::2].float().clamp_(-limit, limit)
        act = torch.sigmoid(gate * alpha).mul_(gate).mul_(up.add_(1)).to(x.dtype)
        f = _product(down(e), act)
        _adapt(f, act, down_adapter, e)
        f += down_bias[e].to(x.dtype).unsqueeze(1)
        out.index_copy_(0, place, f.t())
        if lengths is not None:
            lengths.index_copy_(0, place, f.float().norm(dim=0))
    y = torch.bmm(weights.to(x.dtype).unsqueeze(1), out.view(T, K, D)).squeeze(1)
    return y, None if lengths is None else lengths.view(T, K)


def _product(matrices: tuple[Tensor, ...], columns: Tensor) -> Tensor:
    """The product of `matrices`, first to last, with columns [in, n]; factors are never multiplied with each other."""
    for matrix in reversed(matrices):
        columns = torch.mm(matrix, columns)
    return columns


def _adapt(answers: Tensor, columns: Tensor, adapter: Adapter | None, e: int) -> None:
    """Add what expert e's adapter makes of `columns`."""
    if adapter is not None:
        inside = torch.mm(adapter.a[e].to(columns.dtype), columns).mul_(adapter.scale)
        answers += torch.mm(adapter.b[e].to(columns.dtype), inside)
