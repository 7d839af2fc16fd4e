from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from xmoe.data.tokenizer import (
    SMALLEST_VOCABULARY,
    SPECIAL_TOKENS,
    Tokenizer,
    check_vocabulary,
    trained_tokenizer,
)
from xmoe.errors import ConfigError, DataError

from .conftest import visible

TEXTS = ["Every token visits two experts. ", "日本語のテキスト 🙂 ", "def route(x):\n    return x\n"] * 5
TRAINED = Tokenizer.train(TEXTS, 300)
BYTES = Tokenizer.of_bytes()
EITHER = st.sampled_from([TRAINED, BYTES])


@given(EITHER, st.text())
def test_any_text_survives_a_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@given(EITHER, st.lists(st.sampled_from([*SPECIAL_TOKENS, "a <|", "|> start", "é🙂", " \n"]), max_size=8))
def test_special_tokens_only_where_they_are_asked_for(tokenizer, parts):
    text = "".join(parts)
    ids = tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(ids) == text
    names = [tokenizer.backend.id_to_token(id) for id in ids if id in tokenizer.special_ids.values()]
    assert names == [part for part in parts if part in SPECIAL_TOKENS]
    assert tokenizer.decode(ids, skip_special=True) == "".join(p for p in parts if p not in SPECIAL_TOKENS)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(EITHER, st.lists(st.integers(0, 263), max_size=30))
def test_a_stream_gives_what_decoding_at_once_gives(tokenizer, ids):
    """Ids in any order: most of them are no UTF-8 at all."""
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


@given(EITHER, st.text())
def test_a_stream_never_gives_half_a_character(tokenizer, text):
    stream = tokenizer.stream()
    shown = ""
    for id in tokenizer.encode(text):
        shown += stream.push(id)
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""


SMILE = ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
UNITS = st.sampled_from([["▁the"], ["▁expert"], ["s"], SMILE])


