"""The training loss term by term, balancing over micro batches, the selection bias and the effort sampler."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from xmoe.model.config import preset
from xmoe.model.router import load_balancing_loss, tokens_per_expert, z_loss
from xmoe.model.transformer import build
from xmoe.training.loss import EffortSampler, SelectionBias, StepLoad, training_loss


def small_model(**changes):
    model = build(preset("tiny", num_hidden_layers=2, **changes), seed=5)
    for block in model.blocks:  # routers that prefer some experts, so that balance matters
        torch.nn.init.normal_(block.moe.router.weight, std=0.5, generator=torch.Generator().manual_seed(6))
    return model


def text(model, rows: int, seed: int = 0, length: int = 11):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator)


def losses_of(model, tokens, load, mask=None, lb=0.01, z=0.001, k=None, targets=None):
    features = model.features(tokens, num_experts_per_tok=k)
    targets = tokens.roll(-1, 1) if targets is None else targets
    return training_loss(features, model.unembedding, targets, load, load_balancing_coef=lb, z_loss_coef=z, mask=mask)


def test_the_terms_add_up_and_are_what_their_names_say():
    model = small_model()
    tokens = text(model, 3)
    losses = losses_of(model, tokens, StepLoad(), lb=0.3, z=0.2)
    logits, routing = model(tokens)
    lm = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(-1, 1).flatten())
    balance = [load_balancing_loss(r) for r in routing]
    squares = [z_loss(r) for r in routing]
    torch.testing.assert_close(losses.lm, lm)
    torch.testing.assert_close(losses.load_balancing, sum(balance) / 2)
    torch.testing.assert_close(losses.z, sum(squares) / 2)
    torch.testing.assert_close(losses.total, lm + 0.3 * sum(balance) + 0.2 * sum(squares))


def test_balancing_over_micro_batches_equals_the_whole_batch():
    """With the counts of the whole step, the gradients of the micro batches' means add up to those of one large batch."""
    model = small_model()
    tokens = text(model, 8)
    names = [name for name, _ in model.named_parameters()]
    whole = losses_of(model, tokens, StepLoad(), lb=1.0, z=0.0)
    expected = torch.autograd.grad(whole.load_balancing, model.parameters(), allow_unused=True)

    everything = [tokens_per_expert(r) for r in model.features(tokens).routing]
    total = [torch.zeros_like(p) for p in model.parameters()]
    alone = [torch.zeros_like(p) for p in model.parameters()]
    for part in tokens.split(2):
        routing = model.features(part).routing
        for sums, counts in ((total, everything), (alone, [None] * 2)):
            loss = sum(load_balancing_loss(r, counts=c) for r, c in zip(routing, counts)) / 2 / 4
            for s, g in zip(sums, torch.autograd.grad(loss, model.parameters(), allow_unused=True, retain_graph=True)):
                if g is not None:
                    s += g
    router = [i for i, name in enumerate(names) if name.endswith("router.weight")]
    for i, name in enumerate(names):
        if expected[i] is not None:
            torch.testing.assert_close(total[i], expected[i], rtol=1e-5, atol=1e-6, msg=name)
    # The test would see the difference: micro batches that balance alone pull the routers elsewhere.
    assert max(float((alone[i] - expected[i]).abs().max()) for i in router) > 1e-4


def test_each_micro_batch_knows_the_counts_of_those_before_it():
    model = small_model()
    one, two = text(model, 2, seed=1), text(model, 2, seed=2)
    load = StepLoad()
    losses_of(model, one, load)
    second = losses_of(model, two, load)
    together = [tokens_per_expert(r) for r in model.features(torch.cat([one, two])).routing]
    assert all(torch.equal(a, b) for a, b in zip(load.rows, together))
    expected = sum(load_balancing_loss(r, counts=c) for r, c in zip(model.features(two).routing, together)) / 2
    torch.testing.assert_close(second.load_balancing, expected)


def test_padding_counts_for_no_term():
    model = small_model()
    tokens = text(model, 2)
    padded = torch.cat([tokens, torch.zeros(2, 5, dtype=torch.long)], 1)
    mask = torch.arange(16).expand(2, 16) < 11
    targets = tokens.roll(-1, 1)
    padded_targets = torch.cat([targets, torch.full((2, 5), -100)], 1)
    a = losses_of(model, tokens, StepLoad(), targets=targets)
    b = losses_of(model, padded, StepLoad(), mask=mask, targets=padded_targets)
    for name, x, y in zip(a._fields, a, b):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)


