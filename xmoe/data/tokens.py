"""Tokens: documents become one long array of ids, kept on disk so that the next run starts at once.

A document is its ids and one end-of-text id behind them. An array is a plain file of uint16 (vocabularies of up to 65,536)
or uint32, little-endian, mapped into memory; beside it stands where each document ends and how many bytes of text it had.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from xmoe.data.cache import cache_folder, digest, one_maker
from xmoe.data.documents import utf8
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import DataError
from xmoe.outputs import new_folder

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when files, the cutting into documents or their division would come out otherwise
BATCH_BYTES = 1 << 21  # text handed to the tokenizer at a time: enough for all cores, little in memory


@dataclass(frozen=True)
class TokenArray:
    """Ids of documents, each closed by the end-of-text id.

    Attributes:
        ids: [N] uint16 or uint32, often a read-only memory map.
        documents: [D, 2] int64; where each document ends in `ids`, and the bytes of its text in UTF-8.
        eos_id: the id that closes each document.
    """

    ids: np.ndarray
    documents: np.ndarray
    eos_id: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def text_bytes(self) -> int:
        """Bytes of UTF-8 text behind all ids."""
        return int(self.documents[:, 1].sum())

    def first(self, tokens: int) -> TokenArray:
        """The first documents, as many as it takes to reach `tokens`; none is cut."""
        count = min(int(np.searchsorted(self.documents[:, 0], tokens)) + 1, len(self.documents))
        documents = self.documents[:count]
        end = int(documents[-1, 0]) if count else 0
        return TokenArray(self.ids[:end], documents, self.eos_id)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Stands for these ids; a training run that resumes compares it."""
        return digest(len(self.ids), np.ascontiguousarray(self.documents).tobytes(), self.ids[:4096].tobytes())


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that closes documents; DataError where the tokenizer has none."""
    if tokenizer.eos_id is None:
        raise DataError("the tokenizer has no end-of-text token (such as <|endoftext|> or </s>) to set documents apart")
    return tokenizer.eos_id


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """For each document its ids, end-of-text included, and the bytes of its text; encoded many at a time."""
    eos = end_of_text(tokenizer)
    for batch in _by_bytes(documents):
        for ids, text in zip(tokenizer.encode_batch(batch), batch):
            ids.append(eos)
            yield ids, len(utf8(text))


def kept_tokens(
    parts: tuple[str, ...],
    documents: Callable[[], Iterator[tuple[str, str]]],
    tokenizer: Tokenizer,
    key: str,
    *,
    text_bytes: int | None = None,
) -> dict[str, TokenArray]:
    """One array for each of `parts`, from the user's cache where `key` is known there and the files are sound.

    Args:
        parts: names, such as ("train", "validation").
        documents: gives (part, document) pairs; called only where the arrays have to be made.
        key: stands for the documents, their order and their division into parts. The tokenizer is added here.
        text_bytes: how much text is expected, for the progress bar.
    """
    folder = cache_folder("tokens") / digest(FORMAT_VERSION, key, tokenizer.fingerprint, parts)
    eos = end_of_text(tokenizer)
    if (kept := _read(folder, parts, eos)) is not None:
        return kept
    with one_maker(folder):
        if (kept := _read(folder, parts, eos)) is not None:
            return kept
        if folder.exists():
            log.warning("the kept tokens in %s are damaged; making them again", folder)
        with new_folder(folder, overwrite=True) as partial:
            _write(partial, parts, documents(), tokenizer, text_bytes)
        made = _read(folder, parts, eos)
    assert made is not None, "what was just written can be read"
    return made


def _write(
    folder: Path,
    parts: tuple[str, ...],
    documents: Iterator[tuple[str, str]],
    tokenizer: Tokenizer,
    text_bytes: int | None,
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    names, texts = itertools.tee(documents)  # apart by one batch at most
    encoded = encode_documents((text for _, text in texts), tokenizer)
    files = {part: open(folder / f"{part}.ids", "wb") for part in parts}  # noqa: SIM115 (closed below)
    ends = dict.fromkeys(parts, 0)
    checks = dict.fromkeys(parts, 0)
    table: dict[str, list[tuple[int, int]]] = {part: [] for part in parts}
    try:
        with tqdm(total=text_bytes, desc="tokenising", unit="B", unit_scale=True, disable=None) as progress:
            for (part, _), (ids, size) in zip(names, encoded):
                data = np.asarray(ids, dtype).tobytes()
                files[part].write(data)
                checks[part] = zlib.crc32(data, checks[part])
                ends[part] += len(ids)
                table[part].append((ends[part], size))
                progress.update(size)
    finally:
        for file in files.values():
            file.close()
    for part in parts:
        np.save(folder / f"{part}.documents.npy", np.asarray(table[part], np.int64).reshape(-1, 2))
    about = {"dtype": dtype.str, "tokens": ends, "crc32": checks}
    (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _read(folder: Path, parts: tuple[str, ...], eos: int) -> dict[str, TokenArray] | None:
    """The arrays kept in `folder`, or None where a file is missing, short or altered."""
    arrays = {}
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        for part in parts:
            path = folder / f"{part}.ids"
            if path.stat().st_size:
                ids = np.memmap(path, about["dtype"], mode="r")
            else:  # an empty file cannot be mapped
                ids = np.zeros(0, about["dtype"])
            documents = np.load(folder / f"{part}.documents.npy")
            if zlib.crc32(ids) != about["crc32"][part] or len(ids) != about["tokens"][part]:
                return None
            if documents.shape[1:] != (2,) or (documents[-1, 0] if len(documents) else 0) != len(ids):
                return None
            arrays[part] = TokenArray(ids, documents, eos)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return arrays


def _by_bytes(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
