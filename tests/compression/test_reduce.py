"""Reductions against their definitions: exact counts, bytes that stay bytes, error bounds, honest sizes."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xmoe.checkpoint.shard_reader import ShardReader
from xmoe.checkpoint.weights import load, save
from xmoe.compression.magnitude import smallest
from xmoe.compression.neurons import cut_neurons
from xmoe.compression.reconstruction import expert_output
from xmoe.compression.reduce import METHODS, reduce
from xmoe.compression.reduction_report import mixture
from xmoe.compression.routing import record_routing
from xmoe.errors import ConfigError
from xmoe.quantization.packed import PackedWeight


def dense(model) -> list[torch.Tensor]:
    weights = [w for b in model.blocks for w in (b.moe.experts.gate_up, b.moe.experts.down)]
    return [w.decode(dtype=torch.float32) if isinstance(w, PackedWeight) else w.detach().clone() for w in weights]


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=6), min_size=1, max_size=3), st.data())
def test_smallest_is_exact_to_one_weight(values, data):
    tensors = [torch.tensor(v) for v in values]
    count = data.draw(st.integers(0, sum(map(len, values))))
    masks = smallest(tensors, count)
    flat, chosen = torch.cat(tensors).tolist(), torch.cat(masks).tolist()
    expected = sorted(range(len(flat)), key=lambda i: (flat[i], i))[:count]
    assert [i for i, c in enumerate(chosen) if c] == sorted(expected)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
@pytest.mark.parametrize("scope", ["tensor", "expert", "layer", "global"])
def test_magnitude_removes_exactly_the_smallest_in_each_scope(model, pack, scope, packed):
    model = pack(model) if packed else model
    before = dense(model)
    small, (stage,) = reduce(model, ["magnitude"], 0.3, scope=scope)
    after = dense(small)
    parts = {
        "tensor": [([w[e]], [v[e]]) for w, v in zip(before, after) for e in range(7)],
        "expert": [([before[i][e], before[i + 1][e]], [after[i][e], after[i + 1][e]]) for i in (0, 2, 4) for e in range(7)],
        "layer": [(before[i : i + 2], after[i : i + 2]) for i in (0, 2, 4)],
        "global": [(before, after)],
    }[scope]  # fmt: skip
    for old, new in parts:
        old, new = torch.cat([w.flatten() for w in old]), torch.cat([w.flatten() for w in new])
        count = round(0.3 * old.numel())
        assert torch.equal(new[new != 0], old[new != 0])  # what stays is what it was
        assert int((new == 0).sum()) == max(count, int((old == 0).sum()))
        if not packed:
            assert old[new == 0].abs().max() <= old[new != 0].abs().min()
    assert stage.bytes_after == stage.bytes_before and stage.zeros == sum(int((w == 0).sum()) for w in after)
    if packed:
        for a, b in zip(model.blocks, small.blocks):
            assert torch.equal(a.moe.experts.down.scales, b.moe.experts.down.scales)
    assert all(torch.equal(a, b) for a, b in zip(before, dense(model)))  # the old model is unharmed


def test_patterns_keep_the_largest_of_every_few(model):
    before = dense(model)
    small, _ = reduce(model, ["magnitude"], pattern=(2, 4))
    for old, new in zip(before, dense(small)):
        groups, kept = old.abs().unflatten(-1, (-1, 4)), (new != 0).unflatten(-1, (-1, 4))
        assert bool((kept.sum(-1) == 2).all())
        assert bool((groups.masked_fill(~kept, 9).amin(-1) >= groups.masked_fill(kept, 0).amax(-1)).all())


def test_only_the_named_experts_change(model):
    before = dense(model)
    small, _ = reduce(model, ["magnitude"], 0.5, experts=[(1, 3), (2, 0)])
    for i, (old, new) in enumerate(zip(before, dense(small))):
        for e in range(7):
            assert torch.equal(old[e], new[e]) == ((i // 2, e) not in {(1, 3), (2, 0)})


@torch.no_grad()
def test_neurons_that_do_nothing_go_first_and_for_free(model, tokens):
    stats = record_routing(model, [tokens], sample=66)
    idle = {}
    for layer, block in enumerate(model.blocks):
        for e in range(7):
            idle[layer, e] = torch.randperm(64, generator=torch.Generator().manual_seed(10 * layer + e))[:20]
            block.moe.experts.down[e, :, idle[layer, e]] = 0.0
    small = cut_neurons(model, 44, stats.sample)
    assert small.config.intermediate_size == 44
    torch.testing.assert_close(small(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_neuron_scores_and_bias_follow_the_formula(model, tokens):
    stats = record_routing(model, [tokens], sample=66)
    small = cut_neurons(model, 40, stats.sample)
    moe, cut = model.blocks[1].moe, small.blocks[1].moe
    x, routing = stats.sample[1], moe.router(stats.sample[1])
    for e in range(7):
        token, slot = (routing.indices == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        hidden, _ = expert_output(moe.experts, e, x[token])
        g, down = routing.weights[token, slot], moe.experts.down[e]
        score = [
            float((g**2 * hidden[:, i] ** 2).double().sum() * down[:, i].double().square().sum()) for i in range(64)
        ]
        kept = sorted(sorted(range(64), key=lambda i: -score[i])[:40])
        gone = sorted(set(range(64)) - set(kept))
        assert torch.equal(cut.experts.down[e], down[:, kept])
        assert torch.equal(cut.experts.gate_up[e, 0::2], moe.experts.gate_up[e, 0::2][kept])
        assert torch.equal(cut.experts.gate_up[e, 1::2], moe.experts.gate_up[e, 1::2][kept])
        added = sum(hidden[:, i].mean() * down[:, i] for i in gone)
        torch.testing.assert_close(cut.experts.down_bias[e], moe.experts.down_bias[e] + added, rtol=1e-4, atol=1e-5)


def test_packed_neurons_go_in_groups_and_bytes_stay(random_model, config, pack, tokens, tmp_path):
    model = pack(random_model(config(intermediate_size=128))).to(torch.bfloat16)
    small, (stage,) = reduce(model, ["neurons"], 0.5, stats=record_routing(model, [tokens], sample=40))
    assert small.config.intermediate_size == 64 and stage.bytes_after * 2 == stage.bytes_before
    for old, new in zip(model.blocks, small.blocks):
        a, b = old.moe.experts, new.moe.experts
        for e in range(7):
            rows = {bytes(r.numpy()) for r in a.gate_up.blocks[e].flatten(1)}
            assert all(bytes(r.numpy()) in rows for r in b.gate_up.blocks[e].flatten(1))
            groups = [bytes(a.down.blocks[e, :, i].flatten().numpy()) for i in range(4)]
            at = [groups.index(bytes(b.down.blocks[e, :, i].flatten().numpy())) for i in range(2)]
            assert at == sorted(at)
            assert torch.equal(b.down.scales[e], a.down.scales[e][:, at])
    transformers = pytest.importorskip("transformers")
    save(small, tmp_path / "hf", "hf-mxfp4")
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )  # fmt: skip
    ours, _ = load(tmp_path / "hf", dtype="float32", experts="dense")
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, ours(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("format", "bound"), [("int8", 0.012), ("int4", 0.13), ("mxfp4", 0.13)])
def test_formats_stay_within_their_error_and_report_the_files_bytes(model, tokens, tmp_path, format, bound):
    stats = record_routing(model, [tokens], sample=40)
    small, (stage,) = reduce(model, [format], stats=stats)
    assert all(0 < e < bound for e in stage.weight_error) and all(0 < e < 3 * bound for e in stage.output_error)
    save(small, tmp_path / "out")
    reader = ShardReader(tmp_path / "out")
    stored = sum(i.nbytes for n, i in reader.tensors.items() if ".experts.gate_up." in n or ".experts.down." in n)
    assert stage.bytes_after == stored
    assert reader.total_bytes <= os.stat(tmp_path / "out" / "model.safetensors").st_size
    back, _ = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, small(tokens).logits)


def test_a_sequence_adds_up_and_growth_is_said(model, pack, tokens):
    pack(model)
    small, stages = reduce(
        model, ["neurons", "magnitude", "int8"], 0.5, stats=record_routing(model, [tokens], sample=30)
    )
    assert [s.method for s in stages] == ["neurons", "magnitude", "int8"]
    for earlier, later in itertools.pairwise(stages):
        assert earlier.bytes_after == later.bytes_before and earlier.weights_after == later.weights_before
    assert "LARGER" in stages[2].line() and "LARGER" not in stages[0].line()
    assert small.blocks[0].moe.experts.down.format == "int8"
    again, (stage,) = reduce(model, ["mxfp4"])
    assert stage.weight_error == (0.0, 0.0, 0.0)  # already MXFP4: bytes untouched
    assert torch.equal(again.blocks[0].moe.experts.down.blocks, model.blocks[0].moe.experts.down.blocks)


@torch.no_grad()
def test_mixture_is_the_layer(model, tokens):
    x = record_routing(model, [tokens], sample=30).sample[0]
    torch.testing.assert_close(mixture(model.blocks[0].moe, x), model.blocks[0].moe(x, None, False)[0])


def test_mistakes_are_one_clear_line(model, pack):
    def refused(message, *args, **options):
        with pytest.raises(ConfigError, match=message):
            reduce(model, *args, **options)

    refused(r"unknown method 'svd'; did you mean low-rank\? there are " + ", ".join(METHODS), ["svd"])
    refused("did you mean neurons", ["neuron"])
    refused("unknown method 'x'; there are", ["x"])
    for fraction in (None, 0.0, 1.0, -0.5, 2.0):
        refused("needs a fraction between 0 and 1", ["magnitude"], fraction)
    refused("unknown scope", ["magnitude"], 0.5, scope="column")
    refused("unknown score 'taylor'; there are magnitude, wanda, moe-pruner", ["magnitude"], 0.5, score="taylor")
    refused("the score wanda looks at what experts are fed", ["magnitude"], 0.5, score="wanda")
    refused("expected N:M", ["magnitude"], pattern=(4, 2))
    refused("there is no such expert", ["magnitude"], 0.5, experts=[(0, 7)])
    refused("leave --experts out", ["neurons"], 0.5, experts=[(0, 1)])
    pack(model)
    refused("less than one group of 32 of the 64 neurons", ["neurons"], 0.1)
    refused("less than one group of 32 of the 64 neurons", ["int4", "neurons"], 0.1)


@pytest.mark.parametrize("score", ["wanda", "moe-pruner"])
def test_scores_by_inputs_equal_a_loop_over_tokens(model, tokens, score):
    """|W_ij| times the length of input j over the tokens of the expert, in Python's floats; least of every row go."""
    stats = record_routing(model, [tokens], sample=66)
    small, (stage,) = reduce(model, ["magnitude"], 0.4, stats=stats, score=score)
    by_text, _ = reduce(model, ["magnitude"], 0.4, batches=[tokens], score=score)
    assert stage.detail == f"{score}, by row"
    seen = 0
    for layer in range(3):
        moe, cut, other = (m.blocks[layer].moe for m in (model, small, by_text))
        routing = moe.router(stats.sample[layer])
        for e in range(7):
            squares = {"gate_up": [0.0] * 32, "down": [0.0] * 64}
            for t, x in enumerate(stats.sample[layer]):
                for chosen, weight in zip(routing.indices[t].tolist(), routing.weights[t].tolist()):
                    if chosen == e:
                        g = weight if score == "moe-pruner" else 1.0
                        hidden = expert_output(moe.experts, e, x[None])[0][0]
                        for name, values in (("gate_up", x), ("down", hidden)):
                            squares[name] = [s + (g * v) ** 2 for s, v in zip(squares[name], values.tolist())]
            if not max(squares["down"]):  # no token went there
                continue
            seen += 1
            for name, sums in squares.items():
                size = getattr(moe.experts, name)[e].abs() * torch.tensor(sums).sqrt()
                gone = getattr(cut.experts, name)[e] == 0
                assert bool((gone.sum(1) == round(0.4 * len(sums))).all())
                assert bool(
                    (size.masked_fill(~gone, 0).amax(1) <= size.masked_fill(gone, 9e9).amin(1) * (1 + 1e-5)).all()
                )
                assert torch.equal(gone, getattr(other.experts, name)[e] == 0)
    assert seen >= 15


def test_input_norms_leave_out_no_expert(model, tokens):
    """An expert that no token visits is scored by what it would have been fed."""
    with torch.no_grad():
        model.blocks[1].moe.router.bias[4] = -100.0
    small, _ = reduce(model, ["magnitude"], 0.5, batches=[tokens], score="wanda", scope="layer")
    gone = [float((small.blocks[1].moe.experts.gate_up[e] == 0).float().mean()) for e in range(7)]
    assert 0.5 < gone[4] < 1.0 and min(gone) < 0.5
