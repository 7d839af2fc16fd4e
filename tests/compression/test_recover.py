"""Distillation: its gradient against autograd, what it may touch, and that it brings the student nearer."""

from __future__ import annotations

import pytest
import torch

from xmoe.compression.apply import prune
from xmoe.compression.plan import plan_pruning
from xmoe.compression.recover import _distil, recover, trained_parameters
from xmoe.compression.reduce import reduce
from xmoe.compression.routing import record_routing
from xmoe.compression.unpacked import memory, unpacked
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


FORMS = {
    "int8": ["int8"],
    "int4": ["int4"],
    "mxfp4": ["mxfp4"],
    "factors": ["low-rank"],
    "packed factors": ["low-rank", "int8"],
}


def inside(weight) -> dict[str, tuple]:
    """Name -> dtype and shape of every tensor."""
    return {n: (t.dtype, tuple(t.shape)) for n, t in weight.tensors.items()}


@pytest.mark.parametrize("train", ["experts", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_packed_experts_are_trained_and_packed_again_as_they_were(pruned, model, tokens, form, train):
    student, _ = reduce(pruned, FORMS[form], 0.4)
    before = {n: t.clone() for n, t in student.state_dict().items()}
    held = [inside(getattr(b.moe.experts, name)) for b in student.blocks for name in ("gate_up", "down")]
    gap = float(kl(student, model, tokens).detach())
    result = recover(student, model, [tokens], train=train, steps=40, lr=2e-3)
    assert result.before == pytest.approx(gap, rel=1e-4) == pytest.approx(result.losses[0], rel=1e-4)
    assert result.stored == pytest.approx(float(kl(student, model, tokens).detach()), rel=1e-4)
    assert result.stored < 0.9 * result.before and result.stored < min(result.losses[:10])
    after = student.state_dict()
    assert list(after) == list(before)
    assert held == [inside(getattr(b.moe.experts, name)) for b in student.blocks for name in ("gate_up", "down")]
    changed = [n for n in after if not torch.equal(after[n], before[n])]
    assert any(".experts.gate_up." in n for n in changed) and any(".experts.down." in n for n in changed)
    assert all(".moe." in n for n in changed) == (train == "experts")
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    weights = sum(w.count for b in student.blocks for w in (b.moe.experts.gate_up, b.moe.experts.down))
    rest = sum(p.numel() for n, p in student.named_parameters() if train == "all" or ".moe." in n)
    assert result.parameters == weights + rest


def test_experts_in_several_forms_are_trained_each_in_its_own(pruned, model, tokens):
    student, _ = reduce(pruned, ["int8"], experts=[(0, 1), (0, 2), (2, 3)])
    student, _ = reduce(student, ["low-rank"], 0.3, experts=[(0, 3)])
    before = {n: t.clone() for n, t in student.state_dict().items()}
    result = recover(student, model, [tokens], train="experts", steps=40, lr=2e-3)
    assert result.stored < 0.9 * result.before
    after = student.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    for name in ("gate_up.0", "gate_up.1.values", "gate_up.2.left", "gate_up.2.right"):
        assert not torch.equal(after[f"blocks.0.moe.experts.{name}"], before[f"blocks.0.moe.experts.{name}"])
    assert torch.equal(after["blocks.0.moe.experts.gate_up.part"], torch.tensor([0, 1, 1, 2], dtype=torch.uint8))


def test_what_is_composed_is_the_weight_and_gradients_reach_its_pieces(pruned, tokens):
    student, _ = reduce(pruned, ["int8"], experts=[(0, 1), (0, 2)])
    student, _ = reduce(student, ["low-rank"], 0.3, experts=[(0, 0)])
    with torch.no_grad():
        whole = student(tokens).logits
    room = memory(student)
    with unpacked(student, True) as held:
        numbers = sum(p.numel() for p in held.parameters)
        assert room == 16 * numbers + 8 * 4 * (128 * 32 + 32 * 64)
        torch.testing.assert_close(student(tokens).logits, whole, rtol=1e-4, atol=1e-5)
        student(tokens).logits.square().mean().backward()
        assert len(held.parameters) == 8 and all(bool(p.grad.abs().sum() > 0) for p in held.parameters)
    with torch.no_grad():
        assert torch.equal(student(tokens).logits, whole)  # what was not changed comes back as it was
    with unpacked(student, False) as held:
        assert held is None and memory(student) == room


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
