"""In which form a native checkpoint holds an expert weight, read from the names and shapes of its tensors.

NAME                         dense
NAME.blocks  .scales         mxfp4
NAME.values  .scales (.zeros)   int8 or int4
NAME.left    NAME.right      low-rank factors, each dense or, under names of its own (NAME.left.blocks), packed
NAME.part    NAME.0 ...      mixed: which part each expert is in, and every part in one of the forms above
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from xmoe.checkpoint.layouts import packed_shapes
from xmoe.checkpoint.shard_reader import ShardReader
from xmoe.errors import CheckpointError
from xmoe.quantization.compound import MixedWeight, PackedFactors
from xmoe.quantization.mxfp4 import GROUP
from xmoe.quantization.packed import FORMATS, PackedWeight

Shape = tuple[int, ...]


class Form(NamedTuple):
    """How one expert weight is stored.

    format: "dense", a packed format, "low-rank" (whatever its factors are held in) or "mixed". shape: (E, out, in).
    expected: name on disk -> the shape it must have. bytes: names of tensors of integers. within: the factors left and
    right, or the parts, by name. rank: of a low-rank one.
    """

    name: str
    format: str
    shape: Shape
    expected: dict[str, Shape]
    bytes: tuple[str, ...] = ()
    within: Mapping[str, Form] = MappingProxyType({})
    rank: int = 0

    @property
    def formats(self) -> list[str]:
        """What describes it to a person: one format, or that of each part."""
        if self.format == "mixed":
            return [f for part in self.within.values() for f in part.formats]
        factors = {form.format for form in self.within.values()} - {"dense"}
        return ["-".join((self.format, *sorted(factors)))]

    @property
    def ranks(self) -> list[int]:
        """Rank of every low-rank part."""
        if self.format == "mixed":
            return [rank for part in self.within.values() for rank in part.ranks]
        return [self.rank] if self.format == "low-rank" else []

    @property
    def spared(self) -> int:
        """Parameters that an expert in this form is spared by its factors; of a mixed one ask the parts."""
        _, out, width = self.shape
        return out * width - self.rank * (out + width) if self.rank else 0


def read_form(reader: ShardReader, name: str, shape: Shape) -> Form:
    """The form of the weight `name` of the logical `shape`, as the names and shapes on disk have it."""
    below = _below(reader, name)
    if "part" in below:
        return _mixed(reader, name, shape, below)
    if any(n.partition(".")[0] in ("left", "right") for n in below):
        return _low_rank(reader, name, shape, below)
    if "blocks" in below or ("scales" in below and "values" not in below):
        return _packed(name, "mxfp4", shape, {})
    if "values" in below or "scales" in below:
        # int4 has two values a byte
        found = reader[f"{name}.values"].shape
        scales = reader[f"{name}.scales"].shape if "scales" in below else ()
        group = shape[2] // max(scales[-1], 1) if scales else shape[2]
        return _packed(
            name,
            "int8" if found[-1:] == shape[2:] else "int4",
            shape,
            {"group": max(group, 1), "zeros": "zeros" in below},
        )
    return Form(name, "dense", shape, {name: shape})


def _below(reader: Iterable[str], name: str) -> set[str]:
    return {n.removeprefix(name + ".") for n in reader if n.startswith(name + ".")}


def _packed(name: str, format: str, shape: Shape, options: Mapping) -> Form:
    shapes = packed_shapes(format, shape, options.get("group", GROUP))
    if not options.get("zeros"):
        shapes.pop("zeros", None)
    integers = ("blocks", "scales") if format == "mxfp4" else ("values", "zeros")
    return Form(
        name,
        format,
        shape,
        {f"{name}.{n}": s for n, s in shapes.items()},
        tuple(f"{name}.{n}" for n in shapes if n in integers),
    )


def _low_rank(reader: ShardReader, name: str, shape: Shape, below: set[str]) -> Form:
    E, out, width = shape
    rank = _rank(reader, name, below)
    within = {
        "left": read_form(reader, f"{name}.left", (E, out, rank)),
        "right": read_form(reader, f"{name}.right", (E, rank, width)),
    }
    expected = {n: s for form in within.values() for n, s in form.expected.items()}
    return Form(name, "low-rank", shape, expected, _all_bytes(within), within, rank)


def _rank(reader: ShardReader, name: str, below: set[str]) -> int:
    """Rows of the right factor; where that is missing, columns of the left; 0 where shapes make no sense."""
    for side, at in (("right", 1), ("left", 2)):
        for part in sorted(n for n in below if n.partition(".")[0] == side):
            found = reader[f"{name}.{part}"].shape
            if side == "right" or part == "left":
                return found[at] if len(found) > at else 0
    return 0


def _mixed(reader: ShardReader, name: str, shape: Shape, below: set[str]) -> Form:
    E, out, width = shape
    within = {}
    for k in sorted({n.partition(".")[0] for n in below} - {"part"}, key=lambda k: (len(k), k)):
        first = min(n for n in reader if n == f"{name}.{k}" or n.startswith(f"{name}.{k}."))
        rows = reader[first].shape[:1]
        if k.isdigit():
            within[k] = read_form(reader, f"{name}.{k}", (rows[0] if rows else 0, out, width))
    expected = {f"{name}.part": (E,)} | {n: s for form in within.values() for n, s in form.expected.items()}
    return Form(name, "mixed", shape, expected, (f"{name}.part", *_all_bytes(within)), within)


def _all_bytes(within: Mapping[str, Form]) -> tuple[str, ...]:
    return tuple(n for form in within.values() for n in form.bytes)


def read_weight(reader: ShardReader, form: Form) -> Tensor | PackedWeight:
    """The weight on the CPU, every tensor as it is stored: views of the mapped file where they can be."""
    if form.format == "dense":
        return reader.tensor(form.name)
    if form.format == "mixed":
        parts = {int(k): read_weight(reader, part) for k, part in form.within.items()}
        return MixedWeight(reader.tensor(f"{form.name}.part"), parts)
    if form.format == "low-rank":
        factors = [read_weight(reader, factor) for factor in form.within.values()]
        if all(isinstance(f, Tensor) for f in factors):
            return PackedWeight("low-rank", dict(zip(form.within, factors)))
        if not all(isinstance(f, PackedWeight) for f in factors):
            raise CheckpointError(f"{form.name}: one factor is packed and the other is not; the file is damaged")
        return PackedFactors(*factors)
    names = FORMATS[form.format].tensors + FORMATS[form.format].optional
    return PackedWeight(
        form.format, {n: reader.tensor(f"{form.name}.{n}") for n in names if f"{form.name}.{n}" in form.expected}
    )


def members(reader: ShardReader, form: Form) -> dict[str, list[int]]:
    """Name on disk of every tensor of the weight -> the experts that its rows are of, in their order."""
    everyone = list(range(form.shape[0]))
    if form.format != "mixed":
        return dict.fromkeys(form.expected, everyone)
    part = reader.tensor(f"{form.name}.part").tolist()
    found = {f"{form.name}.part": everyone}
    for k, own in form.within.items():
        found |= {name: [e for e in everyone if part[e] == int(k)] for name in own.expected}
    return found


def spared(reader: ShardReader, form: Form) -> list[int]:
    """Parameters that each expert is spared by low-rank factors: those of the whole matrix less theirs."""
    if form.format != "mixed":
        return [form.spared] * form.shape[0]
    return [form.within[str(k)].spared for k in reader.tensor(f"{form.name}.part").tolist()]


def check_parts(reader: ShardReader, gate_up: Form, down: Form, where: str) -> None:
    """Raise :class:`CheckpointError` unless both weights of a layer are parted alike, into the parts that are there."""
    if "mixed" not in (gate_up.format, down.format):
        return
    found = []
    for form in (gate_up, down):
        found.append(reader.tensor(f"{form.name}.part").tolist() if form.format == "mixed" else None)
        counts = {k: part.shape[0] for k, part in form.within.items()}
        if found[-1] is None or counts != {str(k): found[-1].count(k) for k in set(found[-1])}:
            raise CheckpointError(f"{where}: the parts of {form.name} are {counts}, which its `part` does not say")
    if found[0] != found[1]:
        raise CheckpointError(
            f"{where}: {gate_up.name} and {down.name} part the experts differently; the file is damaged"
        )
