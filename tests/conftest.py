"""Shared fixtures. Tests run offline, on small models whose dimensions are all unequal, so that a swapped axis fails."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

# A change is judged by the same examples everywhere: a test that passed here does not fail elsewhere for a draw that nobody
# made. New examples are for `make hunt`, whose finds become fixes and tests.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def randomize(model, seed: int = 0, scale: float = 1.0):
    """Fill every parameter, biases and sinks included, so that none can be dropped unnoticed; logits get a std near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * drawn)
            elif p.dim() == 1 or name.endswith("_bias"):
                p.copy_(0.5 * drawn)
            else:
                p.copy_(drawn * scale / p.shape[-1] ** 0.5)
    return model


@pytest.fixture
def random_model():
    """config, seed -> a Transformer in which every parameter is random."""
    from xmoe.model.transformer import Transformer

    return lambda config, seed=0: randomize(Transformer(config), seed).eval()
