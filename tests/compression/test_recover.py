"""Distillation: its gradient against autograd, what it may touch, and that it brings the student nearer."""

from __future__ import annotations

import pytest
import torch

from xmoe.compression.apply import prune
from xmoe.compression.plan import plan_pruning
from xmoe.compression.recover import _distil, recover, trained_parameters
from xmoe.compression.routing import record_routing
from xmoe.errors import ConfigError, DataError


@pytest.fixture
def pruned(model, tokens):
    return prune(model, plan_pruning(record_routing(model, [tokens]), "reap", 4))


def kl(student, teacher, tokens, mask=None) -> torch.Tensor:
    wanted, given = teacher(tokens).logits.log_softmax(-1), student(tokens).logits.log_softmax(-1)
    each = (wanted.exp() * (wanted - given)).sum(-1)
    return (each if mask is None else each[mask]).mean()


def test_loss_and_gradients_are_those_of_the_definition(pruned, model, tokens, monkeypatch):
    monkeypatch.setattr("xmoe.compression.recover._CHUNK", 10)  # several chunks, the last one ragged
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 8:] = False
    with torch.no_grad():
        goal = model.features(tokens).hidden
    loss = _distil(pruned, model, pruned.features(tokens).hidden, goal, mask)
    found = {n: p.grad.clone() for n, p in pruned.named_parameters()}
    pruned.zero_grad()
    expected = kl(pruned, model, tokens, mask)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, p in pruned.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("train", ["routers", "experts", "all"])
def test_only_what_was_named_changes_and_the_student_comes_nearer(pruned, model, tokens, train):
    before = {n: p.detach().clone() for n, p in pruned.named_parameters()}
    teacher = {n: p.detach().clone() for n, p in model.named_parameters()}
    gap = float(kl(pruned, model, tokens).detach())
    result = recover(pruned, model, [tokens], train=train, steps=25)
    part = {"routers": ".router.", "experts": ".moe.", "all": ""}[train]
    for name, p in pruned.named_parameters():
        assert torch.equal(p, before[name]) == (part not in name), name
        assert p.requires_grad and p.grad is None
    assert all(torch.equal(p, teacher[n]) for n, p in model.named_parameters())
    assert float(kl(pruned, model, tokens).detach()) < 0.95 * gap
    assert result.losses[0] == pytest.approx(gap, rel=1e-4) and len(result.losses) == 25
    assert result.tokens == 25 * tokens.numel()
    assert result.parameters == sum(p.numel() for n, p in pruned.named_parameters() if part in n)


def test_routers_of_a_packed_bfloat16_model_can_be_trained(model, pack, tokens):
    pack(model).to(torch.bfloat16)
    student = prune(model, plan_pruning(record_routing(model, [tokens]), "reap", 4))
    state = {n: t.clone() for n, t in student.state_dict().items()}
    losses = recover(student, model, [tokens], steps=30).losses
    assert min(losses[-5:]) < losses[0]
    for name, tensor in student.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]) == (".router." not in name), name
    with pytest.raises(ConfigError, match="the experts are packed"):
        recover(student, model, [tokens], train="all")


def test_mistakes_are_one_clear_line(pruned, model, random_model, config, tokens):
    with pytest.raises(ConfigError, match="can train routers, experts, all, not 'heads'"):
        recover(pruned, model, [tokens], train="heads")
    with pytest.raises(ConfigError, match="at least 1 step"):
        recover(pruned, model, [tokens], steps=0)
    with pytest.raises(ConfigError, match="vocabularies of 70 and 90"):
        recover(pruned, random_model(config(vocab_size=90)), [tokens])
    with pytest.raises(DataError, match="no tokens to recover on"):
        recover(pruned, model, [(tokens, torch.zeros_like(tokens, dtype=torch.bool))])
    assert len(trained_parameters(pruned, "routers")) == 6
