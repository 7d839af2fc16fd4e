"""int8 and int4 weights: integers with one scale for a group of consecutive input features.

symmetric   value = scale * q                 q in -127..127 (int8) or -7..7 (int4)
affine      value = scale * (q - zero)        q and zero in 0..255 (int8) or 0..15 (int4)

Storage, for a matrix [..., in] in groups of g (g = in: one group a row, "per channel"):
    values  int8 [..., in] for symmetric int8, uint8 [..., in] for affine int8,
            uint8 [..., in/2] for int4: element 2j in the low nibble, 2j+1 in the high one, symmetric q stored as q + 8
    scales  bfloat16 [..., in/g]
    zeros   uint8 [..., in/g], affine only
A scale is rounded to bfloat16 *before* the integers are chosen, so its rounding costs nothing but a step at most
0.8 % wider. Round to nearest, ties to even; a row of zeros gets scale 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xmoe.errors import CheckpointError, ConfigError

INT4_GROUPS = (32, 64, 128)


def encode_int8(
    weight: Tensor, group_size: int | None = None, affine: bool = False, scales: Tensor | None = None
) -> dict[str, Tensor]:
    """Pack [..., in] to 8 bits; `group_size` None means one scale a row. Returns the tensors named in the module's page.

    scales: those that the weights had before, bfloat16 [..., in/g]: a symmetric group keeps its own where that still fits
    its values as well as a new one would (within 1.6 %), so values that did not change get the codes they had.
    """
    return _encode(weight, 8, weight.shape[-1] if group_size is None else group_size, affine, scales)


def encode_int4(
    weight: Tensor, group_size: int = 32, affine: bool = False, scales: Tensor | None = None
) -> dict[str, Tensor]:
    """Pack [..., in] to 4 bits in groups of 32, 64 or 128; `scales` as for int8. Returns the tensors of the module's page."""
    if group_size not in INT4_GROUPS:
        raise ConfigError(f"int4 groups may hold {', '.join(map(str, INT4_GROUPS))} weights, not {group_size}")
    tensors = _encode(weight, 4, group_size, affine, scales)
    q = tensors["values"] if affine else (tensors["values"] + 8).to(torch.uint8)
    return tensors | {"values": q[..., 0::2] | q[..., 1::2] << 4}


def decode_int8(tensors: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values [..., in] of what :func:`encode_int8` returned; computed in float32 and rounded once."""
    return _decode(tensors["values"].float(), tensors, dtype)


def decode_int4(tensors: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values [..., in] of what :func:`encode_int4` returned; computed in float32 and rounded once."""
    packed = tensors["values"]
    q = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).float()
    return _decode(q if "zeros" in tensors else q - 8, tensors, dtype)


def snap(weight: Tensor, tensors: dict[str, Tensor], bits: int) -> Tensor:
    """The nearest values to `weight` [..., in], float32, that groups with these scales (and zero points) can hold."""
    q, zero, scale = _codes_at(weight, tensors, bits)
    return (q - zero).mul_(scale).flatten(-2)


def encode_at(weight: Tensor, tensors: dict[str, Tensor], bits: int) -> Tensor:
    """`values` of `weight` [..., in], float32, where scales (and zero points) stay: what :func:`snap` gives."""
    q = _codes_at(weight, tensors, bits)[0].flatten(-2)
    if bits == 8:
        return q.to(tensors["values"].dtype)
    q = (q if "zeros" in tensors else q + 8).to(torch.uint8)
    return q[..., 0::2] | q[..., 1::2] << 4


def _codes_at(weight: Tensor, tensors: dict[str, Tensor], bits: int) -> tuple[Tensor, Tensor | float, Tensor]:
    """Codes [..., groups, g] as float32, the code of zero, and the scales [..., groups, 1]."""
    scale = tensors["scales"].float().unsqueeze(-1)
    q = torch.round(weight.unflatten(-1, (scale.shape[-2], -1)) / _divisor(scale.squeeze(-1)))
    if "zeros" not in tensors:
        top = 2 ** (bits - 1) - 1
        return q.clamp_(-top, top), 0.0, scale
    zero = tensors["zeros"].float().unsqueeze(-1)
    return q.add_(zero).clamp_(0, 2**bits - 1), zero, scale


def _encode(weight: Tensor, bits: int, group_size: int, affine: bool, scales: Tensor | None) -> dict[str, Tensor]:
    width = weight.shape[-1]
    if group_size < 1 or width % group_size or (bits == 4 and width % 2):
        raise ConfigError(f"int{bits} groups of {group_size} do not divide the input dimension {width}")
    groups = weight.detach().float().unflatten(-1, (width // group_size, group_size))
    if not groups.is_meta and not bool(torch.isfinite(groups).all()):
        raise CheckpointError(f"the weights hold NaN or infinity, which int{bits} cannot express")
    if not affine:
        top = 2 ** (bits - 1) - 1
        scale = _round_up(groups.abs().amax(dim=-1) / top)
        if scales is not None:
            old = scales.float()
            scale = torch.where((scale <= old) & (old <= 1.016 * scale), old, scale)
        q = torch.round(groups / _divisor(scale)).clamp(-top, top)
        return {"values": q.flatten(-2).to(torch.int8), "scales": scale.to(torch.bfloat16)}
    top = 2**bits - 1
    # The range always includes zero, so that zero stays exactly zero.
    low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
    # One step is set aside: rounding the zero point can push the range's far end out by up to half a step.
    scale = _round_up((high - low) / (top - 1))
    zero = torch.round(-low / _divisor(scale).squeeze(-1)).clamp(0, top)
    q = (torch.round(groups / _divisor(scale)) + zero.unsqueeze(-1)).clamp(0, top)
    return {
        "values": q.flatten(-2).to(torch.uint8),
        "scales": scale.to(torch.bfloat16),
        "zeros": zero.to(torch.uint8),
    }


def _decode(q: Tensor, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    scales = tensors["scales"].float().unsqueeze(-1)
    groups = q.unflatten(-1, (scales.shape[-2], -1))
    if "zeros" in tensors:
        groups = groups - tensors["zeros"].float().unsqueeze(-1)
    return (groups * scales).flatten(-2).to(dtype)


def _round_up(scale: Tensor) -> Tensor:
    """The least bfloat16 not below `scale`, as float32: rounding down would clip the largest weight of each group."""
    rounded = scale.to(torch.bfloat16)
    step = torch.nextafter(rounded, torch.full_like(rounded, float("inf")))
    return torch.where(rounded.float() < scale, step, rounded).float()


def _divisor(scale: Tensor) -> Tensor:
    """`scale` to divide by, [..., 1]: a group of zeros has scale 0 and every q in it is 0 whatever it is divided by."""
    return torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
