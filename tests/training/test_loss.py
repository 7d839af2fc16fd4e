"""The training loss term by term, and balancing over micro batches."""

from __future__ import annotations

import torch

from xmoe.model.config import preset
from xmoe.model.router import load_balancing_loss, tokens_per_expert, z_loss
from xmoe.model.transformer import build
from xmoe.training.loss import StepLoad, training_loss


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
