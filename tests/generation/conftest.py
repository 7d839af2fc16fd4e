"""What the tests of generation share: small random models and a tokenizer that needs no training."""

from __future__ import annotations

import pytest

from xmoe.data.tokenizer import Tokenizer
from xmoe.model.config import preset


@pytest.fixture(scope="session")
def tokenizer():
    """Id b is byte b; the special tokens follow."""
    return Tokenizer.of_bytes()


@pytest.fixture
def tiny(random_model):
    """The tiny preset (window 8, original context 32, context 512) with every parameter random."""
    return random_model(preset("tiny"))
