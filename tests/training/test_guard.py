"""The guard stops before the update and names the layer where it began."""

from __future__ import annotations

import pytest
import torch

from xmoe.model.config import preset
from xmoe.model.transformer import build
from xmoe.training.guard import SETTLE, Diverged, Guard, gradient_norms


@pytest.fixture
def model():
    return build(preset("tiny", num_hidden_layers=3), seed=2)


def tokens(model):
    return torch.arange(14).view(2, 7) % model.config.vocab_size


def backward(model) -> float:
    loss = model(tokens(model)).logits.float().square().mean()
    loss.backward()
    return float(loss.detach())


def check(guard, model, step=7, loss=None):
    found = backward(model)
    guard.check(step, found if loss is None else loss, gradient_norms(model), model, lambda: model(tokens(model)))
    model.zero_grad()


def test_norms_are_by_layer_and_add_up(model):
    backward(model)
    norms = gradient_norms(model)
    assert list(norms) == ["embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    everything = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(torch.stack(list(norms.values())).norm(), everything.norm())


def test_a_healthy_step_passes(model):
    check(Guard(2.0), model)


@pytest.mark.parametrize("layer", [0, 2])
def test_activations_that_overflow_are_traced_to_their_layer(model, layer):
    with torch.no_grad():  # finite weights whose product is not
        model.blocks[layer].attn.out.weight.fill_(3e38)
        model.blocks[layer].attn.out.bias.fill_(3e38)
    with pytest.raises(
        Diverged, match=rf"step 7: the loss is (nan|inf); the first .* come out of blocks\.{layer}\.attn"
    ):
        check(Guard(2.0), model)


def test_a_weight_that_is_not_finite_is_named(model):
    with torch.no_grad():
        model.blocks[1].moe.experts.down[3, 2, 1] = float("nan")
    with pytest.raises(
        Diverged, match=r"step 7: the loss is nan; the weight blocks\.1\.moe\.experts\.down is not finite"
    ):
        check(Guard(2.0), model, loss=float("nan"))


def test_gradients_that_are_not_finite_are_traced_to_where_the_backward_pass_met_them_first(model):
    def spoil(gradient):
        return gradient * float("inf")

    model.blocks[1].moe_norm.weight.register_hook(spoil)
    with pytest.raises(Diverged, match=r"gradients are not finite, first in blocks\.1\.moe_norm\.weight"):
        check(Guard(2.0), model)


def test_a_jump_of_the_loss_stops_once_the_average_means_something(model):
    guard = Guard(2.0)
    check(guard, model, loss=9.0)  # early steps may do as they like
    for _ in range(SETTLE + 40):
        check(guard, model, loss=4.0)
    check(guard, model, loss=5.9)
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight.mul_(1000)
        model.blocks[2].moe.router.weight.mul_(1000)
    with pytest.raises(
        Diverged, match=r"step 7: the loss jumped to 6\.5000 from about 4\.1.* in blocks|head|norm|embed"
    ):
        check(guard, model, loss=6.5)


def test_the_jump_check_can_be_turned_off(model):
    guard = Guard(0.0)
    for loss in [3.0] * (SETTLE + 1) + [30.0]:
        check(guard, model, loss=loss)


def test_a_resumed_guard_remembers(model):
    guard, later = Guard(1.0), Guard(1.0)
    for _ in range(SETTLE):
        check(guard, model, loss=4.0)
    later.load_state_dict(guard.state_dict())
    with pytest.raises(Diverged, match="jumped"):
        check(later, model, loss=5.5)
