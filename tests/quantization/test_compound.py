"""Packed factors and mixed stacks: values, rows, names and bytes against the pieces they are made of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xmoe.errors import CheckpointError, ConfigError
from xmoe.quantization.compound import MixedWeight, PackedFactors, assemble, joined, pack_factors, rank_unit, signature
from xmoe.quantization.packed import PackedWeight, dense_matrix, form, leaves, matrices

OUT, WIDTH = 12, 64


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(experts: int, rank: int, seed: int = 0) -> PackedWeight:
    return PackedWeight(
        "low-rank", {"left": drawn(experts, OUT, rank, seed=seed), "right": drawn(experts, rank, WIDTH, seed=seed + 1)}
    )


FORMS = {
    "dense": lambda w, seed: w,
    "bfloat16": lambda w, seed: w.bfloat16(),
    "int8": lambda w, seed: PackedWeight.encode(w, "int8"),
    "int4": lambda w, seed: PackedWeight.encode(w, "int4"),
    "int4 in groups of 64": lambda w, seed: PackedWeight.encode(w, "int4", group_size=64),
    "mxfp4": lambda w, seed: PackedWeight.encode(w),
    "rank 3": lambda w, seed: low_rank(len(w), 3, seed),
    "rank 5": lambda w, seed: low_rank(len(w), 5, seed),
    "rank 5 in int8": lambda w, seed: pack_factors(low_rank(len(w), 5, seed), "int8"),
    "rank 5 in mxfp4": lambda w, seed: pack_factors(low_rank(len(w), 5, seed), "mxfp4"),
}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(list(FORMS)), min_size=1, max_size=9), st.data())
def test_what_is_assembled_is_its_pieces(kinds, data):
    """Every expert keeps its bytes; alike ones stand together, in ascending order; rows of it are rows of them."""
    pieces = [FORMS[kind](drawn(1, OUT, WIDTH, seed=i), i) for i, kind in enumerate(kinds)]
    (whole,) = assemble([[p] for p in pieces])
    assert tuple(whole.shape) == (len(kinds), OUT, WIDTH)
    assert isinstance(whole, MixedWeight) == (len(set(kinds)) > 1)
    values = torch.stack([dense_matrix(p, 0) for p in pieces])
    for e, piece in enumerate(pieces):
        assert torch.equal(dense_matrix(whole, e), values[e])
        for (name, stack, row), (other, old, _) in zip(leaves(whole, e), leaves(piece, 0), strict=True):
            assert name == other and torch.equal(dense_matrix(stack, row), dense_matrix(old, 0))
        for a, b in zip(matrices(whole, e, torch.float32), matrices(piece, 0, torch.float32), strict=True):
            assert torch.equal(a, b)
    if not isinstance(whole, MixedWeight):
        return
    assert [list(dict.fromkeys(kinds)).index(kind) for kind in kinds] == whole.part.tolist()
    assert whole.nbytes == sum(p.nbytes for p in pieces) + len(kinds)
    assert torch.equal(whole.decode(dtype=torch.float32), values)
    ids = sorted(data.draw(st.sets(st.integers(0, len(kinds) - 1), min_size=1)))
    some = whole.select_experts(ids)
    assert torch.equal(some.decode(dtype=torch.float32), values[ids]) and some.part.tolist() == whole.part[ids].tolist()
    assert signature(whole.expert(ids[0])) == signature(pieces[ids[0]])
    for k, (members, rows) in whole.places(whole.device).items():
        assert rows[-1] == -1 and rows[members].tolist() == list(range(len(members)))
        assert (rows >= 0).sum() == len(members) == whole.parts[k].shape[0]


def test_its_tensors_stand_in_the_state_dict_and_move_with_it():
    (weight,) = assemble(
        [[FORMS[kind](drawn(1, OUT, WIDTH, seed=i), i)] for i, kind in enumerate(("dense", "rank 5 in int8", "mxfp4"))]
    )
    owner = nn.Module()
    owner.gate_up = weight
    names = {"part", "0", "1.left.values", "1.left.scales", "1.right.values", "1.right.scales", "2.blocks", "2.scales"}
    assert set(weight.tensors) == names and set(owner.state_dict()) == {f"gate_up.{n}" for n in names}
    assert not list(owner.parameters())
    before = weight.decode(dtype=torch.float32)
    half = weight.cast(torch.bfloat16)
    assert half.tensors["0"].dtype == torch.bfloat16 and torch.equal(
        half.tensors["2.blocks"], weight.tensors["2.blocks"]
    )
    assert torch.equal(half.decode([1, 2], torch.float32), before[1:])
    assert torch.equal(weight.map(torch.clone).decode(dtype=torch.float32), before)
    assert weight.to("meta").tensors["1.left.values"].is_meta


@pytest.mark.parametrize(("format", "group"), [("int8", 32), ("int4", 32), ("int4", 64), ("mxfp4", 32)])
@pytest.mark.parametrize("rank", [1, 31, 32, 40])
def test_packed_factors_are_the_factors_within_the_formats_error(format, group, rank):
    weight = low_rank(4, rank)
    packed = pack_factors(weight, format, group)
    unit = rank_unit(format, group)
    assert unit == {"int8": 1, "int4": group, "mxfp4": 32}[format]
    held = -(-rank // unit) * unit
    assert (
        packed.left.shape == (4, OUT, held)
        and packed.right.shape == (4, held, WIDTH)
        and packed.format == f"low-rank-{format}"
    )
    assert packed.shape == weight.shape and packed.count == 4 * held * (OUT + WIDTH)
    assert packed.nbytes == packed.left.nbytes + packed.right.nbytes
    left, right = packed.left.decode(dtype=torch.float32), packed.right.decode(dtype=torch.float32)
    assert not left[..., rank:].any() and not right[:, rank:].any()
    for found, factor in ((left[..., :rank], weight.left), (right[:, :rank], weight.right)):
        assert float((found - factor).norm()) < (0.012 if format == "int8" else 0.15) * float(factor.norm())
    torch.testing.assert_close(packed.decode(dtype=torch.float32), torch.bmm(left, right))
    chosen = packed.select_experts([2, 0])
    assert torch.equal(chosen.decode(dtype=torch.float32), packed.decode([2, 0], torch.float32))
    for e in range(4):
        a, b = matrices(packed, e, torch.float32)
        assert torch.equal(a, left[e]) and torch.equal(b, right[e])


def test_mistakes():
    dense, packed = drawn(2, OUT, WIDTH), PackedWeight.encode(drawn(1, OUT, WIDTH))
    part = torch.tensor([0, 1, 0], dtype=torch.uint8)
    assert form(MixedWeight(part, {0: dense, 1: packed})) == "mixed"
    for parts in ({0: dense}, {0: dense, 2: packed}, {0: dense[:1], 1: packed}, {0: dense, 1: packed, 2: packed}):
        with pytest.raises(CheckpointError, match="do not fit its experts"):
            MixedWeight(part, parts)
    with pytest.raises(CheckpointError, match="differ in shape"):
        MixedWeight(part, {0: dense[:, :5], 1: packed})
    weight = MixedWeight(part, {0: dense, 1: packed})
    with pytest.raises(ConfigError, match="ascending order"):
        weight.select_experts([2, 0])
    with pytest.raises(ConfigError, match=r"0\.\.2"):
        weight.decode([3])
    for other in (weight, pack_factors(low_rank(2, 3), "int8")):
        with pytest.raises(ConfigError, match=r"part by part|factor the weight first"):
            other.encode_like(dense)
    left, right = (PackedWeight.encode(drawn(2, n, 32), "int8") for n in (OUT, 32))
    with pytest.raises(CheckpointError, match="of one format expected"):
        PackedFactors(left, PackedWeight.encode(drawn(2, 32, 32), "int4"))
    with pytest.raises(CheckpointError, match="of one format expected"):
        PackedFactors(right, left)
    with pytest.raises(ConfigError, match="not 48"):
        pack_factors(low_rank(2, 3), "int4", 48)
    assert torch.equal(joined([dense, dense[:1]]), torch.cat((dense, dense[:1])))
