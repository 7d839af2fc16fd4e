"""The recorded moments against a loop over tokens and slots, and what may not change them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.compression.layerwise import as_batches, walk
from xmoe.compression.routing import MOMENTS, RoutingStats, TokenSample, record_routing
from xmoe.errors import DataError
from xmoe.model.router import Routing


def expert_by_hand(experts, e: int, x: list[float]) -> list[float]:
    """f_e(x) in Python's floats, from the definition."""
    gate_up, down = experts.gate_up[e].tolist(), experts.down[e].tolist()
    bias, down_bias = experts.gate_up_bias[e].tolist(), experts.down_bias[e].tolist()
    hidden = []
    for i in range(len(gate_up) // 2):
        gate = sum(w * v for w, v in zip(gate_up[2 * i], x)) + bias[2 * i]
        up = sum(w * v for w, v in zip(gate_up[2 * i + 1], x)) + bias[2 * i + 1]
        gate, up = min(gate, 7.0), max(-7.0, min(up, 7.0))
        hidden.append(gate / (1 + math.exp(-1.702 * gate)) * (up + 1))
    return [sum(w * h for w, h in zip(row, hidden)) + b for row, b in zip(down, down_bias)]


def moments_by_hand(model, tokens) -> dict[str, torch.Tensor]:
    """All moments by their definitions, token after token."""
    E, k = model.config.num_experts, model.config.num_experts_per_tok
    found = {name: torch.zeros(len(model.blocks), E, dtype=torch.float64) for name in MOMENTS}

    def visit(layer, block, visits):
        router = block.moe.router
        rows, bias = router.weight.tolist(), router.bias.tolist()
        for x in (x for v in visits for x in v.inputs.tolist()):
            z = [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(rows, bias)]
            total = sum(math.exp(v) for v in z)
            chosen = sorted(range(E), key=lambda e: -z[e])[:k]
            share = sum(math.exp(z[e]) for e in chosen)
            for e in range(E):
                found["probability"][layer, e] += math.exp(z[e]) / total
            for e in chosen:
                g = math.exp(z[e]) / share
                r = math.hypot(*expert_by_hand(block.moe.experts, e, x))
                parts = {"count": 1, "weight": g, "norm": r, "norm_sq": r * r, "weighted_norm": g * r,
                         "weighted_norm_sq": (g * r) ** 2}  # fmt: skip
                for name, value in parts.items():
                    found[name][layer, e] += value
                found["max_norm"][layer, e] = max(float(found["max_norm"][layer, e]), r)

    walk(model.config, [model.embed(tokens)], model.blocks, list(as_batches([tokens])), visit)
    return found


def close(a: RoutingStats, b: RoutingStats, rtol: float = 1e-6) -> bool:
    return all(torch.allclose(a.moments[n], b.moments[n], rtol=rtol, atol=1e-9) for n in MOMENTS)


def test_moments_equal_a_loop_over_tokens(model, tokens):
    recorded, expected = record_routing(model, [tokens]), moments_by_hand(model, tokens)
    for name in MOMENTS:
        torch.testing.assert_close(recorded.moments[name], expected[name], rtol=1e-5, atol=1e-9, msg=name)
    assert recorded.tokens == tokens.numel()
    assert float(recorded.moments["count"].sum()) == 3 * 3 * tokens.numel()


def test_batch_size_padding_order_and_merging_change_nothing(model, tokens):
    whole = record_routing(model, [tokens])
    one_by_one = record_routing(model, tokens.unsqueeze(1))
    assert close(whole, one_by_one) and whole.data == one_by_one.data

    padded = torch.cat((torch.zeros_like(tokens[:, :2]), tokens, torch.full_like(tokens[:, :3], 9)), dim=1)
    mask = torch.zeros_like(padded, dtype=torch.bool)
    mask[:, 2:-3] = True
    with_padding = record_routing(model, [(padded, mask)])
    assert close(whole, with_padding, 1e-4) and with_padding.tokens == whole.tokens and with_padding.data == whole.data

    assert close(whole, record_routing(model, [tokens.flip(0)]))
    halves = record_routing(model, [tokens[:2]], domain="law") + record_routing(model, [tokens[2:]], domain="math")
    assert close(whole, halves)
    assert (halves.tokens, halves.domain, len(halves.data)) == (whole.tokens, "law+math", 2)


def test_recording_leaves_the_model_as_it_was(model, tokens):
    model.train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    record_routing(model, [tokens])
    assert model.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_packed_experts_are_recorded_as_their_decoded_twins(model, pack, tokens):
    pack(model)
    packed = record_routing(model, [tokens])
    for block in model.blocks:
        for name in ("gate_up", "down"):
            weight = getattr(block.moe.experts, name)
            delattr(block.moe.experts, name)
            setattr(block.moe.experts, name, torch.nn.Parameter(weight.decode(dtype=torch.float32)))
    assert close(packed, record_routing(model, [tokens]), 1e-5)


def test_uneven_layers_are_filled_with_zeros(random_model, config, tokens):
    model = random_model(config(num_experts=(5, 7, 4)))
    stats = record_routing(model, [tokens])
    assert stats.num_experts == (5, 7, 4)
    assert float(stats.moments["probability"][0, 5:].sum()) == float(stats.moments["count"][2, 4:].sum()) == 0
    assert [len(stats.layer(i).count) for i in range(3)] == [5, 7, 4]
    torch.testing.assert_close(stats.moments["probability"].sum(1), torch.full((3,), 66.0).double())


def test_unused_slots_count_for_nothing():
    stats = RoutingStats.empty([4], 2)
    stats.observe(0, Routing(torch.zeros(2, 4), torch.tensor([[0, -1], [3, 0]]), torch.ones(2, 2), torch.ones(2, 2)))
    assert stats.moments["count"].tolist() == [[2, 0, 0, 1]]
    assert stats.never_routed() == [(0, 1), (0, 2)]


def test_sample_is_uniform_the_same_in_all_layers_and_free_of_batches(model, tokens):
    everything = record_routing(model, [tokens], sample=1000).sample
    assert everything.shape == (3, 66, 32)
    some = record_routing(model, [tokens], sample=20).sample
    again = record_routing(model, tokens.split(1), sample=20).sample
    assert some.shape == (3, 20, 32)
    torch.testing.assert_close(some, again)
    matches = [(everything[i, :, None] == some[i]).all(-1).nonzero()[:, 0].tolist() for i in range(3)]
    assert matches[0] == matches[1] == matches[2] and len(matches[0]) == 20
    assert close(record_routing(model, [tokens]), record_routing(model, [tokens], sample=20))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_sample_never_depends_on_how_tokens_are_cut(size, cuts):
    def drawn(parts):
        sample, at = TokenSample(size, 1, seed=3), 0
        for n in parts:
            sample.add(0, torch.arange(at, at + n).view(n, 1), sample.choose(n))
            at += n
        return sample.tensor()

    assert torch.equal(drawn(cuts), drawn([sum(cuts)]))
    assert drawn(cuts).shape[1] == min(size, sum(cuts))


def test_saved_statistics_come_back(model, tokens, tmp_path):
    stats = record_routing(model, [tokens], domain="law", sample=8)
    stats.save(tmp_path / "s.safetensors", command="test")
    back = RoutingStats.load(tmp_path / "s.safetensors")
    assert all(torch.equal(stats.moments[n], back.moments[n]) for n in MOMENTS)
    assert torch.equal(stats.sample, back.sample)
    for name in ("num_experts", "num_experts_per_tok", "tokens", "domain", "data", "model"):
        assert getattr(stats, name) == getattr(back, name)
    assert all(t.dtype == torch.float64 for t in back.moments.values())


def test_mistakes_are_one_clear_line(model, random_model, config, tokens, tmp_path):
    with pytest.raises(DataError, match="no tokens to record"):
        record_routing(model, [])
    with pytest.raises(DataError, match="no tokens to record"):
        record_routing(model, [(tokens, torch.zeros_like(tokens, dtype=torch.bool))])
    other = record_routing(random_model(config(), seed=1), [tokens])
    with pytest.raises(DataError, match="different models"):
        record_routing(model, [tokens]) + other
    with pytest.raises(DataError, match="different shapes"):
        other + record_routing(random_model(config(num_experts=6)), [tokens])
    with pytest.raises(DataError, match="does not exist"):
        RoutingStats.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello, world")
    with pytest.raises(DataError, match="no safetensors file"):
        RoutingStats.load(tmp_path / "text")
    import safetensors.torch

    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match="holds w, not routing statistics"):
        RoutingStats.load(tmp_path / "w.safetensors")
