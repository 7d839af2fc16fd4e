"""MXFP4: 4-bit floating point (E2M1) in groups of 32 that share one power-of-two scale (E8M0).

Source: OCP Microscaling Formats specification 1.0; the byte order is that of the published GPT-OSS weights.

A group is 32 consecutive *input* features of a row. It is stored as
    blocks  uint8 [..., in/32, 16]   byte j holds element 2j in its low nibble and element 2j+1 in its high nibble
    scales  uint8 [..., in/32]       value = element * 2^(scale - 127); 255 means NaN and is refused
A nibble is sign * 8 + code, and codes 0..7 stand for 0, 0.5, 1, 1.5, 2, 3, 4, 6. That is 4.25 bits a weight.

Decoding is exact in bfloat16 and float32. Encoding has to pick each group's scale, and there are three rules (see
:data:`RULES`); re-encoding decoded values returns the same values under each of them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from xmoe.errors import CheckpointError, ConfigError

GROUP = 32
"""Consecutive input features that share a scale."""

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the magnitude codes 0..7 stand for."""

NAN_SCALE = 255

RULES = ("best", "ocp", "ceil")
"""How the scale of a group is chosen, given amax, the largest magnitude in it:

ocp   floor(log2 amax) - 2, as the specification says; groups with amax above 6 * scale saturate
ceil  ceil(log2(amax / 6)) of the bfloat16 weights, as most other encoders do; nothing saturates
best  whichever of the ocp scale, its half and its double has the least squared error (ours)
"""

# Lowest exponent of an E8M0 scale, and the highest whose largest value, 6 * 2^e, is still finite.
_MIN_EXPONENT, _MAX_EXPONENT = -127, 125

