"""PackedWeight: a stack of expert matrices [E, out, in] held in another form, with the expert on dimension 0.

The form is a packed number format, or two thin factors (see :mod:`xmoe.quantization.low_rank`). Two forms are made of
others (:mod:`xmoe.quantization.compound`): factors in a packed format, and a stack whose experts have different forms.

Every tensor of every format has the expert on dimension 0 as well. That is what makes pruning lossless: to keep some
experts is to select rows, and the packed bytes of those that stay are never decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xmoe.errors import CheckpointError, ConfigError
from xmoe.quantization import integer, low_rank, mxfp4


class Format(NamedTuple):
    """How one number format stores a weight."""

    tensors: tuple[str, ...]
    """Names of the tensors it always has."""
    optional: tuple[str, ...]
    """Names of tensors it may have."""
    encode: Callable[..., dict[str, Tensor]]
    decode: Callable[[dict[str, Tensor], torch.dtype], Tensor]
    inputs: Callable[[Mapping[str, Tensor]], int]
    """Length of the logical input dimension."""
    shared: int = 2
    """How many leading dimensions all its tensors share: experts and out, or experts alone."""


def _encode_mxfp4(weight: Tensor, rule: str = "best") -> dict[str, Tensor]:
    blocks, scales = mxfp4.encode(weight, rule)
    return {"blocks": blocks, "scales": scales}


def _mxfp4_inputs(tensors: Mapping[str, Tensor]) -> int:
    mxfp4.check_shapes(tensors["blocks"], tensors["scales"])
    return tensors["scales"].shape[-1] * mxfp4.GROUP


def _factor_inputs(tensors: Mapping[str, Tensor]) -> int:
    low_rank.check_shapes(tensors["left"], tensors["right"])
    return tensors["right"].shape[-1]


FORMATS: dict[str, Format] = {
    "mxfp4": Format(
        ("blocks", "scales"),
        (),
        _encode_mxfp4,
        lambda t, dtype: mxfp4.decode(t["blocks"], t["scales"], dtype),
        _mxfp4_inputs,
    ),
    "int8": Format(
        ("values", "scales"), ("zeros",), integer.encode_int8, integer.decode_int8, lambda t: t["values"].shape[2]
    ),
    "int4": Format(
        ("values", "scales"), ("zeros",), integer.encode_int4, integer.decode_int4, lambda t: t["values"].shape[2] * 2
    ),
    "low-rank": Format(("left", "right"), (), low_rank.encode, low_rank.decode, _factor_inputs, shared=1),
}


_BITS = {"int8": 8, "int4": 4}


class PackedWeight(nn.Module):
    """Expert matrices [E, out, in] held packed.

    Attributes:
        format: a key of :data:`FORMATS`.
        shape: (E, out, in), the logical shape.

    The packed tensors are buffers under their own names (`blocks` and `scales` for MXFP4), so they move with the model
    and stand in its state dict, and no optimizer sees them.
    """

    format: str
    shape: tuple[int, int, int]

    def __init__(self, format: str, tensors: Mapping[str, Tensor]):
        super().__init__()
        if format not in FORMATS:
            raise ConfigError(f"unknown weight format {format!r}; expected one of {', '.join(FORMATS)}")
        known = FORMATS[format]
        if missing := [name for name in known.tensors if name not in tensors]:
            raise CheckpointError(
                f"a {format} weight needs {' and '.join(known.tensors)}, missing {', '.join(missing)}"
            )
        if unknown := [name for name in tensors if name not in known.tensors + known.optional]:
            raise CheckpointError(f"a {format} weight has no tensor {', '.join(unknown)}")
        main = tensors[known.tensors[0]]
        if main.ndim < 3 or any(t.shape[: known.shared] != main.shape[: known.shared] for t in tensors.values()):
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
            begin = ", ".join(("experts", "out")[: known.shared])
            raise CheckpointError(f"the tensors of a {format} weight must all begin with [{begin}], found {shapes}")
        self.format = format
        self.shape = (main.shape[0], main.shape[1], known.inputs(tensors))
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @classmethod
    def encode(cls, weight: Tensor, format: str = "mxfp4", **options) -> PackedWeight:
        """Pack [E, out, in].

        Options are those of the format's encoder: `rule` for mxfp4, `group_size` and `affine` for int8 and int4, `rank`
        for low-rank.
        """
        if format not in FORMATS:
            raise ConfigError(f"unknown weight format {format!r}; expected one of {', '.join(FORMATS)}")
        return cls(format, FORMATS[format].encode(weight, **options))

    def _apply(self, fn, recurse: bool = True):
        """As for any module, but the scales of integers keep their type: `model.float()` is about the rest."""
        super()._apply(fn, recurse)
        if self.format in _BITS and self.scales.dtype != torch.bfloat16:
            self.scales = self.scales.to(torch.bfloat16)  # exact: they were bfloat16 before
        return self

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors by name; those of a form within a form under both names (`left.blocks`)."""
        return dict(self.named_buffers(recurse=False))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensors, scales and zero points counted."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def count(self) -> int:
        """How many weights it has: E * out * in, or those of both factors where it is low-rank."""
        if self.factors:
            return sum(f.numel() if isinstance(f, Tensor) else f.count for f in self.factors)
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def factors(self) -> tuple[Tensor | PackedWeight, ...]:
        """Left [E, out, r] and right [E, r, in] of a low-rank weight, of any other nothing."""
        return (self.left, self.right) if self.format == "low-rank" else ()

    @property
    def group(self) -> int:
        """Consecutive inputs that share a scale; all of them where a row has one. Of the packed number formats."""
        return self.shape[2] // self.scales.shape[2]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def decode(self, experts: Sequence[int] | Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Dense weights of `experts` (all of them when None, else ids in the order wanted): [n, out, in] of `dtype`."""
        return FORMATS[self.format].decode(self.tensors if experts is None else self._rows(experts), dtype)

    def encode_like(self, dense: Tensor) -> PackedWeight:
        """`dense`, of this shape, in the format and groups that this weight has: the same codes where values stayed."""
        options = {}
        if self.format in ("int8", "int4"):
            affine = hasattr(self, "zeros")
            options = {"affine": affine, "group_size": self.group, "scales": None if affine else self.scales}
        return PackedWeight.encode(dense, self.format, **options)

    def snap(self, dense: Tensor) -> Tensor:
        """The nearest values to `dense` (of this shape, float32) that the scales of this weight can hold."""
        if self.format == "mxfp4":
            return mxfp4.snap(dense, self.tensors["scales"])
        return integer.snap(dense, self.tensors, _BITS[self.format])

    def encode_at(self, dense: Tensor) -> PackedWeight:
        """`dense` (of this shape, float32) in the codes nearest to it, all scales as they are: holds what :meth:`snap` gives."""
        tensors = self.tensors
        if self.format == "mxfp4":
            return PackedWeight("mxfp4", tensors | {"blocks": mxfp4.encode_at(dense, tensors["scales"])})
        return PackedWeight(self.format, tensors | {"values": integer.encode_at(dense, tensors, _BITS[self.format])})

    def select_experts(self, ids: Sequence[int] | Tensor) -> PackedWeight:
        """A new weight that holds copies of the experts `ids`, bytes unchanged, in that order."""
        rows = self._rows(ids)
        return PackedWeight(self.format, {name: t.clone() if t._is_view() else t for name, t in rows.items()})

    def expert(self, e: int) -> Tensor | PackedWeight:
        """Expert e alone, a stack of one in the form that it has: views where that is possible."""
        return PackedWeight(self.format, self._rows([e]))

    def leaves(self, e: int) -> list[tuple[str, Tensor | PackedWeight, int]]:
        """What holds the numbers of expert e: name below this weight, a stack that is dense or packed numbers, row in it."""
        if not self.factors:
            return [("", self, e)]
        return [("left", self.left, e), ("right", self.right, e)]

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedWeight:
        """The same form over what `change` makes of each tensor."""
        return PackedWeight(self.format, {name: change(t) for name, t in self.tensors.items()})

    def cast(self, dtype: torch.dtype) -> PackedWeight:
        """What is plain floating point in it (factors) in `dtype`; packed numbers and their scales stay as they are."""
        return self.map(lambda t: t.to(dtype)) if self.format == "low-rank" else self

    def _rows(self, ids: Sequence[int] | Tensor) -> dict[str, Tensor]:
        ids = self._checked(ids)
        if ids.numel() == 1:  # one expert, the common case while decoding expert by expert, is a view
            at = int(ids)
            return {name: t[at : at + 1] for name, t in self.tensors.items()}
        return {name: t.index_select(0, ids.to(t.device)) for name, t in self.tensors.items()}

    def _checked(self, ids: Sequence[int] | Tensor) -> Tensor:
        """`ids` as int64, or a ConfigError."""
        ids = torch.as_tensor(ids, dtype=torch.int64)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.shape[0]):
            raise ConfigError(f"expert ids must lie in 0..{self.shape[0] - 1}, found {ids.tolist()}")
        return ids

    def extra_repr(self) -> str:
        return f"{self.format}, shape={self.shape}, {self.nbytes / 1e6:.1f} MB"


