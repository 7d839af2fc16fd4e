"""The walk through layers is the model's own forward pass."""

from __future__ import annotations

import pytest
import torch

from xmoe.compression.layerwise import as_batches, walk
from xmoe.errors import DataError


@torch.no_grad()
def test_walk_equals_features_bit_for_bit(model, tokens):
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 7:] = False
    mask[4, :2] = False
    batches = list(as_batches([(tokens[:2], mask[:2]), (tokens[2:], mask[2:])]))
    seen = {}

    def visit(layer, block, visits):
        for v in visits:
            seen[layer, v.batch] = v

    hidden = walk(model.config, [model.embed(b.tokens) for b in batches], model.blocks, batches, visit)
    for i, batch in enumerate(batches):
        expected = model.features(batch.tokens, positions=batch.positions, norms=True)
        assert torch.equal(model.norm(hidden[i]), expected.hidden)
        for layer, routing in enumerate(expected.routing):
            real = mask[:2] if i == 0 else mask[2:]
            assert torch.equal(seen[layer, i].routing.indices, routing.indices[real.reshape(-1)])
            assert torch.equal(seen[layer, i].routing.output_norm, routing.output_norm[real.reshape(-1)])
            block = model.blocks[layer]
            assert torch.equal(block.moe.router(seen[layer, i].inputs).logits, routing.logits[real.reshape(-1)])


def test_a_visitor_that_looks_away_stops_no_batch(model, tokens):
    batches = list(as_batches([tokens[:2], tokens[2:]]))

    def left(visit):
        return walk(model.config, [model.embed(b.tokens) for b in batches], model.blocks, batches, visit)

    looked, away = left(lambda layer, block, visits: list(visits)), left(lambda layer, block, visits: None)
    assert all(torch.equal(a, b) for a, b in zip(looked, away))


def test_positions_count_real_tokens_on_either_side():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]]).bool()
    (batch,) = as_batches([(torch.ones(3, 3, dtype=torch.int64), mask)])
    assert batch.positions.tolist() == [[0, 1, -1], [-1, 0, 1], [0, 1, 2]]


def test_a_batch_of_the_wrong_form_is_one_clear_line():
    with pytest.raises(DataError, match=r"batch is a str; expected token ids"):
        list(as_batches(["text"]))
    with pytest.raises(DataError, match=r"shape \[4\]; expected token ids"):
        list(as_batches([torch.ones(4, dtype=torch.int64)]))
