from __future__ import annotations

import base64
import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.data.tiktoken_file import HARMONY_TOKENS, O200K_PATTERN, byte_letters, recover_merges
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import DataError

SAMPLE = "The token's router CAN'T send 12345 tokens... naïve «Привет» 你好 🙂\n\n  next, tokens' routes; the router, again/\r\n"


def toy_ranks(merges: int = 60) -> dict[bytes, int]:
    """Ranks as BPE training would give them: bytes in a shuffled order, then the most frequent pair, again and again."""
    ranks = [bytes([b]) for b in random.Random(1).sample(range(256), 256)]
    parts = [bytes([b]) for b in (SAMPLE * 2).encode()]
    while len(ranks) < 256 + merges:
        pairs = list(itertools.pairwise(parts))
        left, right = max(
            dict.fromkeys(p for p in pairs if p[0] + p[1] not in ranks), key=lambda p: (pairs.count(p), p)
        )
        ranks.append(left + right)
        joined: list[bytes] = []
        for part in parts:
            if joined and joined[-1] == left and part == right:
                joined[-1] = left + right
            else:
                joined.append(part)
        parts = joined
    return {token: rank for rank, token in enumerate(ranks)}


RANKS = toy_ranks()


def write(path, ranks):
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write(tmp_path_factory.mktemp("ranks") / "toy.tiktoken", RANKS))


def reference_encode(text: str) -> list[int]:
    """tiktoken's rule, word by word: join the adjacent pair whose union has the lowest rank, the leftmost first."""
    regex = pytest.importorskip("regex")
    ids = []
    for word in regex.findall(O200K_PATTERN, text):
        parts = [bytes([b]) for b in word.encode()]
        if word.encode() in RANKS:
            parts = [word.encode()]
        while True:
            ranked = [(RANKS[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in RANKS]
            if not ranked:
                break
            _, i = min(ranked)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [RANKS[part] for part in parts]
    return ids


TEXTS = st.one_of(st.text(), st.lists(st.sampled_from([*SAMPLE.split(" "), " ", "\n", "'S", "ROUTER"])).map(" ".join))


@given(TEXTS)
@settings(max_examples=300)
def test_ids_follow_the_ranks(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == reference_encode(text)
    assert tokenizer.decode(ids) == text


def test_ids_equal_tiktokens(tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    special = tokenizer.special_ids
    encoding = tiktoken.Encoding("toy", pat_str=O200K_PATTERN, mergeable_ranks=RANKS, special_tokens=special)
    rng = random.Random(3)
    whole_range = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    marked = SAMPLE + "".join(HARMONY_TOKENS.values())
    words = [*SAMPLE.split(), *special]
    for i in range(1000):
        letters, between = ((whole_range, ""), (marked, ""), (words, " "))[i % 3]
        text = between.join(rng.choice(letters) for _ in range(rng.randrange(40)))
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)
        assert tokenizer.encode(text, allow_special=True) == encoding.encode(text, allowed_special="all")


def test_special_tokens_follow_the_last_rank(tokenizer):
    n = len(RANKS)
    assert tokenizer.vocab_size == n + 21
    assert len(tokenizer.special_ids) == 21
    assert {tokenizer.special(name): name for name in HARMONY_TOKENS.values()} == {
        n + i: name for i, name in HARMONY_TOKENS.items()
    }
    assert tokenizer.special(f"<|reserved_{n + 2}|>") == n + 2
    assert tokenizer.eos_id == tokenizer.pad_id == n + 1
    assert tokenizer.special("<|startoftext|>") == n
    assert tokenizer.special("<|nonsense|>") is None


def test_every_cut_into_two_tokens_is_a_merge():
    """In the order of the whole's rank, then of the left part's: abc comes before ab, though it is longer."""
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"d": 3, b"bc": 4, b"abc": 5, b"ab": 6, b"cd": 7, b"abcd": 8}
    expected = [
        (b"b", b"c"),
        (b"a", b"bc"),
        (b"ab", b"c"),
        (b"a", b"b"),
        (b"c", b"d"),
        (b"abc", b"d"),
        (b"ab", b"cd"),
    ]
    assert recover_merges(ranks) == expected


def test_the_byte_letters_are_gpt2s():
    letters = byte_letters()
    assert len(set(letters)) == 256
    assert letters[ord("A")] == "A"
    assert letters[ord(" ")] == "Ġ"
    assert letters[ord("\n")] == "Ċ"
    assert letters[0] == "Ā"
    assert letters[0xAD] == "Ń"
    assert all(letter.isprintable() and not letter.isspace() for letter in letters)


def test_the_saved_form_is_the_published_one(tokenizer, tmp_path):
    """The parts of GPT-OSS's tokenizer.json apart from vocabulary and merges."""
    saved = json.loads(tokenizer.save(tmp_path).read_text(encoding="utf-8"))
    assert [saved[key] for key in ("version", "truncation", "padding", "normalizer")] == ["1.0", None, None, None]
    split, byte_level = saved["pre_tokenizer"]["pretokenizers"]
    assert split == {"type": "Split", "pattern": {"Regex": O200K_PATTERN}, "behavior": "Isolated", "invert": False}
    assert byte_level == {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    assert saved["model"]["ignore_merges"] is True
    assert saved["model"]["vocab"]["Ġ"] == RANKS[b" "]
    assert len(saved["added_tokens"]) == 21
    assert all(token["special"] and not token["normalized"] for token in saved["added_tokens"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:4], b"no base64! 4", *lines[5:]], r":5: expected a token in base64 and its rank"),
        (lambda lines: [*lines[:4], b"YQ==", *lines[5:]], r":5: expected a token"),
        (lambda lines: lines[:40] + lines[41:], "do not run from 0"),
        (lambda lines: lines[:200], "no token for byte 0x"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    path = write(tmp_path / "toy.tiktoken", RANKS)
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())))
    with pytest.raises(DataError, match=message):
        Tokenizer.load(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file .*o200k_base\.tiktoken"):
        Tokenizer.from_tiktoken(tmp_path / "o200k_base.tiktoken")
