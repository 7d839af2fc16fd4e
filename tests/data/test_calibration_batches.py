from __future__ import annotations

import pytest
import torch

import xmoe
from xmoe.data.calibration_batches import batches
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import ConfigError, DataError

BYTES = Tokenizer.of_bytes()


def real(found) -> list[int]:
    return [id for batch in found for id in batch.tokens[batch.mask].tolist()]


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("tokens", [1, 7, 40, 1000])
def test_exactly_so_many_tokens_are_real(text_folder, batch_size, tokens):
    texts = [f.read_text(encoding="utf-8") for f in sorted(text_folder.rglob("*.txt"))]
    stream = [id for text in texts for id in [*text.encode(), 256]]
    found = batches(text_folder, BYTES, seq_len=7, tokens=tokens, batch_size=batch_size)
    assert real(found) == stream[:tokens] == real(found)
    assert found.tokens == tokens
    assert len(found) == len(list(found))
    *full, last = found
    assert all(batch.tokens.shape == (batch_size, 7) and bool(batch.mask.all()) for batch in full)
    assert last.tokens.shape[1] == 7
    assert last.mask.any(dim=1).all(), "no row of nothing but padding"
    assert last.tokens.dtype == torch.int64
    assert (last.tokens[~last.mask] == BYTES.pad_id).all()


def test_a_short_source_gives_what_it_has():
    found = batches(["one", "two"], BYTES, seq_len=5, tokens=1000, batch_size=2)
    assert real(found) == [*b"one", 256, *b"two", 256]
    assert found.tokens == 8


def test_no_more_is_read_than_is_needed():
    def texts():
        while True:
            yield "again and again " * 100_000

    assert batches(texts(), BYTES, seq_len=5, tokens=12).tokens == 12


def test_the_hash_stands_for_the_tokens():
    first, same, other = (batches([t], BYTES, seq_len=s) for t, s in (("abc", 2), ("abc", 3), ("abd", 2)))
    assert first.data_hash == same.data_hash != other.data_hash


def test_the_public_name():
    assert xmoe.batches is batches


def test_mistakes_are_said(tmp_path):
    with pytest.raises(ConfigError, match="tokens must be at least 1, found 0"):
        batches(["text"], BYTES, tokens=0)
    with pytest.raises(DataError, match="texts hold no text"):
        batches([], BYTES)
    with pytest.raises(DataError, match="no file or folder"):
        batches(tmp_path / "absent.txt", BYTES)
