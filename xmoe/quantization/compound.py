"""Forms made of other forms: factors held in a packed number format, and stacks whose experts differ in form.

    low-rank-int8  (-int4, -mxfp4)   left [E, out, r] and right [E, r, in], each a PackedWeight of that format
    mixed                            parts, each an ordinary stack of some of the experts, dense or packed

A mixed stack has `part`, uint8 [E]: the number of the part that each expert is in; within it experts stand in ascending
order. Parts are called by their numbers, so the third of a weight that is MXFP4 is `2.blocks` and `2.scales`; numbers that
no expert has are left out. All of that has the expert on dimension 0, so a selection of experts is a selection of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from xmoe.errors import CheckpointError, ConfigError
from xmoe.quantization.integer import INT4_GROUPS
from xmoe.quantization.mxfp4 import GROUP
from xmoe.quantization.packed import PackedWeight, dense_matrix, leaves

Stack = Tensor | PackedWeight

MOST_PARTS = 256
_FACTORED = "low-rank-"


class PackedFactors(PackedWeight):
    """A low-rank weight whose two factors are held in one packed number format; runs as two thin products.

    Attributes:
        format: `low-rank-` and the format of the factors.
    """

    def __init__(self, left: PackedWeight, right: PackedWeight):
        nn.Module.__init__(self)
        if left.format != right.format or left.shape[0] != right.shape[0] or left.shape[2] != right.shape[1]:
            raise CheckpointError(
                f"packed factors [experts, out, rank] and [experts, rank, in] of one format expected, found "
                f"{list(left.shape)} {left.format} and {list(right.shape)} {right.format}"
            )
        self.format = _FACTORED + left.format
        self.shape = (left.shape[0], left.shape[1], right.shape[2])
        self.left, self.right = left, right

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {f"{side}.{n}": t for side, f in zip(("left", "right"), self.factors) for n, t in f.tensors.items()}

    @property
    def factors(self) -> tuple[PackedWeight, PackedWeight]:
        return self.left, self.right

    @property
    def device(self) -> torch.device:
        return self.left.device

    def decode(self, experts: Sequence[int] | Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The products [n, out, in], summed in float32 and rounded once."""
        left, right = (f.decode(experts, torch.float32) for f in self.factors)
        return torch.bmm(left, right).to(dtype)

    def encode_like(self, dense: Tensor) -> PackedWeight:
        raise ConfigError(f"{self.format} has no encoder of its own; factor the weight first")

    def select_experts(self, ids: Sequence[int] | Tensor) -> PackedWeight:
        return PackedFactors(*(f.select_experts(ids) for f in self.factors))

    def expert(self, e: int) -> PackedWeight:
        return PackedFactors(*(f.expert(e) for f in self.factors))

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedWeight:
        return PackedFactors(*(f.map(change) for f in self.factors))

    def cast(self, dtype: torch.dtype) -> PackedWeight:
        return self


