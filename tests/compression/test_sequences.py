"""Every method after every other: what is stored is what runs, bytes are those reported, zeros stay where they were put."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.compression.low_rank import Packing, factor_bytes
from xmoe.compression.reduce import METHODS, reduce
from xmoe.compression.routing import record_routing
from xmoe.errors import ConfigError
from xmoe.quantization.compound import pack_factors, rank_unit
from xmoe.quantization.packed import PackedWeight, dense_matrix, leaves

WEIGHTS = ("gate_up", "down")
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_experts": 5, "num_experts_per_tok": 2, "num_hidden_layers": 2}


@pytest.fixture
def model(random_model, config):
    return random_model(config(**SHAPE))


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", METHODS)
@torch.no_grad()
def test_any_two_methods(model, tokens, tmp_path, check_file, first, second):
    small, stages = reduce(model, [first, second], 0.25, stats=record_routing(model, [tokens], sample=40))
    one, two = stages
    assert one.bytes_after == two.bytes_before and one.weights_after == two.weights_before
    opened = check_file(small, two.bytes_after, tmp_path / "out", tokens)
    assert two.output_error is not None and all(e < 1 for e in two.output_error)
    low = "low-rank" in (first, second)
    if low:
        packed = second if second in ("int8", "int4", "mxfp4") else None
        assert opened.formats == [f"low-rank-{packed}" if packed else "low-rank"]
    else:
        last = [m for m in (first, second) if m in ("int8", "int4", "mxfp4")][-1:]
        assert opened.formats == (last or ["dense"])
    if second == "low-rank":
        assert two.bytes_after <= 0.75 * two.bytes_before
        assert ("zeros before it did not survive" in two.detail) == (first == "magnitude")
    if second == "magnitude":
        assert two.bytes_after == two.bytes_before and two.zeros >= round(0.25 * two.weights_after) - 40
    if first == "magnitude" and second in ("int8", "int4", "mxfp4"):
        assert two.zeros >= one.zeros  # nothing that was zero comes back
    if second == "neurons":
        assert small.config.intermediate_size < 96 and two.bytes_after < two.bytes_before
    if first == second and first in ("int8", "int4", "mxfp4"):
        assert two.weight_error == (0.0, 0.0)


@torch.no_grad()
def test_all_six_in_a_row_and_the_report_adds_up(model, tokens, tmp_path, check_file):
    order = ["magnitude", "neurons", "int8", "low-rank", "magnitude", "neurons", "mxfp4"]
    small, stages = reduce(model, order, 0.2, stats=record_routing(model, [tokens], sample=40))
    assert [s.method for s in stages] == order
    for earlier, later in itertools.pairwise(stages):
        assert (earlier.bytes_after, earlier.weights_after) == (later.bytes_before, later.weights_before)
    check_file(small, stages[-1].bytes_after, tmp_path / "out", tokens)


@torch.no_grad()
def test_packed_weights_are_zeroed_where_they_stand(model):
    """Scales and all codes that are not zeroed stay; exactly the least are."""
    for format, options in (("int8", {}), ("int8", {"affine": True, "group_size": 32}), ("int4", {"group_size": 32}),
                            ("int4", {"affine": True}), ("mxfp4", {})):  # fmt: skip
        import copy

        packed = copy.deepcopy(model)
        for block in packed.blocks:
            for name in WEIGHTS:
                block.moe.experts.pack(
                    name, PackedWeight.encode(getattr(block.moe.experts, name).data, format, **options)
                )
        small, _ = reduce(packed, ["magnitude"], 0.6)
        for old, new in zip(packed.blocks, small.blocks):
            for name in WEIGHTS:
                a, b = getattr(old.moe.experts, name), getattr(new.moe.experts, name)
                assert torch.equal(a.scales, b.scales) and b.format == format
                if "affine" in options:
                    assert torch.equal(a.zeros, b.zeros)
                was, now = a.decode(dtype=torch.float32), b.decode(dtype=torch.float32)
                gone = (now == 0).flatten(1)
                assert torch.equal(now[now != 0], was[now != 0])
                assert bool((gone.sum(1) == (was == 0).flatten(1).sum(1).clamp(min=round(0.6 * was[0].numel()))).all())
                sizes = was.abs().flatten(1)
                assert bool((sizes.masked_fill(~gone, 0).amax(1) <= sizes.masked_fill(gone, 9e9).amin(1)).all())


@torch.no_grad()
@pytest.mark.parametrize(("format", "unit"), [("int8", 1), ("int4", 32), ("mxfp4", 32)])
def test_neurons_leave_packed_codes_as_they_are(model, format, unit):
    """What is left of gate_up's rows and down's columns has the codes and scales it had."""
    packed, _ = reduce(model, [format])
    small, _ = reduce(packed, ["neurons"], 0.3)
    F = small.config.intermediate_size
    assert {1: 67, 32: 64}[unit] == F
    for old, new in zip(packed.blocks, small.blocks):
        a, b = old.moe.experts, new.moe.experts
        for e in range(5):
            was, now = (dense_matrix(x.down, e) for x in (a, b))
            at = [next(j for j in range(96) if torch.equal(was[:, j], now[:, i])) for i in range(F)]
            assert at == sorted(set(at))
            rows = [r for j in at for r in (2 * j, 2 * j + 1)]
            assert torch.equal(dense_matrix(b.gate_up, e), dense_matrix(a.gate_up, e)[rows])
            assert torch.equal(b.gate_up_bias[e], a.gate_up_bias[e][rows])


@torch.no_grad()
def test_neurons_of_factors_are_rows_of_one_and_columns_of_the_other(model, tokens):
    low, (first,) = reduce(model, ["low-rank"], 0.4)
    small, (stage,) = reduce(low, ["neurons"], 0.2, stats=record_routing(low, [tokens], sample=60))
    F = small.config.intermediate_size
    assert abs(stage.bytes_after / stage.bytes_before - 0.8) < 0.01 and stage.bytes_before == first.bytes_after
    for old, new in zip(low.blocks, small.blocks):
        a, b = old.moe.experts, new.moe.experts
        assert torch.equal(a.gate_up.right, b.gate_up.right) and torch.equal(a.down.left, b.down.left)
        assert b.gate_up.left.shape[1] == 2 * F and b.down.right.shape[2] == F
        assert not torch.equal(a.down_bias, b.down_bias)  # the means of what went
    with pytest.raises(
        ConfigError, match=r"neurons are 6\d\.\d% of the bytes of these low-rank experts, so a fraction of 0.9"
    ):
        reduce(low, ["neurons"], 0.9)


@torch.no_grad()
@pytest.mark.parametrize("score", ["wanda", "moe-pruner"])
def test_factors_are_scored_by_what_they_are_fed(model, tokens, score):
    low, _ = reduce(model, ["low-rank"], 0.4)
    stats = record_routing(low, [tokens], sample=66)
    small, _ = reduce(low, ["magnitude"], 0.5, stats=stats, score=score)
    moe, cut = low.blocks[1].moe, small.blocks[1].moe
    routing, x = moe.router(stats.sample[1]), stats.sample[1]
    for e in range(5):
        token, slot = (routing.indices == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        g = routing.weights[token, slot].unsqueeze(1) if score == "moe-pruner" else 1.0
        fed = {"right": x[token] * g, "left": (x[token] * g) @ moe.experts.gate_up.right[e].T}
        for side, rows in fed.items():
            size = getattr(moe.experts.gate_up, side)[e].abs() * rows.norm(dim=0)
            gone = getattr(cut.experts.gate_up, side)[e] == 0
            assert bool((gone.sum(1) == round(0.5 * gone.shape[1])).all())
            least = size.masked_fill(gone, 9e9).amin(1)
            assert bool((size.masked_fill(~gone, 0).amax(1) <= least * (1 + 1e-5)).all())


@torch.no_grad()
def test_ranks_suit_the_groups_they_are_packed_in(random_model, config):
    """A rank of its own accord is a multiple of the group where one is small enough; else zeros fill the last group."""
    model = random_model(config(hidden_size=128, intermediate_size=192, num_experts=3, num_hidden_layers=1))
    alone, (stage,) = reduce(model, ["low-rank"], 0.3)
    assert [leaves(alone.blocks[0].moe.experts.gate_up, 0)[0][1].shape[2], "plain" in stage.detail] == [67, True]
    small, stages = reduce(model, ["low-rank", "mxfp4"], 0.3)
    held = small.blocks[0].moe.experts
    assert (held.gate_up.left.shape[2], held.down.left.shape[2]) == (64, 32) and stages[1].detail == ""
    small, stages = reduce(model, ["low-rank", "int4"], rank=(67, 20), group_size=64)
    held = small.blocks[0].moe.experts
    assert (held.gate_up.left.shape[2], held.down.left.shape[2]) == (128, 64)
    assert (
        stages[1].detail
        == "rank 20 filled up with zeros to 64, whole groups, rank 67 filled up with zeros to 128, whole groups"
    )
    assert not held.gate_up.left.decode()[..., 67:].any() and not held.gate_up.right.decode()[:, 67:].any()
    small, stages = reduce(model, ["low-rank", "int8"], rank=(67, 20))
    assert small.blocks[0].moe.experts.gate_up.left.shape[2] == 67 and stages[1].detail == ""
    assert stages[1].bytes_after == 3 * (67 * (384 + 128) + 2 * (384 + 67) + 20 * (128 + 192) + 2 * (128 + 20))


@torch.no_grad()
def test_packed_weights_are_judged_by_their_packed_factors(random_model, config):
    """MXFP4 to factors in MXFP4: not refused for what bfloat16 would take in between, and `fraction` means the end."""
    model = random_model(config(hidden_size=128, intermediate_size=192, num_experts=3, num_hidden_layers=1))
    packed, _ = reduce(model, ["mxfp4"])
    with pytest.raises(ConfigError, match=r"in bfloat16 factors, .* in mxfp4; take at most 25"):
        reduce(packed, ["low-rank"], rank=(64, 32))
    small, stages = reduce(packed, ["low-rank", "mxfp4"], 0.3)
    held = small.blocks[0].moe.experts
    assert (held.gate_up.left.shape[2], held.down.left.shape[2]) == (64, 32)  # 67 and 53 would suit but for the groups
    assert stages[1].bytes_after == sum(3 * r * (a + b) * 17 // 32 for r, a, b in ((64, 384, 128), (32, 128, 192)))
    assert stages[1].bytes_after <= 0.7 * stages[0].bytes_before
    assert "LARGER" in stages[0].line() and "LARGER" not in stages[1].line()
    with pytest.raises(
        ConfigError, match="saves nothing: 34,816 bytes an expert in mxfp4 factors, 26,112 in mxfp4; take at most 64"
    ):
        reduce(packed, ["low-rank", "mxfp4"], rank=(97, 64))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.sampled_from([("int8", 32), ("int4", 32), ("int4", 64), ("mxfp4", 32)]))
def test_bytes_foreseen_are_the_bytes_packed(rank, packing):
    weight = PackedWeight.encode(torch.zeros(2, 128, 192))
    factors = PackedWeight("low-rank", {"left": torch.zeros(2, 128, rank), "right": torch.zeros(2, rank, 192)})
    then = Packing(*packing, rank_unit(*packing))
    assert factor_bytes(weight, rank, then) == pack_factors(factors, *packing).nbytes
    assert factor_bytes(weight.decode(), rank, then) == factors.nbytes // 2 == factor_bytes(weight, rank)


def test_refusals_name_the_reason(model):
    def refused(message, *args, of=model, **options):
        with pytest.raises(ConfigError, match=message):
            reduce(of, *args, **options)

    packed, _ = reduce(model, ["mxfp4"])
    refused("saves nothing: .* in mxfp4; take at most 12", ["low-rank"], rank=(13, 4), of=packed)
    refused("in int4: that fraction leaves less than rank 1 in bfloat16", ["int4", "low-rank"], 0.95)
    low, _ = reduce(model, ["low-rank"], 0.5)
    refused("saves nothing: .* in low-rank; take at most", ["low-rank"], rank=(24, 19), of=low)
    refused("pattern 2:5 does not divide the", ["magnitude"], pattern=(2, 5), of=low)
    refused("int4 groups of 128 do not divide the input dimension 64", ["low-rank", "int4"], 0.5, group_size=128)
    refused("int4 groups may hold 32, 64, 128 weights, not 48", ["low-rank", "int4"], 0.5, group_size=48)
