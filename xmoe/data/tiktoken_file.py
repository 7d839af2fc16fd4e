"""Rebuild a `tokenizers` tokenizer from a `.tiktoken` file: the vocabulary of GPT-OSS from the ranks OpenAI publishes.

A `.tiktoken` file lists every token (base64) with its rank. tiktoken joins, again and again, the adjacent pair whose
union has the lowest rank. A `tokenizers` BPE wants the pairs themselves, so every way to cut a token into two tokens
becomes a merge, and merges stand in the order of the rank of their union. From `o200k_base.tiktoken` this gives 446,189
merges and, with the special tokens of `o200k_harmony`, the very bytes of the `tokenizer.json` published with GPT-OSS.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from xmoe.errors import DataError

# Words with an optional leading mark and an English contraction behind, lower-case tails and capital heads apart;
# numbers of up to three digits; punctuation with the line ends that follow; line ends; other white space.
O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Special tokens of o200k_harmony by their distance from the end of the ranks (199,998); the gaps are reserved.
HARMONY_TOKENS = {
    0: "<|startoftext|>",
    1: "<|endoftext|>",
    4: "<|return|>",
    5: "<|constrain|>",
    7: "<|channel|>",
    8: "<|start|>",
    9: "<|end|>",
    10: "<|message|>",
    14: "<|call|>",
    20: "<|endofprompt|>",
}
HARMONY_TOKEN_COUNT = 21


def byte_letters() -> list[str]:
    """The printable character by which byte-level BPE writes each of the 256 bytes (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the others take the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Token bytes -> rank, in rank order.

    Raises:
        DataError: a line that is not `BASE64 RANK`, ranks that leave a gap, or one of the 256 bytes missing.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}:{number}: expected a token in base64 and its rank, found {line[:40]!r}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{path}: the {len(ranks)} ranks do not run from 0 to {len(ranks) - 1}; is the file whole?")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise DataError(f"{path}: no token for byte 0x{missing:02x}, so some text could not be written")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every cut of every token into two tokens: by rank of the whole, then of the left part, then of the right."""
    merges = []
    for token in ranks:  # in rank order
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def build_backend(path: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer of `o200k_harmony` over the ranks of the file at `path`; its special tokens follow the last rank."""
    ranks = read_ranks(path)
    letters = dict(enumerate(byte_letters()))

    def spell(token: bytes) -> str:
        return token.decode("latin-1").translate(letters)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in recover_merges(ranks)]
    # ignore_merges: a word that is a token is that token, as in tiktoken, whatever its merges would give.
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(O200K_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    names = (HARMONY_TOKENS.get(i, f"<|reserved_{len(ranks) + i}|>") for i in range(HARMONY_TOKEN_COUNT))
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    return backend