# Groups handled at a time: large enough to drown the call overhead, small enough for the cache.
_CHUNK = 1 << 16
_ENCODE_CHUNK = 1 << 12
_ROWS = 1 << 10


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """Values of packed groups.

    Args:
        blocks: uint8 [..., G, 16].
        scales: uint8 [..., G], none of them 255 (see :func:`check_scales`).
        dtype: bfloat16 and float32 are exact; float16 is refused, because scales exceed its range.
        out: contiguous, where the values go; it is returned.

    Returns:
        [..., 32 * G] of `dtype`.
    """
    if dtype not in _WORDS:
        raise ConfigError(f"MXFP4 cannot be decoded to {dtype}: its scales need the range of bfloat16 or float32")
    check_shapes(blocks, scales)
    *lead, groups, _ = blocks.shape
    word = _WORDS[dtype]
    if out is None:
        out = torch.empty((*lead, groups * GROUP), dtype=dtype, device=blocks.device)
    pairs = out.view(-1).view(word).view(-1, GROUP // 2)
    if not pairs.is_meta:
        table = _pairs(dtype, blocks.device)
        flat_blocks, flat_scales = blocks.reshape(-1, GROUP // 2), scales.reshape(-1)
        for start in range(0, len(pairs), _CHUNK):
            part = slice(start, start + _CHUNK)
            rows = (flat_scales[part].to(torch.int32) << 8).unsqueeze(-1) | flat_blocks[part]
            torch.index_select(table, 0, rows.view(-1), out=pairs[part].view(-1))
    return out


def encode(weight: Tensor, rule: str = "best") -> tuple[Tensor, Tensor]:
    """Pack the last dimension of `weight` in groups of 32.

    The last dimension must be the *input* features: pass [out, in] matrices, never the transposed dense layout of
    Hugging Face, where this would silently group outputs.

    Args:
        weight: [..., in] floating point, `in` a multiple of 32, all values finite.
        rule: one of :data:`RULES`.

    Returns:
        blocks uint8 [..., in/32, 16] and scales uint8 [..., in/32]. Ties round to the even code; zeros get code 0,
        and a group of zeros gets scale byte 0.
    """
    if rule not in RULES:
        raise ConfigError(f"unknown MXFP4 rule {rule!r}; expected one of {', '.join(RULES)}")
    if weight.ndim == 0 or weight.shape[-1] % GROUP:
        raise ConfigError(f"MXFP4 needs an input dimension that is a multiple of {GROUP}, found {list(weight.shape)}")
    *lead, width = weight.shape
    groups = weight.detach().reshape(-1, GROUP)
    blocks = torch.empty((len(groups), GROUP // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(groups), dtype=torch.uint8, device=weight.device)
    if not blocks.is_meta:
        for start in range(0, len(groups), _ENCODE_CHUNK):
            part = slice(start, start + _ENCODE_CHUNK)
            blocks[part], scales[part] = _encode_groups(groups[part], rule)
    return blocks.view(*lead, width // GROUP, GROUP // 2), scales.view(*lead, width // GROUP)


def snap(weight: Tensor, scales: Tensor) -> Tensor:
    """The nearest values to `weight` [..., in], float32, that groups with these `scales` can hold; far ones saturate.

    Several times faster than to encode and decode; for training that knows of the rounding to come.
    """
    groups = weight.unflatten(-1, (-1, GROUP))
    step = (
        torch.exp2(torch.arange(256, dtype=torch.float64) - 127).float().to(weight.device)[scales.long()].unsqueeze(-1)
    )
    size = _rounded((groups.abs() / step).clamp_(max=VALUES[-1]))
    return torch.copysign(size.mul_(step), groups).flatten(-2)


def encode_at(weight: Tensor, scales: Tensor) -> Tensor:
    """Blocks uint8 [..., G, 16] of `weight` [..., in], float32, in groups that keep these `scales`: what :func:`snap` gives."""
    blocks = torch.empty(*scales.shape, GROUP // 2, dtype=torch.uint8, device=weight.device)
    rows = weight.reshape(-1, weight.shape[-1])
    for row, own, out in zip(rows.split(_ROWS), scales.flatten(0, -2).split(_ROWS), blocks.flatten(0, -3).split(_ROWS)):
        groups = row.unflatten(-1, (-1, GROUP))
        step = torch.exp2(own.cpu().double() - 127).float().to(weight.device).unsqueeze(-1)
        codes = _codes(_rounded((groups.abs() / step).clamp_(max=VALUES[-1])))
        codes |= ((groups < 0) & (codes > 0)).to(torch.uint8) << 3
        out.copy_(codes[..., 0::2] | codes[..., 1::2] << 4)
    return blocks


def check_scales(scales: Tensor, name: str = "scales") -> None:
    """Raise :class:`CheckpointError` where a scale byte is 255, which the format reserves for NaN."""
    if not scales.is_meta and scales.numel() and int(scales.max()) == NAN_SCALE:
        count = int((scales == NAN_SCALE).sum())
        raise CheckpointError(
            f"{name}: {count} scale byte{'s are' if count > 1 else ' is'} 255, which means NaN in MXFP4; "
            "the file is damaged, download or convert it again"
        )


def to_gguf(blocks: Tensor, scales: Tensor) -> Tensor:
    """The same values in GGUF's order (type 39): uint8 [..., G, 17].

    Each group becomes its scale byte followed by 16 bytes whose byte j holds element j (low) and element j + 16 (high).
    """
    check_shapes(blocks, scales)
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    first, second = nibbles.split(GROUP // 2, dim=-1)
    return torch.cat((scales.unsqueeze(-1), first | second << 4), dim=-1)


def check_shapes(blocks: Tensor, scales: Tensor) -> None:
    """Raise :class:`CheckpointError` unless the two are uint8 [..., G, 16] and [..., G]."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise CheckpointError(f"MXFP4 blocks and scales must be uint8, found {blocks.dtype} and {scales.dtype}")
    if blocks.ndim < 2 or blocks.shape[-1] != GROUP // 2 or blocks.shape[:-1] != scales.shape:
        raise CheckpointError(
            f"MXFP4 blocks [..., G, 16] and scales [..., G] expected, "
            f"found {list(blocks.shape)} and {list(scales.shape)}"
        )


# Two decoded values are looked up at once, as one integer as wide as both.
_WORDS = {torch.bfloat16: torch.int32, torch.float32: torch.int64}


@functools.lru_cache(maxsize=8)
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The answer for every (scale byte, block byte), as int32 or int64 [65536].

    65,536 answers fit the cache, so a lookup is faster than arithmetic; and being built once in float64 they are
    exact even where the processor flushes subnormal numbers to zero.
    """
    magnitude = torch.tensor(VALUES, dtype=torch.float64)
    value = torch.cat((magnitude, -magnitude))
    byte = torch.arange(256)
    pair = torch.stack((value[byte & 15], value[byte >> 4]), dim=-1)  # [256, 2]: low nibble first
    scale = torch.tensor([2.0 ** (s - 127) for s in range(256)], dtype=torch.float64)
    table = (scale[:, None, None] * pair).to(dtype)
    table[NAN_SCALE] = float("nan")
    return table.view(_WORDS[dtype]).view(-1).to(device)


def _encode_groups(groups: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """blocks [N, 16] and scales [N] of `groups` [N, 32]."""
    if rule == "ceil":
        groups = groups.to(torch.bfloat16)
    groups = groups.float()
    magnitudes = groups.abs()
    amax = magnitudes.amax(dim=-1)
    if not bool(torch.isfinite(amax).all()):
        raise CheckpointError("the weights hold NaN or infinity, which MXFP4 cannot express")
    # Exponents come from the bits of the float: a log2 in floating point errs beside powers of two.
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [0.5, 1)
    ocp = exponent - 3  # floor(log2 amax) - 2
    if rule == "ocp":
        exponent = ocp
    elif rule == "ceil":
        exponent = torch.where(mantissa <= 0.75, ocp, ocp + 1)  # amax / 6 = (mantissa / 0.75) * 2^(exponent - 3)
    else:
        exponent = _least_error(magnitudes, ocp)
    exponent = torch.where(amax > 0, exponent, _MIN_EXPONENT).clamp(_MIN_EXPONENT, _MAX_EXPONENT)
    codes = _codes(_rounded(_scaled(magnitudes, exponent)))
    codes |= ((groups < 0) & (codes > 0)).to(torch.uint8) << 3  # a zero carries no sign
    return codes[:, 0::2] | codes[:, 1::2] << 4, (exponent + 127).to(torch.uint8)


def _least_error(magnitudes: Tensor, ocp: Tensor) -> Tensor:
    """For each group the best exponent among ocp, ocp - 1 and ocp + 1; equal errors prefer the earlier one."""
    best = best_error = None
    for shift in (0, -1, 1):
        exponent = (ocp + shift).clamp(_MIN_EXPONENT, _MAX_EXPONENT)
        # The error in units of this scale, then brought to a common one: weights may be too small to be squared.
        scaled = _scaled(magnitudes, exponent)
        error = _rounded(scaled).sub_(scaled).square_().sum(dim=-1) * 4.0**shift
        if best is None:
            best, best_error = exponent, error
        else:
            better = error < best_error
            best, best_error = torch.where(better, exponent, best), torch.where(better, error, best_error)
    return best


def _scaled(magnitudes: Tensor, exponent: Tensor) -> Tensor:
    """magnitudes * 2^-exponent; the factor is put together from its bits, so it is exact."""
    return magnitudes * ((127 - exponent).to(torch.int32) << 23).view(torch.float32).unsqueeze(-1)


# Bits of float32: 1.0, 4.0, and the exponent field.
_ONE, _FOUR, _EXPONENT_FIELD = 0x3F800000, 0x40800000, 0x7F800000


def _rounded(x: Tensor) -> Tensor:
    """The nearest value of the format to each x >= 0, float32; ties go to the even code, all beyond 6 to 6.

    Values are 0.5 apart below 2, 1 apart below 4 and 2 apart above. Adding and subtracting 1.5 * 2^23 steps leaves the
    nearest whole number of steps, ties to even; and evenly many steps are an even code in all three ranges.
    """
    power = (x.view(torch.int32).clamp(_ONE, _FOUR) & _EXPONENT_FIELD).view(torch.float32)  # 1, 2 or 4: two steps
    magic = power * (0.75 * 2.0**23)
    return x.add(magic).sub_(magic).clamp_(max=VALUES[-1])


def _codes(values: Tensor) -> Tensor:
    """uint8 codes 0..7 of non-negative values of the format.

    From 1 on, a float's exponent and first mantissa bit count the codes one by one; only 0.5 stands apart.
    """
    counted = (values.view(torch.int32) >> 22).sub_((_ONE >> 22) - 2).clamp_(min=0)
    return (counted + (values == 0.5)).to(torch.uint8)