def matrices(weight: Tensor | PackedWeight, e: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Matrices of `dtype` whose product, first to last, is that of expert e [out, in]: one, or the two of a low-rank one.

    Only this expert exists outside its own form, and factors are never multiplied out.
    """
    if isinstance(weight, Tensor):
        return (weight[e].to(dtype),)
    return tuple(dense_matrix(leaf, row, dtype) for _, leaf, row in weight.leaves(e))


def dense_matrix(weight: Tensor | PackedWeight, e: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrix of expert e [out, in] in `dtype`, whatever form the weight has; to look at, not to run."""
    return weight.decode([e], dtype)[0] if isinstance(weight, PackedWeight) else weight[e].to(dtype)


def leaves(weight: Tensor | PackedWeight, e: int) -> list[tuple[str, Tensor | PackedWeight, int]]:
    """As :meth:`PackedWeight.leaves`; a dense stack is its own only leaf."""
    return [("", weight, e)] if isinstance(weight, Tensor) else weight.leaves(e)


def one(weight: Tensor | PackedWeight, e: int) -> Tensor | PackedWeight:
    """Expert e of a stack as a stack of one, in the form that it has: views where that is possible."""
    return weight.expert(e) if isinstance(weight, PackedWeight) else weight[e : e + 1].detach()


def form(weight: Tensor | PackedWeight) -> str:
    """A few words for what a weight is held in: a packed format, or the name of a dense one's dtype."""
    return weight.format if isinstance(weight, PackedWeight) else str(weight.dtype).removeprefix("torch.")
