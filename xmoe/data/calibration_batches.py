"""Calibration batches: a fixed number of tokens of some text, to watch a model on rather than to train it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from xmoe.data.sources import Reading, load_documents
from xmoe.data.tokenizer import Tokenizer
from xmoe.data.tokens import encode_documents
from xmoe.errors import ConfigError, DataError


class CalibrationBatch(NamedTuple):
    """tokens [B, S] int64; mask [B, S] bool, False on the padding behind the last token."""

    tokens: torch.Tensor
    mask: torch.Tensor


class CalibrationBatches:
    """Rows of `seq_len` tokens, documents packed one behind the other; can be gone through again and again.

    Attributes:
        source: what the text was, in words.
        tokens: real tokens in all batches together.
        data_hash: sha256 of the ids, for the record of what was measured.
    """

    def __init__(self, ids: np.ndarray, *, seq_len: int, batch_size: int, pad_id: int, source: str):
        self.ids = ids
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.source = source
        self.tokens = len(ids)
        self.data_hash = hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()

    def __len__(self) -> int:
        return -(-self.tokens // (self.seq_len * self.batch_size))

    def __iter__(self) -> Iterator[CalibrationBatch]:
        """Every batch is [batch_size, seq_len] but the last, which has only the rows it needs."""
        size = self.seq_len * self.batch_size
        for start in range(0, self.tokens, size):
            part = self.ids[start : start + size]
            rows = -(-len(part) // self.seq_len)
            tokens = np.full(rows * self.seq_len, self.pad_id, np.int64)
            tokens[: len(part)] = part
            mask = np.arange(rows * self.seq_len) < len(part)
            shape = (rows, self.seq_len)
            yield CalibrationBatch(torch.from_numpy(tokens).view(shape), torch.from_numpy(mask).view(shape))


def batches(
    source: str | Path | Iterable[str],
    tokenizer: Tokenizer,
    *,
    seq_len: int = 2048,
    tokens: int = 1_000_000,
    batch_size: int = 1,
    subset: str | None = None,
    split: str = "train",
    text_field: str | None = None,
    separator: str = "auto",
) -> CalibrationBatches:
    """The first `tokens` tokens of a source (fewer where it has fewer) as batches of [batch_size, seq_len].

    Args:
        source: as in :mod:`xmoe.data.sources` (a file, a folder, a hub name, `python`), or texts, one document each.
        subset, split, text_field, separator: as in :class:`~xmoe.data.sources.Reading`.

    Raises:
        ConfigError: a size below one.
        DataError: a source without text, or one that cannot be read.
    """
    for name, value in (("seq_len", seq_len), ("tokens", tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, found {value}")
    if isinstance(source, (str, Path)):
        documents: Iterable[str] = load_documents(source, Reading(subset, split, text_field, separator))
        name = str(source)
    else:
        documents, name = source, "texts"
    ids = _first_ids(documents, tokenizer, tokens)
    if not len(ids):
        raise DataError(f"{name} hold no text")
    pad = tokenizer.pad_id
    return CalibrationBatches(
        ids, seq_len=seq_len, batch_size=batch_size, pad_id=0 if pad is None else pad, source=name
    )


def _first_ids(documents: Iterable[str], tokenizer: Tokenizer, tokens: int) -> np.ndarray:
    """Reads no further than it must: the source may be a dataset of terabytes on the hub."""
    found: list[np.ndarray] = []
    count = 0
    for ids, _ in encode_documents(documents, tokenizer):
        found.append(np.asarray(ids, np.int64))
        count += len(ids)
        if count >= tokens:
            break
    return np.concatenate(found)[:tokens] if found else np.zeros(0, np.int64)
