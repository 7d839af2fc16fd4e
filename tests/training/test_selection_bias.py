"""The selection bias evens the load without touching the weights, and is gone at the end of a run."""

from __future__ import annotations

import pytest
import torch

from xmoe.model.config import preset
from xmoe.model.router import tokens_per_expert
from xmoe.model.transformer import build
from xmoe.training.selection_bias import SelectionBias


@pytest.fixture
def model():
    model = build(preset("tiny", num_hidden_layers=2), seed=5)
    for block in model.blocks:  # routers that prefer some experts
        torch.nn.init.normal_(block.moe.router.weight, std=0.5, generator=torch.Generator().manual_seed(6))
    return model


def test_the_selection_bias_feeds_the_hungry_and_is_gone_at_the_end(model):
    bias = SelectionBias(model, rate=0.1)
    rows = [torch.tensor([30, 0, 3, 3, 3, 3, 3, 3, 3, 9])] * 2
    bias.update(rows, progress=0.1)
    router = model.blocks[1].moe.router
    assert abs(float(router.selection_bias.mean())) < 1e-7
    raised = router.selection_bias > 0
    assert raised.tolist() == [False, True, True, True, True, True, True, True, True, False]
    bias.apply(0.9)
    torch.testing.assert_close(router.selection_bias, bias.bias[1] * 0.5)
    bias.apply(1.0)
    assert router.selection_bias is None


def test_the_selection_bias_changes_the_choice_but_not_the_weights(model):
    router, x = model.blocks[0].moe.router, torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    before = router(x)
    router.selection_bias = torch.zeros(10)
    router.selection_bias[7] = 1e4
    after = router(x)
    assert (after.indices == 7).any(-1).all() and not (before.indices == 7).any(-1).all()
    assert torch.equal(before.logits, after.logits)
    torch.testing.assert_close(after.weights, after.logits.gather(-1, after.indices).softmax(-1))


def test_the_selection_bias_evens_the_load_without_any_loss(model):
    router = model.blocks[0].moe.router
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    bias = SelectionBias(model, rate=0.05)
    spread = []
    for _ in range(200):
        rows = tokens_per_expert(router(x))
        spread.append(int(rows.max() - rows.min()))
        bias.update([rows, rows], progress=0.0)
    assert spread[-1] < 0.3 * spread[0]
