"""Mean loss over a text, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from xmoe.errors import DataError
from xmoe.model.config import preset
from xmoe.model.perplexity import bits_per_byte, mean_loss, perplexity


def test_mean_over_scored_tokens_whatever_the_batches(random_model):
    config = preset("tiny")
    model = random_model(config).train()
    tokens = torch.randint(config.vocab_size, (5, 17))
    targets = torch.randint(config.vocab_size, (5, 17))
    targets[1, 3:] = -100
    targets[4] = -100
    with torch.no_grad():
        logits = model.eval()(tokens).logits.double()
    model.train()
    scored = targets != -100
    expected = -logits.log_softmax(-1)[scored].gather(-1, targets[scored].unsqueeze(-1)).mean()
    for size in (1, 2, 5):
        found = mean_loss(model, zip(tokens.split(size), targets.split(size)))
        assert found == pytest.approx(float(expected), abs=1e-5)
    assert model.training  # as it was
    assert mean_loss(model, [(tokens, targets)], num_experts_per_tok=1) != pytest.approx(float(expected), abs=1e-3)
    assert mean_loss(model, [(tokens, targets)], dtype=torch.bfloat16) == pytest.approx(float(expected), abs=0.05)


def test_nothing_to_score_is_said(random_model):
    model = random_model(preset("tiny"))
    nothing = torch.full((1, 3), -100)
    with pytest.raises(DataError, match="no token to score"):
        mean_loss(model, [(torch.zeros(1, 3, dtype=torch.long), nothing)])


def test_units():
    assert perplexity(math.log(12.0)) == pytest.approx(12.0) and perplexity(1e4) == math.inf
    assert bits_per_byte(4 * math.log(2), 4.0) == pytest.approx(1.0)
