"""Masked equals pruned, bit for bit in bfloat16; keeping all changes nothing; kept bytes do not change."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from xmoe.compression.apply import mask, prune
from xmoe.compression.plan import PrunePlan, plan_pruning
from xmoe.compression.routing import record_routing
from xmoe.errors import ConfigError
from xmoe.quantization.packed import PackedWeight


def plan_of(model, *kept) -> PrunePlan:
    c = model.config
    counts = tuple(c.experts_in_layer(i) for i in range(c.num_hidden_layers))
    return PrunePlan("list", "uniform", counts, c.num_experts_per_tok, kept=tuple(tuple(k) for k in kept))


PLANS = {
    "different ids a layer": ((0, 2, 3, 6), (1, 2, 4, 5), (0, 1, 5, 6)),
    "as many as k": ((0, 2, 6), (1, 4, 5), (3, 5, 6)),
    "fewer than k": ((0, 6), (1, 4), (3, 5)),
    "one": ((5,), (0,), (6,)),
    "uneven": ((0, 1, 2, 3, 4, 5, 6), (0, 3, 4), (1, 2, 3, 5, 6)),
    "uneven, below k": ((0, 1, 2, 3, 4, 5, 6), (0, 3), (1, 2, 3, 5, 6)),
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_masked_equals_pruned_bit_for_bit_in_bfloat16(model, pack, tokens, name, packed):
    model = (pack(model) if packed else model).to(torch.bfloat16)
    plan = plan_of(model, *PLANS[name])
    whole = model(tokens).logits
    with mask(model, plan):
        masked = model(tokens)
    pruned = prune(model, plan)(tokens)
    assert torch.equal(masked.logits, pruned.logits)
    for kept, a, b in zip(plan.kept, masked.routing, pruned.routing):
        assert torch.equal(a.indices, torch.tensor(kept)[b.indices])
    assert torch.equal(model(tokens).logits, whole)  # the mask is gone
    assert not torch.equal(whole, masked.logits)


@torch.no_grad()
def test_in_fp32_the_same_experts_are_chosen(model, tokens):
    for kept in PLANS.values():
        plan = plan_of(model, *kept)
        with mask(model, plan):
            masked = model(tokens)
        pruned = prune(model, plan)(tokens)
        for ids, a, b in zip(plan.kept, masked.routing, pruned.routing):
            assert torch.equal(a.indices, torch.tensor(ids)[b.indices])
        largest = float(pruned.logits.abs().max())
        torch.testing.assert_close(masked.logits, pruned.logits, rtol=0, atol=1e-6 * largest)


@torch.no_grad()
def test_mask_is_minus_infinity_on_the_dropped_logits(model, tokens):
    """The definition, with the router's bias as the only means."""
    plan = plan_of(model, *PLANS["different ids a layer"])
    with mask(model, plan):
        masked = model(tokens).logits
    for block, kept in zip(model.blocks, plan.kept):
        for e in set(range(7)) - set(kept):
            block.moe.router.bias[e] = float("-inf")
    torch.testing.assert_close(model(tokens).logits, masked, rtol=0, atol=0)


@torch.no_grad()
def test_keeping_every_expert_changes_nothing(model, tokens):
    plan = plan_of(model, *[range(7)] * 3)
    small = prune(model, plan)
    assert small.config == model.config
    assert torch.equal(small(tokens).logits, model(tokens).logits)


def test_kept_rows_are_copies_of_the_same_bytes(model, pack):
    pack(model)
    plan = plan_of(model, *PLANS["different ids a layer"])
    small = prune(model, plan)
    old, new = model.state_dict(), small.state_dict()
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        rows = list(plan.kept[int(name.split(".")[1])]) if ".router." in name or ".experts." in name else slice(None)
        assert torch.equal(tensor, old[name][rows]) and tensor.dtype == old[name].dtype
        assert tensor.data_ptr() != old[name].data_ptr()
    assert isinstance(small.blocks[0].moe.experts.gate_up, PackedWeight)


def test_config_follows(random_model, config, tokens):
    model = random_model(config(reasoning_effort={"low": 1, "medium": 3, "high": 5}))
    small = prune(model, plan_of(model, *PLANS["fewer than k"]))
    assert (small.config.num_experts, small.config.num_experts_per_tok) == (2, 2)
    assert small.config.reasoning_effort == {"low": 1, "medium": 2, "high": 2}
    uneven = prune(model, plan_of(model, *PLANS["uneven"]))
    assert uneven.config.num_experts == (7, 3, 5)
    assert uneven.config.parameter_count() == sum(p.numel() for p in uneven.parameters())


def test_a_mask_can_stay_and_be_taken_off(model, tokens):
    whole = model(tokens).logits
    tried = mask(model, plan_of(model, *PLANS["fewer than k"]))
    assert not torch.equal(model(tokens).logits, whole)
    tried.remove()
    assert torch.equal(model(tokens).logits, whole)


def test_selection_bias_is_cut_too(model, tokens):
    for block in model.blocks:
        block.moe.router.selection_bias = torch.arange(7.0)
    small = prune(model, plan_of(model, *PLANS["different ids a layer"]))
    assert small.blocks[1].moe.router.selection_bias.tolist() == [1, 2, 4, 5]


def test_a_plan_for_another_model_is_refused(model, random_model, config, tokens):
    stats = record_routing(model, [tokens])
    plan = plan_pruning(stats, "reap", 4)
    with pytest.raises(ConfigError, match="is for model"):
        prune(random_model(config(), seed=3), plan)
    with pytest.raises(ConfigError, match="3 layers of 7 experts, the model has 3 layers of 6"):
        mask(random_model(config(num_experts=6)), plan)
    unknown = dataclasses.replace(plan, model="")
    assert prune(random_model(config(), seed=3), unknown).config.num_experts == 4


@torch.no_grad()
def test_ties_fall_alike_in_masked_and_pruned_routers(random_model, config):
    """bfloat16 logits tie often, and top-k picks among equals by a rule that depends on how many there are."""
    model = random_model(config(num_experts=16, num_experts_per_tok=4)).to(torch.bfloat16)
    for block in model.blocks:
        block.moe.router.weight.mul_(4).round_().div_(4)
        block.moe.router.bias.round_()
    kept = (0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15)
    plan = plan_of(model, *[kept] * 3)
    small = prune(model, plan)
    x = torch.randint(-2, 3, (500, 32), generator=torch.Generator().manual_seed(1)).bfloat16() / 4
    with mask(model, plan):
        a, b = model.blocks[1].moe.router(x), small.blocks[1].moe.router(x)
    ties = a.logits[:, list(kept)].sort(descending=True).values
    assert int((ties[:, 3] == ties[:, 4]).sum()) > 20
    assert torch.equal(a.indices, torch.tensor(kept)[b.indices]) and torch.equal(a.weights, b.weights)