@given(st.lists(UNITS, max_size=12), st.integers(0, 3))
def test_a_stream_follows_a_vocabulary_that_is_not_byte_level(units, unfinished):
    """As in Llama's: the first word loses its space, and a character may be spread over tokens of one byte each."""
    vocab = ["▁the", "▁expert", "s", *SMILE]
    backend = Backend(models.BPE({token: i for i, token in enumerate(vocab)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend)
    stream = tokenizer.stream()
    expected = "".join({"▁the": " the", "▁expert": " expert", "s": "s"}.get(unit[0], "🙂") for unit in units)
    expected = expected.removeprefix(" ")
    shown = ""
    for token in (token for unit in units for token in unit):
        shown += stream.push(vocab.index(token))
        assert expected.startswith(shown)
    assert shown == expected
    for token in SMILE[:unfinished]:
        assert stream.push(vocab.index(token)) == ""
    if not (units and units[-1] is SMILE):  # this kind of decoder spoils a whole run of bytes when its end is missing
        assert stream.finish() == "\ufffd" * unfinished


def test_bytes_need_no_training():
    assert BYTES.vocab_size == SMALLEST_VOCABULARY == 256 + len(SPECIAL_TOKENS)
    assert BYTES.encode("aé") == [0x61, 0xC3, 0xA9]
    assert BYTES.eos_id == 256
    assert BYTES.pad_id == BYTES.eos_id


@pytest.mark.parametrize("size", [SMALLEST_VOCABULARY, 271, 300])
def test_the_vocabulary_has_the_size_asked_for(size):
    tokenizer = Tokenizer.train(TEXTS, size)
    assert tokenizer.vocab_size == size
    assert sorted(tokenizer.backend.get_vocab().values()) == list(range(size))
    assert {tokenizer.special(name) for name in SPECIAL_TOKENS} == set(tokenizer.special_ids.values())


def test_a_text_too_small_for_the_vocabulary_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer.train(["abab"], 320)
    assert tokenizer.vocab_size == 320
    found = SMALLEST_VOCABULARY + 2  # "ab" and "abab"
    assert f"gives only {found} of the 320 tokens asked for; the other {320 - found}" in caplog.text
    assert tokenizer.encode("abab") == [tokenizer.backend.token_to_id("abab")]
    assert tokenizer.decode(tokenizer.encode("<|reserved_319|>")) == "<|reserved_319|>"


def test_training_merges_what_is_frequent():
    assert len(TRAINED.encode("Every token")) < len("Every token")
    assert Tokenizer.train(TEXTS, 300).fingerprint == TRAINED.fingerprint


def test_training_refuses_no_room_and_no_text():
    with pytest.raises(ConfigError, match=f"vocab_size 200 is too small.*need {SMALLEST_VOCABULARY}"):
        Tokenizer.train(TEXTS, 200)
    with pytest.raises(DataError, match="no text"):
        Tokenizer.train([], 300)


def test_lone_surrogates_become_the_replacement_character():
    lone, pair = json.loads(r'"a\ud800b"'), "\ud83d\ude42"
    for tokenizer in (TRAINED, Tokenizer.train(["a", lone], 300)):
        assert tokenizer.decode(tokenizer.encode(lone)) == "a\ufffdb"
        assert tokenizer.decode(tokenizer.encode(pair)) == "🙂"


def test_save_and_load(tmp_path):
    path = TRAINED.save(tmp_path / "model")
    assert path.name == "tokenizer.json"
    for place in (path, path.parent):
        loaded = Tokenizer.load(place)
        assert loaded.fingerprint == TRAINED.fingerprint
        assert loaded.encode("<|start|>", allow_special=True) == [TRAINED.special("<|start|>")]
        assert loaded.encode("<|start|>") == TRAINED.encode("<|start|>")
    BYTES.save(tmp_path / "model")
    assert Tokenizer.load(path).vocab_size == BYTES.vocab_size


def gpt2_files(folder):
    """GPT-2's kind of vocabulary in small: 256 bytes, two merges, the end-of-text token last."""
    letters = {letter: id for id, letter in BYTES.backend.get_vocab().items() if letter < 256}
    vocab = {letters[byte]: byte for byte in range(256)} | {"he": 256, "Ġhe": 257, "<|endoftext|>": 258}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n", encoding="utf-8")
    return folder


def test_gpt2_files(tmp_path):
    tokenizer = Tokenizer.load(gpt2_files(tmp_path))
    assert tokenizer.encode("he he x") == [256, 257, 32, 120]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (259, 258)
    assert tokenizer.encode("<|endoftext|>", allow_special=True) == [258]
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"
    (tmp_path / "merges.txt").write_text("one_word_only\n", encoding="utf-8")
    with pytest.raises(DataError, match="do not make a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match=r"no file .*absent\.json"):
        Tokenizer.from_gpt2(tmp_path / "absent.json", tmp_path / "merges.txt")


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*absent"):
        Tokenizer.load(tmp_path / "absent")
    with pytest.raises(DataError, match="no tokenizer in folder"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json that can be read"):
        Tokenizer.load(tmp_path)


def test_an_unreachable_hub_is_named(monkeypatch):
    monkeypatch.setattr("tokenizers.Tokenizer.from_pretrained", _unreachable, raising=False)
    with pytest.raises(DataError, match=r"tokenizer of some/model from the hub .*tokenizer\.json works without"):
        Tokenizer.from_hub("some/model")


def _unreachable(name):
    raise OSError(f"no route to {name}\nand a second line")


def test_trained_tokenizers_are_kept(cache, caplog):
    first = trained_tokenizer(TEXTS, "hash", 280)
    file = cache / "tokenizers" / visible(cache / "tokenizers")[0]
    assert trained_tokenizer(_never(), "hash", 280).fingerprint == first.fingerprint
    assert trained_tokenizer(TEXTS, "hash", 281).vocab_size == 281
    assert trained_tokenizer(["other"], "other hash", 280).fingerprint != first.fingerprint
    file.write_text(file.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    assert trained_tokenizer(TEXTS, "hash", 280).fingerprint == first.fingerprint
    assert "damaged" in caplog.text
    assert trained_tokenizer(_never(), "hash", 280).fingerprint == first.fingerprint


def _never():
    raise AssertionError("what is kept is not made again")
    yield ""


def test_ids_beyond_the_model_are_refused():
    check_vocabulary(TRAINED, 300)
    check_vocabulary(TRAINED, 301)
    with pytest.raises(ConfigError, match=r"ids up to 299, .* ends at 298; set model\.vocab_size to 300"):
        check_vocabulary(TRAINED, 299)
