"""Matrix products in C, one weight or one for each expert, and what all operations of this backend share.

Products take any number of rows an expert, read fp32 weights beside bf16 activations and write fp32 gradients; a product of
a handful of rows streams its weight once, from where it lies.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xmoe.kernels.cpu.library import run
from xmoe.quantization.packed import PackedWeight


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype an operation on x works in: autocast's inside autocast, else x's own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _Forgets:
    """A context that keeps nothing, for where no gradient can be asked for: autograd's own costs more than a small kernel."""

    def save_for_backward(self, *_: Tensor | None) -> None:
        pass

    mark_non_differentiable = save_for_backward


def apply(function: type[Function], *arguments):
    """`function.apply`, or its forward pass alone where gradients are off."""
    return function.apply(*arguments) if torch.is_grad_enabled() else function.forward(_Forgets(), *arguments)


def whole(rows: int) -> Tensor:
    """Offsets of `rows` rows that all belong to one expert: a grouped operation as a plain one."""
    return torch.tensor([0, rows])


def product(
    x: Tensor,
    weight: Tensor | PackedWeight,
    offsets: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """out [R, N] = x [R, I] times the weight [E, N, I] of each row's expert, or [E, I, N] where `transposed`.

    The weight may be fp32 beside rows in bf16, or packed: it is rounded or decoded on the way, and no converted copy of
    it exists. A low-rank one is two thin products. bias is fp32 [E, N], and None where the weight is not dense.
    """
    E, inner, columns = offsets.numel() - 1, x.shape[1], out.shape[1]
    if isinstance(weight, PackedWeight) and weight.factors:
        first, second = (weight.left, weight.right) if transposed else (weight.right, weight.left)
        between = torch.empty(len(x), weight.left.shape[2], dtype=x.dtype)
        product(x, as_weight(first, x.dtype), offsets, between, transposed=transposed)
        return product(between, as_weight(second, x.dtype), offsets, out, transposed=transposed)
    if isinstance(weight, PackedWeight):
        run("packed_product", x.dtype, x, *packed_parts(weight), transposed, offsets, E, inner, columns, out)
        return out
    is_float = weight.dtype == torch.float32
    run("grouped_product", x.dtype, x, weight, is_float, transposed, bias, offsets, E, inner, columns, out)
    return out


FORMS = {"mxfp4": 1, "int4": 4, "int8": 8}
"""Packed formats and their numbers in integers.h; dense is 0."""


class Stack(NamedTuple):
    """A weight as `struct weight` of integers.h has it: dense values alone, or what :func:`packed_parts` says."""

    values: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group: int = 0
    form: int = 0


def packed_parts(weight: PackedWeight) -> Stack:
    """Values, scales, zeros, group size and form of a packed weight."""
    if weight.format == "mxfp4":
        return Stack(weight.blocks, weight.scales, None, 32, FORMS["mxfp4"])
    return Stack(weight.values, weight.scales, weight.tensors.get("zeros"), weight.group, FORMS[weight.format])


def few_weight(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Stack | None:
    """A weight as products of a handful of rows in `dtype` read it where it lies; None where they cannot.

    Dense ones have that dtype; integers lie in groups of whole 32, any number of rows of them.
    """
    if isinstance(weight, Tensor):
        return Stack(weight) if weight.dtype == dtype and weight.is_contiguous() else None
    if weight.format not in ("int8", "int4") or sys.byteorder != "little":
        return None
    stack = packed_parts(weight)
    whole = weight.shape[2] % 32 == 0 and stack.group % 32 == 0
    return stack if whole and all(t.is_contiguous() for t in weight.tensors.values()) else None


def takes_packed(weight: Tensor | PackedWeight) -> bool:
    """Whether the products take this weight as it is packed: MXFP4, int8 or int4 in whole groups of 32, of plain bytes."""
    if isinstance(weight, Tensor) or weight.format not in FORMS or sys.byteorder != "little":
        return False
    whole = weight.shape[1] % 32 == 0 and weight.shape[2] % 32 == 0 and packed_parts(weight)[3] % 32 == 0
    return whole and all(t.is_contiguous() for t in weight.tensors.values())


def gradient(left: Tensor, right: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    """out [E, N, I] = left [R, N]^T right [R, I] over the rows of each expert, in out's type; 0 where there are none."""
    E, height, width = offsets.numel() - 1, left.shape[1], right.shape[1]
    is_float = out.dtype == torch.float32
    run("grouped_gradient", left.dtype, left, right, offsets, E, height, width, out, is_float)
    return out


def column_sums(rows: Tensor, offsets: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sums of [R, N] over the rows of each expert, each times its scale: [E, N] in fp32."""
    out = torch.empty(offsets.numel() - 1, rows.shape[1], dtype=torch.float32)
    run("column_sums", rows.dtype, rows, scale, offsets, out.shape[0], out.shape[1], out)
    return out


def as_weight(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor | PackedWeight:
    """A weight as the kernels take it: contiguous, in fp32 or in the dtype of the work; or packed, as it is."""
    if isinstance(weight, PackedWeight):
        return weight
    return (weight if weight.dtype in (dtype, torch.float32) else weight.to(dtype)).contiguous()


class _Linear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        rows, w = x.reshape(-1, x.shape[-1]).to(dtype).contiguous(), as_weight(weight, dtype)
        b = None if bias is None else bias.float().contiguous()
        y = product(rows, w, whole(len(rows)), torch.empty(len(rows), len(w), dtype=dtype), b)
        ctx.save_for_backward(rows, w)
        ctx.shape, ctx.types = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y.view(*x.shape[:-1], len(w))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, w = ctx.saved_tensors
        all_rows = whole(len(rows))
        dx = dw = db = None
        grad = grad.reshape(-1, len(w)).to(rows.dtype).contiguous()
        if ctx.needs_input_grad[0]:
            dx = product(grad, w, all_rows, torch.empty_like(rows), transposed=True).view(ctx.shape).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            dw = gradient(grad, rows, all_rows, torch.empty_like(w)).to(ctx.types[1])
        if ctx.needs_input_grad[2]:
            db = column_sums(grad, all_rows)[0].to(ctx.types[2])
        return dx, dw, db, None


FEW_ROWS = 4
"""Rows up to which a product that needs no gradient reads its weight straight from where it lies, as decoding wants it.

Up to 16 rows that is the faster way (`MANY_FEW`), but it rounds differently, and what is recorded of a text should not
depend on how many of its tokens came together: so only those who ask get it, the decode step and the unembedding.
"""
MANY_FEW = 16


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, few: int = FEW_ROWS) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear`; up to `few` rows without gradient go the way of decoding."""
    dtype, rows = compute_dtype(x), x.numel() // max(x.shape[-1], 1)
    learning = (t for t in (x, weight, bias) if isinstance(t, Tensor))
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in learning)
    if not trains and 0 < rows <= few and (stack := few_weight(weight, dtype)) is not None:
        return _few_rows(x.to(dtype).contiguous(), stack, bias, rows, weight.shape[-2])
    if isinstance(weight, PackedWeight):
        if trains or not takes_packed(weight):
            return F.linear(x.to(dtype), weight.decode(dtype=dtype)[0], None if bias is None else bias.to(dtype))
        return _packed_rows(x.to(dtype), weight, bias)
    return apply(_Linear, x, weight, bias, dtype)


def _packed_rows(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [..., I] of many rows times a packed weight [1, N, I], decoded on the way; rounded before the bias and behind it."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = product(rows, weight, whole(len(rows)), torch.empty(len(rows), weight.shape[1], dtype=x.dtype))
    y = y if bias is None else y.add_(bias)
    return y.view(*x.shape[:-1], weight.shape[1])


def _few_rows(x: Tensor, weight: Stack, bias: Tensor | None, rows: int, columns: int) -> Tensor:
    """x [..., I] of a handful of rows times a weight [columns, I], which streams past once; no gradient."""
    if bias is not None:
        bias = (bias if bias.dtype in (torch.bfloat16, torch.float32) else bias.float()).contiguous()
    y = torch.empty(*x.shape[:-1], columns, dtype=x.dtype)
    is_float = bias is not None and bias.dtype == torch.float32
    run("few_rows", x.dtype, x, *weight, bias, is_float, rows, x.shape[-1], columns, y)
    return y
