"""Streams: tokens become batches for training and validation; one config says where text, tokenizer and batches come from.

Training cuts the token array into windows of `seq_len` inputs and the same number of targets, one further on. Each pass
over the text starts at another random offset and goes through its windows in another random order, both drawn from (seed,
pass) alone, so a position in the stream is two numbers and resuming is exact. Documents follow one another in a window,
set apart by the end-of-text token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from xmoe.data.cache import digest
from xmoe.data.documents import fraction_that_holds_out, is_held_out
from xmoe.data.sources import Reading, keep_hub_documents, load_documents, locate
from xmoe.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer, trained_tokenizer
from xmoe.data.tokens import TokenArray, kept_tokens
from xmoe.errors import ConfigError, DataError

IGNORED = -100  # a target that is not scored, as torch's cross entropy has it
TOKENIZER_TRAINING_BYTES = 32 << 20  # text a tokenizer is trained on; more of it hardly changes the merges


@dataclass(frozen=True)
class DataConfig:
    """What to learn from.

    Attributes:
        source: `python` (this Python's standard library), a text file, a folder, a `.jsonl` file, a hub name `org/name`,
            or several joined by commas (:mod:`xmoe.data.sources`).
        subset, split: of a hub dataset.
        text_field: field of JSONL or hub rows; `question+answer` joins two; None tries the usual names.
        document_separator: how text is cut into documents: auto, pieces, heading, file, or a string that stands between
            them (:mod:`xmoe.data.documents`).
        max_bytes: read so much text and no more; None reads all.
        tokenizer: `train` a byte-level BPE on the training documents, `bytes`, the path of a tokenizer, or a hub name.
        vocab_size: of the tokenizer that is trained; other tokenizers have their own.
        seq_len: tokens in a row of a batch.
        validation_fraction: share of the documents held out, chosen by a hash of their content; one at least,
            unless it is 0.
        validation_source: text to validate on in place of held-out documents.
        validation_split: a split of the hub dataset to validate on in place of held-out documents.
        validation_tokens: validate on the first documents that reach so many tokens; None takes all.
    """

    ALIASES: ClassVar[dict[str, str]] = {
        "dataset": "source",
        "path": "source",
        "name": "subset",
        "config_name": "subset",
        "text_column": "text_field",
        "block_size": "seq_len",
        "context_length": "seq_len",
        "max_seq_len": "seq_len",
        "sequence_length": "seq_len",
        "val_fraction": "validation_fraction",
        "validation_file": "validation_source",
        "separator": "document_separator",
    }

    source: str = "python"
    subset: str | None = None
    split: str = "train"
    text_field: str | None = None
    document_separator: str = "auto"
    max_bytes: int | None = None
    tokenizer: str = "train"
    vocab_size: int = 4096
    seq_len: int = 512
    validation_fraction: float = 0.05
    validation_source: str | None = None
    validation_split: str | None = None
    validation_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ConfigError(f"data.seq_len must be at least 1, found {self.seq_len}")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction must be in [0, 1), found {self.validation_fraction}")
        if self.tokenizer == "train" and self.vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"data.vocab_size {self.vocab_size} is too small: "
                f"256 bytes and the special tokens need {SMALLEST_VOCABULARY}"
            )
        for name in ("max_bytes", "validation_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1, or null for no limit; found {value}")
        if not self.document_separator:
            raise ConfigError("data.document_separator is empty; choose auto, pieces, heading, file or a string")


class Batch(NamedTuple):
    """inputs [B, S] int64 and targets [B, S] int64: targets[b, s] is the token behind inputs[b, s], or -100."""

    inputs: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Data:
    """Everything a run needs of its text: the tokenizer, the tokens to train on, and those held out (or None)."""

    config: DataConfig
    tokenizer: Tokenizer
    train: TokenArray
    validation: TokenArray | None

    def train_batches(self, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> TrainBatches:
        """An endless stream of shuffled batches for this rank."""
        return TrainBatches(self.train, self.config.seq_len, batch_size, seed=seed, rank=rank, world_size=world_size)

    def validation_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> ValidationBatches:
        """The held-out tokens, once through, in order; DataError where nothing is held out."""
        if self.validation is None:
            raise DataError(
                "nothing is held out for validation; set data.validation_fraction or data.validation_source"
            )
        return ValidationBatches(self.validation, self.config.seq_len, batch_size, rank=rank, world_size=world_size)


class TrainBatches:
    """Endless iterator of :class:`Batch` [batch_size, seq_len], for one rank of `world_size`.

    The ranks' batches, one under the other, are the batch a single process with `world_size` times the batch size
    would see; a pass over the text may end within a batch.

    Attributes:
        epoch, window: position: the pass over the text and how many of its windows all ranks have consumed.
        tokens_seen: tokens consumed by all ranks.
    """

    def __init__(
        self, tokens: TokenArray, seq_len: int, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        """Raises DataError where the text is shorter than one window, ConfigError on sizes that make no sense."""
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"no batches of {batch_size} rows for rank {rank} of {world_size}")
        if len(tokens) < seq_len + 1:
            raise _too_short(seq_len, len(tokens))
        self.tokens = tokens
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.window = 0
        self.tokens_seen = 0
        self._starts = self._shuffle(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        starts = [self._next_start() for _ in range(self.batch_size * self.world_size)]
        own = starts[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        rows = np.stack([self.tokens.ids[start : start + self.seq_len + 1] for start in own]).astype(np.int64)
        self.tokens_seen += len(starts) * self.seq_len
        tokens = torch.from_numpy(rows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    @property
    def epochs(self) -> float:
        """Passes over the text so far, as a fraction."""
        return self.epoch + self.window / len(self._starts)

    def state_dict(self) -> dict:
        """Position, and what it is a position in. Plain values; the next batch after loading is the next one now."""
        return {
            "epoch": self.epoch,
            "window": self.window,
            "tokens_seen": self.tokens_seen,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "data": self.tokens.fingerprint,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go to a saved position. Batch size and number of ranks may differ from those it was saved under.

        Raises:
            DataError: the position is one in other text, or in the same text with another tokenizer or seq_len.
        """
        if state["data"] != self.tokens.fingerprint:
            raise DataError(
                "cannot resume: the training tokens are not those of the saved run "
                "(the text, its split or the tokenizer has changed)"
            )
        if state["seq_len"] != self.seq_len:
            raise DataError(
                f"cannot resume: the saved run had data.seq_len {state['seq_len']}, this one {self.seq_len}"
            )
        self.seed = state["seed"]
        self.epoch = state["epoch"]
        self.window = state["window"]
        self.tokens_seen = state["tokens_seen"]
        self._starts = self._shuffle(self.epoch)

    def _next_start(self) -> int:
        if self.window == len(self._starts):
            self.epoch += 1
            self.window = 0
            self._starts = self._shuffle(self.epoch)
        self.window += 1
        return int(self._starts[self.window - 1])

    def _shuffle(self, epoch: int) -> np.ndarray:
        """Where this pass's windows start, in their order.

        RandomState rather than Generator: NumPy promises that its numbers never change, so a run can be resumed years on.
        """
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed % 2**64, epoch])))
        offset = random.randint(min(self.seq_len, len(self.tokens) - self.seq_len))
        starts = np.arange(offset, len(self.tokens) - self.seq_len, self.seq_len)
        return random.permutation(starts)


