"""The byte order in which MXFP4 experts wait for the tensor cores, and the way back.

A checkpoint stores 32 four-bit codes in 16 bytes beside one scale byte. Decoding that order on the fly costs six to eight
instructions a weight, more than an H200 can issue while its memory delivers. Here the same bits are put, once, where the
kernels want them:

- Matrices are cut into tiles of 64 output rows by 128 inputs, 4096 bytes each, tiles of one row block one after another:
  a program that walks along the inputs reads memory from left to right.
- The 32 bytes of a tile that a thread decodes are two 16-byte words, each warp's words side by side: bytes stand in the
  order (word, warp, lane / 4, lane % 4, step, row half, pair), which is how a 16-bit matrix fragment is spread over the
  four warps of a warp group. Each thread loads its share and holds the fragment, without any exchange.
- A byte joins inputs k and k + 8: the first code in bits 7 3 2 1, the second in bits 6 5 4 0 (sign, two of exponent, one
  of mantissa). One AND and one byte permutation make fp16 values of the first, two shifts more of the second, both times
  2^-14 (sign in bit 15, exponent in bits 11 10, mantissa in bit 9 of an fp16).
- `paired` matrices (gate_up, whose rows alternate gate and up) put a gate row and its up row into the same thread, so
  SwiGLU needs no exchange either.
- Scales stand beside, four a row in one 32-bit word, rows in the order (warp, lane / 4, half). Where each is exact in
  fp16 they are stored as the upper byte of the fp16 number 2^(scale - 127 + 14), which is (scale - 98) << 2.

Rows are padded to a multiple of 64 and inputs to a multiple of 128, with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from xmoe.errors import CheckpointError
from xmoe.quantization.packed import PackedWeight

ROWS, INPUTS = 64, 128  # of a tile
GROUP = 32  # inputs that share a scale
# 0.5 * 2^(s - 127) >= 2^-24, the smallest fp16, and an fp16 exponent field s - 98 <= 30: products are exact in between.
FP16_SCALES = (104, 128)
_INVALID_SCALE = 255  # NaN in the OCP specification of microscaling formats


@dataclass(frozen=True)
class Repacked:
    """E matrices [N, K] of MXFP4 in kernel order; see the top of this file.

    codes: uint8 [E, N/64, K/128, 4096]. scales: uint8 [E, N/64, K/128, 64, 4], the upper bytes of fp16 scales where
    `exact` (every non-zero weight is exact in fp16), else the checkpoint's own bytes. odd_places and odd_scales: scales
    of all-zero groups that `exact` could not express, kept for the way back: (expert, row, group) int64 [n, 3], uint8 [n].
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, int, int]
    paired: bool
    exact: bool
    odd_places: Tensor
    odd_scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        return self.codes.numel() + self.scales.numel() + 25 * self.odd_scales.numel()

    def to(self, device: torch.device | str) -> Repacked:
        """The same weights on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("codes", "scales", "odd_places", "odd_scales")}
        return replace(self, **moved)

    def select_experts(self, ids: Tensor | list[int]) -> Repacked:
        """The named experts in that order; bytes are copied, never decoded."""
        index = torch.as_tensor(ids, dtype=torch.int64, device=self.codes.device)
        place = self.odd_places[:, 0].unsqueeze(0) == index.unsqueeze(1)  # [kept, odd]
        new, old = place.nonzero(as_tuple=True)
        places = torch.cat((new.unsqueeze(1), self.odd_places[old, 1:]), dim=1)
        return replace(
            self,
            codes=self.codes[index],
            scales=self.scales[index],
            shape=(len(index), *self.shape[1:]),
            odd_places=places,
            odd_scales=self.odd_scales[old],
        )


def repack(blocks: Tensor, scales: Tensor, *, paired: bool) -> Repacked:
    """blocks uint8 [E, N, K/32, 16] and scales uint8 [E, N, K/32] of a checkpoint -> :class:`Repacked`.

    paired: rows alternate gate and up, as gate_up's do. Works an expert at a time, on the device of its inputs.
    Raises CheckpointError on a scale byte of 255, which means NaN.
    """
    E, N, groups, _ = blocks.shape
    K = groups * GROUP
    if bool((scales == _INVALID_SCALE).any()):
        raise CheckpointError("an MXFP4 scale byte is 255 (NaN); expected 0 to 254: is the checkpoint damaged?")
    row_tiles, k_tiles = -(-N // ROWS), -(-K // INPUTS)
    codes_out = blocks.new_empty(E, row_tiles, k_tiles, ROWS * INPUTS // 2)
    scales_out = blocks.new_empty(E, row_tiles, k_tiles, ROWS, INPUTS // GROUP)
    low, high = FP16_SCALES
    outside = (scales < low) | (scales > high)
    exact = True
    if bool(outside.any()):
        empty = torch.stack([((b & 0x77) == 0).all(-1) for b in blocks])
        exact = not bool((outside & ~empty).any())
    odd = outside if exact else torch.zeros_like(outside)
    places = odd.nonzero()
    for e in range(E):
        nibbles = torch.stack((blocks[e] & 15, blocks[e] >> 4), dim=-1).reshape(N, K)
        padded = nibbles.new_zeros(row_tiles * ROWS, k_tiles * INPUTS)
        padded[:N, :K] = nibbles
        eights = padded.view(row_tiles * ROWS, k_tiles, 8, 2, 8)  # inputs of a tile: (step, k or k + 8, the other 8)
        codes_out[e] = _tile_codes(_join(eights[..., 0, :], eights[..., 1, :]), row_tiles, k_tiles, paired)
        kept = scales[e].masked_fill(odd[e], low)
        padded = kept.new_full((row_tiles * ROWS, k_tiles * INPUTS // GROUP), low)
        padded[:N, :groups] = kept
        scales_out[e] = _tile_scales((padded - 98) << 2 if exact else padded, row_tiles, k_tiles, paired)
    return Repacked(codes_out, scales_out, (E, N, K), paired, exact, places, scales[odd])


def unpack(packed: Repacked) -> tuple[Tensor, Tensor]:
    """The checkpoint's own blocks and scales, bit for bit: the inverse of :func:`repack`."""
    E, N, K = packed.shape
    row_tiles, k_tiles = packed.codes.shape[1:3]
    blocks = packed.codes.new_empty(E, N, K // GROUP, GROUP // 2)
    scales = packed.codes.new_empty(E, N, K // GROUP)
    for e in range(E):
        joined = _untile_codes(packed.codes[e], row_tiles, k_tiles, packed.paired)
        first = (joined >> 4 & 8) | (joined >> 1 & 7)
        second = (joined >> 3 & 8) | (joined >> 3 & 6) | (joined & 1)
        nibbles = torch.stack((first, second), dim=3).reshape(row_tiles * ROWS, k_tiles * INPUTS)[:N, :K]
        pairs = nibbles.reshape(N, K // GROUP, GROUP // 2, 2)
        blocks[e] = pairs[..., 0] | (pairs[..., 1] << 4)
        flat = _untile_scales(packed.scales[e], row_tiles, k_tiles, packed.paired)[:N, : K // GROUP]
        scales[e] = (flat >> 2) + 98 if packed.exact else flat
    scales[packed.odd_places.unbind(1)] = packed.odd_scales
    return blocks, scales


class RepackedWeight(PackedWeight):
    """A :class:`PackedWeight` that holds kernel order alone, so that a model needs the memory once.

    It answers as the weight it was made of: `blocks`, `scales`, `decode`, `select_experts` and the state dict give the
    checkpoint's own bytes back, unpacked when asked for.
    """

    def __init__(self, source: PackedWeight, *, paired: bool):
        nn.Module.__init__(self)
        self.format, self.shape, self.paired = source.format, source.shape, paired
        self._hold(repack(source.blocks, source.scales, paired=paired))

    def _hold(self, packed: Repacked) -> None:
        self.exact = packed.exact
        tensors = {"codes": packed.codes, "exponents": packed.scales}
        tensors |= {"odd_places": packed.odd_places, "odd_scales": packed.odd_scales}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def repacked(self) -> Repacked:
        """What the kernels take."""
        held = self.codes, self.exponents, self.shape, self.paired, self.exact, self.odd_places, self.odd_scales
        return Repacked(*held)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's blocks and scales, unpacked now."""
        return dict(zip(("blocks", "scales"), unpack(self.repacked)))

    @property
    def blocks(self) -> Tensor:
        return self.tensors["blocks"]

    @property
    def scales(self) -> Tensor:
        return self.tensors["scales"]

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        return self.repacked.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def _rows(self, ids) -> dict[str, Tensor]:
        return dict(zip(("blocks", "scales"), unpack(self.repacked.select_experts(ids))))

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        destination.update({prefix + name: tensor for name, tensor in self.tensors.items()})

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors) -> None:
        names = [prefix + "blocks", prefix + "scales"]
        if absent := [name for name in names if name not in state]:
            missing.extend(absent)
            return
        self._hold(repack(*(state[name].to(self.device) for name in names), paired=self.paired))


def _join(first: Tensor, second: Tensor) -> Tensor:
    """Two four-bit codes in a byte: the first in bits 7 3 2 1, the second in bits 6 5 4 0."""
    return (first & 8) << 4 | (first & 7) << 1 | (second & 8) << 3 | (second & 6) << 3 | (second & 1)


# A row of a tile is (warp 4, half 2, lane 8) counted in the fragment's own order; gate and up are its two halves.
def _rows_to_fragment(rows: Tensor, row_tiles: int, paired: bool) -> Tensor:
    """[row_tiles * 64, ...] -> [row_tiles, half 2, warp 4, lane 8, ...]."""
    rest = rows.shape[1:]
    if paired:
        return rows.view(row_tiles, 4, 8, 2, *rest).movedim(3, 1)
    return rows.view(row_tiles, 4, 2, 8, *rest).movedim(2, 1)


def _rows_from_fragment(fragment: Tensor, paired: bool) -> Tensor:
    rest = fragment.shape[4:]
    return fragment.movedim(1, 3 if paired else 2).reshape(-1, *rest)


def _tile_codes(joined: Tensor, row_tiles: int, k_tiles: int, paired: bool) -> Tensor:
    """[rows, k_tiles, 8, 8] in the checkpoint's order -> [row_tiles, k_tiles, 4096] in the kernel's."""
    rows = _rows_to_fragment(joined, row_tiles, paired)  # [row_tiles, half 2, warp 4, lane / 4 8, k_tiles, step 8, 8]
    parts = rows.reshape(row_tiles, 2, 4, 8, k_tiles, 2, 4, 4, 2)  # ..., word, step in word, lane % 4, pair
    return parts.permute(0, 4, 5, 2, 3, 7, 6, 1, 8).reshape(row_tiles, k_tiles, ROWS * INPUTS // 2)


def _untile_codes(codes: Tensor, row_tiles: int, k_tiles: int, paired: bool) -> Tensor:
    parts = codes.view(row_tiles, k_tiles, 2, 4, 8, 4, 4, 2, 2).permute(0, 7, 3, 4, 1, 2, 6, 5, 8)
    return _rows_from_fragment(parts.reshape(row_tiles, 2, 4, 8, k_tiles, 8, 8), paired)


def _tile_scales(scales: Tensor, row_tiles: int, k_tiles: int, paired: bool) -> Tensor:
    """[rows, k_tiles * 4] -> [row_tiles, k_tiles, 64, 4], rows as (warp, lane, half)."""
    rows = _rows_to_fragment(scales, row_tiles, paired).movedim(1, 3)  # [row_tiles, 4, 8, 2, k_tiles * 4]
    return rows.reshape(row_tiles, ROWS, k_tiles, 4).transpose(1, 2)


def _untile_scales(scales: Tensor, row_tiles: int, k_tiles: int, paired: bool) -> Tensor:
    rows = scales.transpose(1, 2).reshape(row_tiles, 4, 8, 2, k_tiles * 4).movedim(3, 1)
    return _rows_from_fragment(rows, paired)