class MixedWeight(PackedWeight):
    """Experts in several forms: see the module's page. `format` is "mixed".

    Args:
        part: uint8 [E], the part of each expert.
        parts: number -> its stack, dense [n, out, in] or packed, for every number in `part`.
    """

    def __init__(self, part: Tensor, parts: Mapping[int, Stack]):
        nn.Module.__init__(self)
        of = part.tolist()
        self.members: dict[int, list[int]] = {k: [e for e, p in enumerate(of) if p == k] for k in sorted(set(of))}
        shapes = {k: tuple(w.shape) for k, w in parts.items()}
        if set(shapes) != set(self.members) or any(shapes[k][0] != len(m) for k, m in self.members.items()):
            said = ", ".join(f"part {k} {list(shape)}" for k, shape in sorted(shapes.items()))
            counts = ", ".join(f"{len(m)} in part {k}" for k, m in self.members.items())
            raise CheckpointError(f"the parts of a mixed weight do not fit its experts: {said}; `part` has {counts}")
        if len({shape[1:] for shape in shapes.values()}) != 1:
            raise CheckpointError(f"the parts of a mixed weight differ in shape: {sorted(set(shapes.values()))}")
        self.format = "mixed"
        self.shape = (len(of), *next(iter(shapes.values()))[1:])
        self.register_buffer("part", part)
        for k in self.members:
            if isinstance(parts[k], PackedWeight):
                self.add_module(str(k), parts[k])
            else:
                self.register_buffer(str(k), parts[k])
        self._row = {e: (k, row) for k, ids in self.members.items() for row, e in enumerate(ids)}
        self._places: dict[torch.device, dict[int, tuple[Tensor, Tensor]]] = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = {"part": self.part}
        for k, stack in self.parts.items():
            found |= {str(k): stack} if isinstance(stack, Tensor) else {f"{k}.{n}": t for n, t in stack.tensors.items()}
        return found

    @property
    def parts(self) -> dict[int, Stack]:
        """Number of each part -> its stack."""
        return {k: getattr(self, str(k)) for k in self.members}

    def places(self, device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
        """For each part its expert ids int64 [n], and rows int64 [E + 1]: where expert e stands in it, -1 where it does not.

        Indexed with -1, an unused slot, `rows` gives its last entry, which is -1.
        """
        if device not in self._places:
            found = {}
            for k, ids in self.members.items():
                rows = torch.full((self.shape[0] + 1,), -1, dtype=torch.int64)
                rows[ids] = torch.arange(len(ids))
                found[k] = torch.tensor(ids, device=device), rows.to(device)
            self._places[device] = found
        return self._places[device]

    @property
    def device(self) -> torch.device:
        return self.part.device

    @property
    def count(self) -> int:
        return sum(w.numel() if isinstance(w, Tensor) else w.count for w in self.parts.values())

    def decode(self, experts: Sequence[int] | Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        ids = self._checked(range(self.shape[0]) if experts is None else experts).tolist()
        out = torch.empty(len(ids), *self.shape[1:], dtype=dtype, device=self.device)
        for i, e in enumerate(ids):
            k, row = self._row[e]
            out[i] = dense_matrix(getattr(self, str(k)), row, dtype)
        return out

    def encode_like(self, dense: Tensor) -> PackedWeight:
        raise ConfigError("experts of a mixed weight differ in form; encode them part by part")

    def select_experts(self, ids: Sequence[int] | Tensor) -> PackedWeight:
        """Copies of the experts `ids`, in ascending order; parts keep their numbers, and those that lose all experts go."""
        ids = self._checked(ids).tolist()
        if ids != sorted(set(ids)):
            raise ConfigError(f"experts that differ in form can only be kept in ascending order, found {ids}")
        parts = {}
        for k, stack in self.parts.items():
            rows = [self._row[e][1] for e in ids if self._row[e][0] == k]
            if rows:
                parts[k] = stack[rows] if isinstance(stack, Tensor) else stack.select_experts(rows)
        return MixedWeight(self.part[ids], parts)

    def expert(self, e: int) -> Stack:
        k, row = self._row[e]
        stack = getattr(self, str(k))
        return stack[row : row + 1] if isinstance(stack, Tensor) else stack.expert(row)

    def leaves(self, e: int) -> list[tuple[str, Stack, int]]:
        k, row = self._row[e]
        return leaves(getattr(self, str(k)), row)

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedWeight:
        parts = {k: change(w) if isinstance(w, Tensor) else w.map(change) for k, w in self.parts.items()}
        return MixedWeight(change(self.part), parts)

    def cast(self, dtype: torch.dtype) -> PackedWeight:
        parts = {k: w.to(dtype) if isinstance(w, Tensor) else w.cast(dtype) for k, w in self.parts.items()}
        return MixedWeight(self.part, parts)

    def extra_repr(self) -> str:
        return f"{self.format}, shape={self.shape}, part={self.part.tolist()}"


# ------------------------------------------------------------------------------------------------------------- making


def rank_unit(format: str, group_size: int) -> int:
    """What the rank must be a multiple of for factors to be packed in `format`: left's inputs are grouped along it."""
    return {"mxfp4": GROUP, "int4": group_size}.get(format, 1)


def pack_factors(weight: PackedWeight, format: str, group_size: int = 32) -> PackedFactors:
    """The factors of a low-rank weight in a packed number format; ranks that its groups do not divide get zeros behind.

    Zeros are exact in every format, so they change nothing but the bytes: r becomes the next multiple of
    :func:`rank_unit`.
    """
    if format == "int4" and group_size not in INT4_GROUPS:
        raise ConfigError(f"int4 groups may hold {', '.join(map(str, INT4_GROUPS))} weights, not {group_size}")
    left, right = (f if isinstance(f, Tensor) else f.decode(dtype=torch.float32) for f in weight.factors)
    more = -left.shape[2] % rank_unit(format, group_size)
    left, right = nn.functional.pad(left, (0, more)), nn.functional.pad(right, (0, 0, 0, more))
    options = {"group_size": group_size} if format == "int4" else {}
    return PackedFactors(*(PackedWeight.encode(f, format, **options) for f in (left, right)))


def joined(stacks: Sequence[Stack]) -> Stack:
    """Stacks of one form as one: bytes unchanged."""
    first = stacks[0]
    if isinstance(first, Tensor):
        return torch.cat([s.detach() for s in stacks])
    if isinstance(first, PackedFactors):
        return PackedFactors(*(joined([s.factors[i] for s in stacks]) for i in range(2)))
    return PackedWeight(first.format, {n: torch.cat([s.tensors[n] for s in stacks]) for n in first.tensors})


def signature(stack: Stack) -> tuple:
    """Equal for stacks that can be joined: format, and dtype and shape of an expert in every tensor."""
    tensors = {"": stack} if isinstance(stack, Tensor) else stack.tensors
    kind = "dense" if isinstance(stack, Tensor) else stack.format
    return kind, tuple((name, t.dtype, tuple(t.shape[1:])) for name, t in tensors.items())


def assemble(experts: Sequence[Sequence[Stack]]) -> list[Stack]:
    """One weight for each place in `experts`, which holds for each expert its stacks of one, in one or several forms.

    The weights (gate_up and down) are parted alike: experts are together whose forms agree in all of them. Where all
    agree, the weights are ordinary stacks. Parts are numbered by their first expert.
    """
    kinds = [tuple(signature(stack) for stack in own) for own in experts]
    numbers = {kind: k for k, kind in enumerate(dict.fromkeys(kinds))}
    if len(numbers) > MOST_PARTS:
        raise ConfigError(f"the experts of a layer have {len(numbers)} forms; at most {MOST_PARTS} can be told apart")
    if len(numbers) == 1:
        return [joined(column) for column in zip(*experts)]
    part = torch.tensor([numbers[kind] for kind in kinds], dtype=torch.uint8)
    made = []
    for column in zip(*experts):
        own = {k: joined([s for s, kind in zip(column, kinds) if numbers[kind] == k]) for k in numbers.values()}
        made.append(MixedWeight(part.to(next(iter(own.values())).device), own))
    return made
