"""Merging: groups against brute force, permutations that change no function, averages by use, both forms of router."""

from __future__ import annotations

import itertools

import pytest
import torch

from xmoe.compression.merge import (
    METHODS,
    Group,
    agglomerate,
    align,
    assign,
    average,
    collect,
    expert_weights,
    merge,
)
from xmoe.compression.reconstruction import expert_output
from xmoe.compression.routing import record_routing
from xmoe.errors import ConfigError, DataError


@pytest.fixture
def stats(model, tokens):
    return record_routing(model, [tokens], sample=40)


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_assignment_is_the_best_of_all(size):
    for seed in range(5):
        gain = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
        columns = assign(gain).tolist()
        best = max(sum(float(gain[i, p]) for i, p in enumerate(order)) for order in itertools.permutations(range(size)))
        assert sorted(columns) == list(range(size))
        assert sum(float(gain[i, c]) for i, c in enumerate(columns)) == pytest.approx(best, abs=1e-5)


@torch.no_grad()
def test_alignment_finds_a_shuffled_copy_and_changes_no_function(model, stats):
    experts = model.blocks[0].moe.experts
    leader, order = expert_weights(experts, 2), torch.randperm(64)
    shuffled = leader.permuted(order)
    assert not torch.equal(shuffled.gate_up, leader.gate_up)
    back = align(shuffled, leader)
    assert all(torch.equal(a, b) for a, b in zip(back, leader))
    for name, value in shuffled._asdict().items():
        getattr(experts, name).data[5] = value
    torch.testing.assert_close(
        expert_output(experts, 5, stats.sample[0])[1],
        expert_output(experts, 2, stats.sample[0])[1],
        rtol=1e-4,
        atol=1e-4,
    )


def test_clusters_join_the_nearest_by_mean_distance():
    at = torch.tensor([0.0, 1.0, 10.0, 11.5, 30.0])
    distance = (at[:, None] - at[None]).abs()
    assert agglomerate(distance, 3) == [[0, 1], [2, 3], [4]]
    assert agglomerate(distance, 2) == [[0, 1, 2, 3], [4]]
    assert agglomerate(distance, 5) == [[0], [1], [2], [3], [4]]


def test_collected_groups_hold_everyone_once_and_stay_within_their_size():
    alike = torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
    alike[:, 7] = 1.0
    alike[7] = 1.0  # everybody's favourite
    groups = collect([7, 3, 20, 11], alike)
    assert sorted(e for g in groups for e in g) == list(range(40))
    assert all(leader in g for leader, g in zip([7, 3, 20, 11], groups)) and max(map(len, groups)) == 16


def test_an_average_weighs_by_use(model):
    experts = model.blocks[1].moe.experts
    made = average(Group(1, (1, 4), (0.75, 0.25)), experts, aligned=False)
    torch.testing.assert_close(made.gate_up, 0.75 * experts.gate_up[1] + 0.25 * experts.gate_up[4])
    torch.testing.assert_close(made.down_bias, 0.75 * experts.down_bias[1] + 0.25 * experts.down_bias[4])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_method_gives_a_model_of_the_right_shape(model, pack, tokens, method, packed):
    model = pack(model) if packed else model
    stats = record_routing(model, [tokens], sample=40)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small, groups = merge(model, stats, method, 4)
    assert small.config.num_experts == 4 and torch.isfinite(small(tokens).logits).all()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for layer, row in enumerate(groups):
        assert sorted(e for g in row for e in g.members) == list(range(7))
        assert [g.leader for g in row] == sorted(g.leader for g in row)
        assert all(sum(g.weights) == pytest.approx(1.0) and g.leader in g.members for g in row)
        router, old = small.blocks[layer].moe.router, model.blocks[layer].moe.router
        assert torch.equal(router.weight, old.weight[[g.leader for g in row]])
        for at, g in enumerate(row):
            new = expert_weights(small.blocks[layer].moe.experts, at)
            leader = expert_weights(model.blocks[layer].moe.experts, g.leader)
            same = all(torch.equal(a, b) for a, b in zip(new, leader))
            assert same == (len(g.members) == 1)


@torch.no_grad()
def test_equal_experts_merge_without_loss_in_the_tied_form(model, stats, tokens):
    """Twins: the merged expert is each of them, and tied routing adds their gates up as before."""
    for block in model.blocks:
        for name in ("gate_up", "gate_up_bias", "down", "down_bias"):
            tensor = getattr(block.moe.experts, name).data
            tensor[4:7] = tensor[0:3]
    stats = record_routing(model, [tokens], sample=40)
    whole = model(tokens).logits
    tied, groups = merge(model, stats, "hc-smoe", 4, tied=True)
    assert all({g.members for g in row} == {(0, 4), (1, 5), (2, 6), (3,)} for row in groups)
    assert tied.config.num_experts == 7
    torch.testing.assert_close(tied(tokens).logits, whole, rtol=1e-4, atol=1e-4)


def test_mistakes_are_one_clear_line(model, stats, random_model, config, tokens):
    with pytest.raises(ConfigError, match="unknown method 'mean'"):
        merge(model, stats, "mean", 4)
    for keep in (0, 8):
        with pytest.raises(ConfigError, match="expected 1 to 7"):
            merge(model, stats, "ream", keep)
    with pytest.raises(DataError, match="record with one"):
        merge(model, record_routing(model, [tokens]), "ream", 4)
    with pytest.raises(DataError, match="the statistics are of model"):
        merge(random_model(config(), seed=4), stats, "ream", 4)
