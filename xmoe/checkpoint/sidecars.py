"""The small files beside the weights: tokenizer, chat template, generation settings, licence. They are kept, not rebuilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from xmoe.checkpoint.config_keys import GENERATION
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import CheckpointError

_KEPT = (
    GENERATION, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "*.tiktoken", "chat_template.jinja", "chat_template.json", "LICENSE*", "USAGE_POLICY*",
)  # fmt: skip

# As published: a turn ends with <|return|>, where the tokenizer by itself separates documents with <|endoftext|>.
_HARMONY = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}


def keep(source: Path, folder: Path) -> None:
    """Copy what stands beside the weights in `source` into `folder`."""
    for pattern in _KEPT:
        for file in sorted(home(source).glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def home(folder: Path) -> Path:
    """Where the small files of a checkpoint are: the published `original/` folder has them one floor up."""
    above = folder.resolve().parent
    if folder.resolve().name == "original" and not (folder / "tokenizer.json").exists():
        return above if (above / "tokenizer.json").exists() else folder
    return folder


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None where it has none.

    Raises:
        CheckpointError: its ids go beyond the model's vocabulary.
        DataError: its file is damaged.
    """
    place = home(folder)
    if not any((place / name).is_file() for name in ("tokenizer.json", "vocab.json")) and not any(
        place.glob("*.tiktoken")
    ):
        return None
    tokenizer = Tokenizer.load(place)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{place}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary ends at "
            f"{vocab_size - 1}; tokenizer and weights are of different models"
        )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put `tokenizer` into `folder`, unless the file that is there already is the same tokenizer, perhaps spelled otherwise."""
    file = folder / "tokenizer.json"
    if not file.is_file() or Tokenizer.load(file).fingerprint != tokenizer.fingerprint:
        tokenizer.save(folder)


def token_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The special ids that Hugging Face wants in config.json."""
    if tokenizer is None or tokenizer.eos_id is None:
        return {}
    return {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def write_tokenizer_config(folder: Path, tokenizer: Tokenizer, longest: int) -> None:
    """The tokenizer_config.json without which transformers does not know what to make of a tokenizer.json."""
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,  # what is decoded is what was encoded
        "model_max_length": longest,
    }
    names = {id: name for name, id in tokenizer.special_ids.items()}
    roles = {"bos_token": None, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    if all(tokenizer.special(name) is not None for name in _HARMONY.values()):
        roles = {role: tokenizer.special(name) for role, name in _HARMONY.items()}
    content |= {role: names[id] for role, id in roles.items() if id in names}
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