class ValidationBatches:
    """The same :class:`Batch` es each time through, [batch_size, seq_len], in the order of the text.

    Every token is a target exactly once, the end-of-text tokens included: the first input is an end-of-text token, so the
    first document has the context all others have. What is left of the last batch is padded with targets of -100. Every
    rank has the same number of batches, the last of which may be padding altogether.

    Attributes:
        scored_tokens: targets in all batches of all ranks.
        bytes_per_token: bytes of UTF-8 text / scored tokens, exactly; bits per byte = loss / (ln 2 * bytes_per_token).
    """

    def __init__(self, tokens: TokenArray, seq_len: int, batch_size: int, *, rank: int = 0, world_size: int = 1):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"no batches of {batch_size} rows for rank {rank} of {world_size}")
        self.tokens = tokens
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.scored_tokens = len(tokens)
        self.bytes_per_token = tokens.text_bytes / len(tokens)

    def __len__(self) -> int:
        return -(-self.scored_tokens // (self.seq_len * self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        size = self.seq_len * self.batch_size
        for i in range(len(self)):
            start = (i * self.world_size + self.rank) * size
            known = self.tokens.ids[max(start - 1, 0) : start + size].astype(np.int64)
            if start == 0:
                known = np.concatenate([[self.tokens.eos_id], known])
            inputs = np.full(size, self.tokens.eos_id, np.int64)
            targets = np.full(size, IGNORED, np.int64)
            if len(known) > 1:
                inputs[: len(known) - 1] = known[:-1]
                targets[: len(known) - 1] = known[1:]
            shape = (self.batch_size, self.seq_len)
            yield Batch(torch.from_numpy(inputs).view(shape), torch.from_numpy(targets).view(shape))


def load_data(config: DataConfig, tokenizer: Tokenizer | None = None) -> Data:
    """Read, cut, divide and tokenise the text of `config`; each step comes from the user's cache where it is known.

    Args:
        tokenizer: takes the place of `config.tokenizer`, as when a checkpoint brings its own.

    Raises:
        DataError: text that is missing, empty, malformed or shorter than `seq_len`, an unreachable hub, no document left
            to train on or to validate on.
        ConfigError: `validation_split` without a hub dataset.
    """
    apart = config.validation_source is not None or config.validation_split is not None
    fraction = 0.0 if apart else config.validation_fraction
    text = _open_text(config, config.source, config.split)
    if fraction:
        fraction = fraction_that_holds_out(text.documents(), fraction)
    if tokenizer is None:
        training = (document for document in text.documents() if not is_held_out(document, fraction))
        tokenizer = open_tokenizer(config.tokenizer, training, digest(text.hash, fraction), config.vocab_size)

    def divided() -> Iterator[tuple[str, str]]:
        for document in text.documents():
            yield ("validation" if is_held_out(document, fraction) else "train"), document

    key = digest(text.hash, fraction)
    parts = kept_tokens(("train", "validation"), divided, tokenizer, key, text_bytes=text.size)
    train, validation = parts["train"], parts["validation"]
    if not len(train):
        raise DataError(
            f"all of {config.source} is held out; lower data.validation_fraction {config.validation_fraction}"
        )
    if len(train) < config.seq_len + 1:
        raise _too_short(config.seq_len, len(train))
    if apart:
        validation = _tokens_apart(config, tokenizer)
    if config.validation_tokens is not None:
        validation = validation.first(config.validation_tokens)
    return Data(config, tokenizer, train, validation if len(validation) else None)


def open_tokenizer(name: str, texts: Iterable[str], data_hash: str, vocab_size: int) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; `texts` are read only to train one, the first 32 MiB of them.

    `data_hash` stands for the texts: one that was trained on them before is found again.

    Raises:
        DataError: a path that does not exist, a malformed file, an unreachable hub.
    """
    if name == "train":
        return trained_tokenizer(_first_bytes(texts, TOKENIZER_TRAINING_BYTES), data_hash, vocab_size)
    if name == "bytes":
        return Tokenizer.of_bytes()
    path = Path(name).expanduser()
    if path.exists() or path.suffix in (".json", ".tiktoken") or not re.fullmatch(r"[\w-]+/[\w.-]+", name):
        return Tokenizer.load(path)
    return Tokenizer.from_hub(name)


class _Text(NamedTuple):
    documents: Callable[[], Iterator[str]]
    hash: str  # of the text and of how it is cut
    size: int  # bytes, at most


def _open_text(config: DataConfig, source: str, split: str) -> _Text:
    """Text that is on this machine: what stands on the hub is fetched first."""
    reading = Reading(config.subset, split, config.text_field, config.document_separator, config.max_bytes)
    places = [keep_hub_documents(place, reading) if place.on_hub else place for place in locate(source)]
    hash = digest([place.content_hash() for place in places], dataclasses.astuple(reading))
    size = sum(place.size() for place in places)
    return _Text(lambda: load_documents(places, reading), hash, min(size, config.max_bytes or size))


def _tokens_apart(config: DataConfig, tokenizer: Tokenizer) -> TokenArray:
    source = config.validation_source or config.source
    if config.validation_split is not None and not any(place.on_hub for place in locate(source)):
        raise ConfigError(
            f"data.validation_split names a split of a hub dataset, but {source} is local; "
            "set data.validation_source to a file"
        )
    text = _open_text(config, source, config.validation_split or config.split)
    documents = (("validation", document) for document in text.documents())
    return kept_tokens(("validation",), lambda: documents, tokenizer, text.hash, text_bytes=text.size)["validation"]


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if size >= limit:
            return


def _too_short(seq_len: int, tokens: int) -> DataError:
    return DataError(
        f"data.seq_len {seq_len} is longer than the text: {tokens} training tokens, {seq_len + 1} needed; "
        "use a shorter data.seq_len or more text"
    )
