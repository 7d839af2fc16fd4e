"""Every criterion against its definition, summed token by token, and the rules for ties and experts nobody visited."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xmoe.compression.criteria import (
    ACTIVATION,
    WEIGHTS,
    activation_scores,
    criterion_name,
    random_scores,
    ranked,
    ranking_scores,
    super_experts,
    weight_scores,
)
from xmoe.compression.routing import RoutingStats, record_routing
from xmoe.errors import ConfigError, DataError


def pairs_of(model, tokens):
    """Per (layer, expert): the (g, r) of every token routed there; and per layer the softmax over all, summed."""
    routing = model.features(tokens, norms=True).routing
    E = model.config.num_experts
    found = [[[] for _ in range(E)] for _ in routing]
    for layer, decided in enumerate(routing):
        for row in range(tokens.numel()):
            logits = decided.logits[row].tolist()
            total = sum(math.exp(z) for z in logits)
            chosen = decided.indices[row].tolist()
            probability = {e: math.exp(logits[e]) / total for e in chosen}
            for slot, e in enumerate(chosen):
                g = probability[e] / sum(probability.values())  # the full softmax, renormalised over the chosen
                found[layer][e].append((g, float(decided.output_norm[row, slot])))
    return found


DEFINITIONS = {
    "frequency": lambda p, T, k: len(p),
    "share": lambda p, T, k: len(p) / (k * T),
    "soft": lambda p, T, k: math.fsum(g for g, _ in p),
    "ean": lambda p, T, k: math.fsum(r for _, r in p),
    "man": lambda p, T, k: math.fsum(r for _, r in p) / len(p),
    "msan": lambda p, T, k: math.fsum(r * r for _, r in p) / len(p),
    "reap": lambda p, T, k: math.fsum(g * r for g, r in p) / len(p),
    "reap_sum": lambda p, T, k: math.fsum(g * r for g, r in p),
    "reap_l2": lambda p, T, k: math.sqrt(math.fsum((g * r) ** 2 for g, r in p) / len(p)),
}


@torch.no_grad()
def test_activation_criteria_equal_their_definitions(model, tokens):
    model.blocks[1].moe.router.bias[2] = -100.0  # nobody goes there
    stats = record_routing(model, [tokens])
    pairs = pairs_of(model, tokens)
    assert set(DEFINITIONS) == set(ACTIVATION) - {"soft_all"}
    for name, definition in DEFINITIONS.items():
        for layer, row in enumerate(activation_scores(stats, name)):
            expected = [definition(p, tokens.numel(), 3) if p else 0.0 for p in pairs[layer]]
            torch.testing.assert_close(row, torch.tensor(expected).double(), rtol=1e-5, atol=0, msg=name)
    logits = model.features(tokens).routing[0].logits.double()
    torch.testing.assert_close(activation_scores(stats, "soft_all")[0], logits.softmax(-1).sum(0), rtol=1e-5, atol=0)


@torch.no_grad()
def test_an_expert_nobody_visits_scores_zero_and_comes_last(model, tokens):
    model.blocks[1].moe.router.bias[2] = -100.0
    stats = record_routing(model, [tokens])
    assert (1, 2) in stats.never_routed()
    for name in set(ACTIVATION) - {"soft_all"}:
        scores = activation_scores(stats, name)[1]
        assert float(scores[2]) == 0.0 and ranked(scores)[-1] == 2


@torch.no_grad()
@pytest.mark.parametrize("name", ACTIVATION)
def test_scores_do_not_depend_on_batches_padding_order_or_merging(model, tokens, name):
    padded = torch.full((6, 15), 1)
    padded[:, 3:14] = tokens
    mask = torch.zeros(6, 15, dtype=torch.bool)
    mask[:, 3:14] = True
    whole = activation_scores(record_routing(model, [tokens]), name)
    for stats in (
        record_routing(model, tokens.split(1)),
        record_routing(model, [(padded, mask)]),
        record_routing(model, [tokens.flip(0)]),
        record_routing(model, [tokens[:2]]) + record_routing(model, [tokens[2:]]),
    ):
        for a, b in zip(whole, activation_scores(stats, name)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_weight_criteria_equal_their_definitions(model, pack):
    pack(model)
    norms, flatness = weight_scores(model, "weight_norm"), weight_scores(model, "aimer")
    for layer, block in enumerate(model.blocks):
        experts = block.moe.experts
        gate_up, down = experts.gate_up.decode(dtype=torch.float32), experts.down.decode(dtype=torch.float32)
        for e in range(7):
            weights = [*gate_up[e].flatten().tolist(), *down[e].flatten().tolist()]
            biases = [*experts.gate_up_bias[e].tolist(), *experts.down_bias[e].tolist()]
            assert float(norms[layer][e]) == pytest.approx(math.hypot(*weights, *biases), rel=1e-5)
            mean = math.fsum(abs(w) for w in weights) / len(weights)
            rms = math.hypot(*weights) / math.sqrt(len(weights))
            assert float(flatness[layer][e]) == pytest.approx(-mean / rms, rel=1e-5)


def test_flat_weights_are_pruned_first_by_aimer(model):
    with torch.no_grad():
        for name in ("gate_up", "down"):
            getattr(model.blocks[0].moe.experts, name)[4] = 0.25
    assert ranked(weight_scores(model, "aimer")[0])[-1] == 4


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=1, max_size=9))
def test_ties_go_to_the_lower_id(values):
    order = ranked(torch.tensor(values).double())
    assert order == sorted(range(len(values)), key=lambda e: (-values[e], e))


def test_random_is_a_function_of_seed_and_layer():
    a, b, c = random_scores([5, 6], 1), random_scores([9, 6], 1), random_scores([5, 6], 2)
    assert torch.equal(a[1], b[1]) and not torch.equal(a[1], c[1])
    assert not torch.equal(a[0], a[1][:5])


def test_a_ranking_is_obeyed_and_checked():
    scores = ranking_scores([[2, 0, 1], [1]], [3, 2])
    assert [ranked(s) for s in scores] == [[2, 0, 1], [1, 0]]
    for wrong in ([[0, 0]], [[3]], [["a"]]):
        with pytest.raises(DataError, match="each once"):
            ranking_scores(wrong, [3])
    with pytest.raises(DataError, match="1 layers and the model 2"):
        ranking_scores([[0]], [3, 3])


def test_super_experts_are_extreme_and_not_in_the_last_quarter():
    stats = RoutingStats.empty([150] * 4, 2)
    stats.moments["max_norm"].uniform_(1, 2)
    stats.moments["max_norm"][1, 7] = 40.0
    stats.moments["max_norm"][3, 9] = 41.0
    assert super_experts(stats) == [(1, 7)]
    assert super_experts(stats, depth=1.0) == [(1, 7), (3, 9)]
    stats.moments["max_norm"][0, 0] = 1000.0
    assert super_experts(stats) == [(0, 0)]  # the others are below a tenth of it


def test_names_and_missing_moments(model, tokens):
    assert criterion_name("REAP-sum") == "reap_sum"
    with pytest.raises(ConfigError, match="unknown criterion 'best'; there are frequency"):
        criterion_name("best")
    stats = record_routing(model, [tokens])
    stats.moments = {"count": stats.moments["count"]}
    assert activation_scores(stats, "frequency")
    with pytest.raises(DataError, match="hold only count; reap needs more"):
        activation_scores(stats, "reap")
    assert super_experts(stats) == []
    assert set(WEIGHTS).isdisjoint(ACTIVATION)