def test_a_single_expert_has_nothing_to_balance():
    model = build(preset("tiny", num_hidden_layers=2, num_experts=1, num_experts_per_tok=1, reasoning_effort=None))
    losses = losses_of(model, text(model, 2), StepLoad(), lb=5.0, z=5.0)
    assert losses.total == losses.lm and losses.load_balancing == 1.0 and losses.z == 0.0
    losses.total.backward()
    assert model.blocks[0].moe.router.weight.grad.abs().max() == 0


def test_recomputing_activations_counts_nothing_twice():
    plain, lean = small_model(), small_model()
    lean.recompute = True
    lean.train()
    loads = StepLoad(), StepLoad()
    for model, load in zip((plain, lean), loads):
        losses_of(model, text(model, 3), load).total.backward()
    assert all(torch.equal(a, b) for a, b in zip(*(load.rows for load in loads)))
    assert int(loads[1].rows[0].sum()) == 3 * 11 * plain.config.num_experts_per_tok
    for a, b in zip(plain.parameters(), lean.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_with_one_expert_per_token_the_language_model_does_not_move_the_router():
    model = small_model()
    for k, moves in ((1, False), (2, True), ([1, 2], True)):
        losses = losses_of(model, text(model, 2), StepLoad(), lb=0.0, z=0.0, k=k)
        (gradient,) = torch.autograd.grad(losses.total, [model.blocks[1].moe.router.weight])
        assert bool(gradient.abs().max() > 1e-6) is moves
    losses = losses_of(model, text(model, 2), StepLoad(), lb=0.01, z=0.0, k=1)
    (gradient,) = torch.autograd.grad(losses.total, [model.blocks[1].moe.router.weight])
    assert gradient.abs().max() > 1e-6  # balancing alone moves it


def test_the_selection_bias_feeds_the_hungry_and_is_gone_at_the_end():
    model = small_model()
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


def test_the_selection_bias_changes_the_choice_but_not_the_weights():
    model = small_model()
    router, x = model.blocks[0].moe.router, torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    before = router(x)
    router.selection_bias = torch.zeros(10)
    router.selection_bias[7] = 1e4
    after = router(x)
    assert (after.indices == 7).any(-1).all() and not (before.indices == 7).any(-1).all()
    assert torch.equal(before.logits, after.logits)
    torch.testing.assert_close(after.weights, after.logits.gather(-1, after.indices).softmax(-1))


def test_the_selection_bias_evens_the_load_without_any_loss():
    model = small_model()
    router = model.blocks[0].moe.router
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    bias = SelectionBias(model, rate=0.05)
    spread = []
    for _ in range(200):
        rows = tokens_per_expert(router(x))
        spread.append(int(rows.max() - rows.min()))
        bias.update([rows, rows], progress=0.0)
    assert spread[-1] < 0.3 * spread[0]


@pytest.mark.parametrize("per_layer", [False, True])
def test_effort_is_drawn_as_often_as_asked_and_again_the_same(per_layer):
    table = {"low": 1, "medium": 2, "high": 4}
    sampler = EffortSampler(table, {"low": 1.0, "medium": 2.0, "high": 1.0}, per_layer, layers=3, seed=9)
    draws = [sampler.draw(step) for step in range(2000)]
    flat = [k for draw in draws for k in (draw if per_layer else [draw])]
    counts = Counter(flat)
    assert set(counts) == {1, 2, 4}
    assert abs(counts[2] / len(flat) - 0.5) < 0.05 and abs(counts[1] / len(flat) - 0.25) < 0.05
    if per_layer:
        assert all(len(draw) == 3 for draw in draws) and any(len(set(draw)) == 3 for draw in draws)
    assert draws[700:] == [sampler.draw(step) for step in range(700, 2000)]
    other = EffortSampler(table, {"low": 1.0, "medium": 2.0, "high": 1.0}, per_layer, layers=3, seed=10)
    assert draws != [other.draw(step) for step in range(2000)]
