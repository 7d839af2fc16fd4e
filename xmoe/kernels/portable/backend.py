"""The same operations vectorised in PyTorch: any device, differentiable, no compiler. Formulas: see `reference`.

Written for speed where eager PyTorch allows it. Gradients are written out by hand where autograd would keep or fill
large tensors: the experts keep x and the pre-activation only, attention keeps what a flash kernel keeps, and the loss
never holds [T, V] in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xmoe.kernels.portable.attention import attention
from xmoe.kernels.portable.autocast import compute_dtype
from xmoe.kernels.portable.experts import describe, experts
from xmoe.quantization.packed import PackedWeight

__all__ = ["attention", "compute_dtype", "describe", "experts", "linear", "linear_cross_entropy", "rms_norm", "rope"]


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear`; a packed weight is decoded for every product."""
    if isinstance(weight, PackedWeight):
        weight = weight.decode(dtype=compute_dtype(x))[0]
    return F.linear(x, weight, bias)


# ------------------------------------------------------------------------------------------------ norm and rotation


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        t = x.float()
        scale = torch.rsqrt(t.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (t * scale).mul_(weight.float()).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        dw = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight.float()
        dx = grad.sub_(normed * (grad * normed).mean(-1, keepdim=True)).mul_(scale)
        return dx.to(x.dtype), dw, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`xmoe.kernels.reference.rms_norm`; inside autocast the result has its dtype, ready for a product."""
    return _RMSNorm.apply(x, weight, eps, compute_dtype(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class _Rope(Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.rope`."""
    return _Rope.apply(x, cos, sin)


# ------------------------------------------------------------------------------------------------ loss

_LOGIT_BYTES = 128 << 20  # most memory for logits at a time
_LOGIT_ROWS = 256  # rows whose softmax is taken at a time


class _LinearCrossEntropy(Function):
    """The gradient of the logits is known as soon as they are, so both products follow at once and logits are dropped."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, needs_grad: bool, needs_weight_grad: bool) -> Tensor:
        (T, D), V = hidden.shape, weight.shape[0]
        h, w = hidden.to(dtype), weight.to(dtype)
        real = targets >= 0
        scale = 1.0 / real.sum().clamp(min=1)
        losses = torch.zeros((), dtype=torch.float32, device=h.device)
        dh = torch.empty(T, D, dtype=dtype, device=h.device) if needs_grad else None
        dw = None
        block = max(_LOGIT_ROWS, _LOGIT_BYTES // (V * h.element_size()) // _LOGIT_ROWS * _LOGIT_ROWS)
        for start in range(0, T, block):
            count = min(block, T - start)
            dlogits = torch.empty(count if needs_grad else 0, V, dtype=dtype, device=h.device)
            for first in range(start, start + count, _LOGIT_ROWS):
                s = slice(first, min(first + _LOGIT_ROWS, start + count))
                logits = torch.mm(h[s], w.t()).float()
                at = targets[s].clamp(min=0).unsqueeze(1)
                logits = torch.log_softmax(logits, -1)
                losses -= logits.gather(1, at).squeeze(1).mul(real[s]).sum()
                if dh is None:
                    continue
                probability = logits.exp_()
                probability.scatter_add_(1, at, torch.full_like(at, -1, dtype=torch.float32))
                part = dlogits[first - start : first - start + s.stop - s.start]
                part.copy_(probability.mul_((scale * real[s]).unsqueeze(1)))
                torch.mm(part, w, out=dh[s])
            if needs_weight_grad:
                product = torch.mm(dlogits.t(), h[start : start + count])
                dw = product.float() if dw is None else dw.add_(product)
        ctx.save_for_backward(dh, dw)
        ctx.types = (hidden.dtype, weight.dtype)
        return losses * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dh, dw = ctx.saved_tensors
        if grad.device.type != "cpu" or float(grad) != 1.0:  # elsewhere looking at the value would stop the queue
            dh, dw = dh * grad.to(dh.dtype), None if dw is None else dw * grad
        return dh.to(ctx.types[0]), None if dw is None else dw.to(ctx.types[1]), None, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """See :func:`xmoe.kernels.reference.linear_cross_entropy`; logits exist for a bounded number of rows at a time."""
    needs_weight_grad = torch.is_grad_enabled() and weight.requires_grad
    needs_grad = needs_weight_grad or (torch.is_grad_enabled() and hidden.requires_grad)
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets, dtype, needs_grad, needs_weight_grad)
