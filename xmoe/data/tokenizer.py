"""Tokenizer: text to ids and back, over the `tokenizers` library; trains a small byte-level BPE or loads a known one."""

from __future__ import annotations

import codecs
import functools
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from xmoe.data.cache import cache_folder, digest, one_maker
from xmoe.data.tiktoken_file import build_backend, byte_letters
from xmoe.errors import ConfigError, DataError
from xmoe.outputs import new_file

log = logging.getLogger(__name__)

# The end of a document, and Harmony's marks, so that a small variant can be taught to chat without a new vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|constrain|>",
    "<|call|>",
)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")
PADDING_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>")

TRAINING_VERSION = 1  # raise it when `Tokenizer.train` would give other ids for the same text


class Tokenizer:
    """Ids are plain ints in [0, vocab_size). Text in, text out; special tokens only where they are asked for.

    `backend` is the `tokenizers.Tokenizer` underneath. Build one with `train`, `of_bytes`, `load`, `from_gpt2`,
    `from_tiktoken` or `from_hub`.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        # The text "<|endoftext|>" in a document must not become the token; `encode(allow_special=True)` cuts at
        # special tokens itself, so the backend need never look for them.
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: id for id, token in added.items() if token.special}
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)

    # --- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE with GPT-2's division into words and exactly `vocab_size` ids, :data:`SPECIAL_TOKENS` among them.

        A text too small to give so many tokens fills the rest with `<|reserved_N|>` tokens, which no text contains,
        and a warning says how many: the size of a model must not depend on the length of its text.

        Raises:
            ConfigError: `vocab_size` leaves no room for 256 bytes and the special tokens.
            DataError: no text.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
                f"need {SMALLEST_VOCABULARY}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        counter = _Counter(texts)
        backend.train_from_iterator(counter, trainer)
        if not counter.characters:
            raise DataError("no text to train a tokenizer on")
        found = backend.get_vocab_size()
        if found < vocab_size:
            backend.add_special_tokens(
                [AddedToken(f"<|reserved_{i}|>", special=True) for i in range(found, vocab_size)]
            )
            log.warning(
                "the text gives only %d of the %d tokens asked for; the other %d ids are reserved and never occur",
                found,
                vocab_size,
                vocab_size - found,
            )
        return cls(backend)

    @classmethod
    def of_bytes(cls) -> Tokenizer:
        """No training: id b is byte b (0..255), and :data:`SPECIAL_TOKENS` follow. On ASCII text, one id a character."""
        backend = tokenizers.Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(byte_letters())}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """A `tokenizer.json`, a `.tiktoken` file, or a folder with one of these or with `vocab.json` and `merges.txt`.

        Raises:
            DataError: none of these is there, or the file is malformed.
        """
        path = Path(path)
        if path.is_dir():
            if (path / "tokenizer.json").is_file():
                return cls.load(path / "tokenizer.json")
            if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
                return cls.from_gpt2(path / "vocab.json", path / "merges.txt")
            ranks = sorted(path.glob("*.tiktoken"))
            if len(ranks) == 1:
                return cls.from_tiktoken(ranks[0])
            raise DataError(
                f"no tokenizer in folder {path}; expected tokenizer.json, vocab.json with merges.txt, or one .tiktoken file"
            )
        if not path.is_file():
            raise DataError(f"no tokenizer at {path}; expected a tokenizer.json, a .tiktoken file or a folder with one")
        if path.suffix == ".tiktoken":
            return cls.from_tiktoken(path)
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise DataError(f"{path} is not a tokenizer.json that can be read: {_first_line(error)}") from error

    @classmethod
    def from_gpt2(cls, vocab: str | Path, merges: str | Path) -> Tokenizer:
        """GPT-2's own files: 50,257 ids, `<|endoftext|>` the last. Raises DataError on a missing or malformed file."""
        for file in (vocab, merges):
            if not Path(file).is_file():
                raise DataError(f"no file {file}; GPT-2's tokenizer is a vocab.json and a merges.txt")
        try:
            backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:
            raise DataError(f"{vocab} and {merges} do not make a tokenizer: {_first_line(error)}") from error
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
        return cls(backend)

    @classmethod
    def from_tiktoken(cls, path: str | Path) -> Tokenizer:
        """GPT-OSS's tokenizer from `o200k_base.tiktoken` (about 2 s); see :mod:`xmoe.data.tiktoken_file`."""
        if not Path(path).is_file():
            raise DataError(f"no file {path}; expected a list of ranks such as o200k_base.tiktoken")
        return cls(build_backend(path))

    @classmethod
    def from_hub(cls, name: str) -> Tokenizer:
        """The `tokenizer.json` of the hub repository `org/name`; raises DataError where it cannot be had."""
        try:
            return cls(tokenizers.Tokenizer.from_pretrained(name))
        except Exception as error:
            raise DataError(
                f"cannot fetch the tokenizer of {name} from the hub ({_first_line(error)}); "
                "a folder with a tokenizer.json works without a network"
            ) from error

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into `folder` (made where missing; an older one is replaced) and return its path."""
        path = Path(folder) / "tokenizer.json"
        with new_file(path, overwrite=True) as partial:
            self.backend.save(str(partial), pretty=True)
        return path

    # --- using it ---------------------------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`. With `allow_special`, the name of a special token within it becomes that token.

        Nothing is added at the start or the end. A lone surrogate, which has no UTF-8 form, becomes U+FFFD.
        """
        if not (allow_special and self._special):
            return self.encode_batch([text])[0]
        ids: list[int] = []
        for i, piece in enumerate(self._special.split(text)):  # odd pieces are the special tokens
            ids += [self.special_ids[piece]] if i % 2 else self.encode(piece)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, special names as plain text.

        The library spreads the texts over all cores (RAYON_NUM_THREADS says how many), so give it many at a time: about
        4 MB a second and core for a vocabulary of 4,000.
        """
        encoded = self.backend.encode_batch_fast([_replace_surrogates(t) for t in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=skip_special)

    def token_bytes(self, id: int) -> bytes:
        """The bytes one id stands for, in a byte-level vocabulary; empty for an id without a token."""
        token = self.backend.id_to_token(id) or ""
        try:
            return bytes(_BYTE_OF_LETTER[letter] for letter in token)
        except KeyError:  # an added token written in other letters stands for itself
            return token.encode()

    def stream(self) -> StreamDecoder:
        """A decoder that is fed id by id."""
        return StreamDecoder(self)

    def special(self, name: str) -> int | None:
        """Id of a special token such as `<|start|>`, or None where this tokenizer has none of that name."""
        return self.special_ids.get(name)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, so that an embedding of so many rows serves every id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def eos_id(self) -> int | None:
        """The token that ends a document. For GPT-OSS `<|endoftext|>` (an answer ends with `<|return|>`)."""
        return self._first_id(END_OF_TEXT_NAMES)

    @functools.cached_property
    def pad_id(self) -> int | None:
        """A padding token of its own, else `eos_id`."""
        own = self._first_id(PADDING_NAMES)
        return self.eos_id if own is None else own

    @functools.cached_property
    def fingerprint(self) -> str:
        """Stands for everything that decides ids; equal for equal tokenizers."""
        return digest(self.backend.to_str().encode())

    def _first_id(self, names: tuple[str, ...]) -> int | None:
        ids = (self.backend.token_to_id(name) for name in names)
        return next((id for id in ids if id is not None), None)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, eos_id={self.eos_id})"


class StreamDecoder:
    """Text as soon as it is certain: `push` never gives half a character.

    All pieces joined equal `decode` of all ids: always where the vocabulary is byte-level, else wherever the ids spell
    valid UTF-8 (a decoder with byte fallback gives up a whole run of bytes for one that is wrong).
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # for vocabularies that are not byte-level: the ids shown last, then those held back
        self._shown = 0  # how many of them are shown

    def push(self, id: int) -> str:
        """The text that `id` completes; empty while a character is unfinished."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(id))
        # Elsewhere a token's text depends on its neighbours (the first loses its space, byte tokens join up), so the
        # piece shown last is decoded again together with what is new.
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids)
        piece = self._after_shown(text)
        if not piece or text.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return piece

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, usually nothing."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._after_shown(self._tokenizer.decode(self._ids))

    def _after_shown(self, text: str) -> str:
        return text[len(self._tokenizer.decode(self._ids[: self._shown])) :]


def trained_tokenizer(texts: Iterable[str], data_hash: str, vocab_size: int) -> Tokenizer:
    """As :meth:`Tokenizer.train`, but one trained before on the text behind `data_hash` comes from the user's cache."""
    name = digest(data_hash, vocab_size, SPECIAL_TOKENS, TRAINING_VERSION)
    path = cache_folder("tokenizers") / f"{name}.json"
    with one_maker(path):
        if path.is_file():
            try:
                kept = Tokenizer.load(path)
                if kept.vocab_size == vocab_size:
                    return kept
            except DataError:
                pass
            log.warning("the kept tokenizer %s is damaged; training it again", path)
        progress = tqdm(texts, desc="training the tokenizer", unit=" documents", disable=None)
        tokenizer = Tokenizer.train(progress, vocab_size)
        with new_file(path, overwrite=True) as partial:
            tokenizer.backend.save(str(partial), pretty=False)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ConfigError where the tokenizer has ids for which a model with `vocab_size` rows has no embedding."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary ends at {vocab_size - 1}; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more, or train a tokenizer of at most {vocab_size}"
        )


_BYTE_OF_LETTER = {letter: byte for byte, letter in enumerate(byte_letters())}


class _Counter:
    """Passes texts on and counts their characters, to tell an empty source from a small one."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield _replace_surrogates(text)


def _replace_surrogates(text: str) -> str:
    """JSON may hold lone surrogates, which UTF-8 cannot write; a pair of them is joined, a lone one becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
