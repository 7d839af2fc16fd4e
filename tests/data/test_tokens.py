from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from xmoe.data.tokenizer import Tokenizer
from xmoe.data.tokens import encode_documents, kept_tokens
from xmoe.errors import DataError

from .conftest import visible

DOCUMENTS = [
    ("train", "one two"),
    ("validation", "drei"),
    ("train", "é🙂"),
    ("train", "four " * 50),
    ("validation", "x"),
]
BYTES = Tokenizer.of_bytes()
PARTS = ("train", "validation")


def make(tokenizer=BYTES, key="key", documents=DOCUMENTS):
    return kept_tokens(PARTS, lambda: iter(documents), tokenizer, key)


def forbidden():
    raise AssertionError("what is kept is not made again")


def test_documents_are_joined_by_the_end_of_text():
    arrays = make()
    for part in PARTS:
        texts = [text for where, text in DOCUMENTS if where == part]
        expected = [id for text in texts for id in [*text.encode(), 256]]
        assert arrays[part].ids.tolist() == expected
        assert arrays[part].documents[:, 1].tolist() == [len(t.encode()) for t in texts]
        assert arrays[part].text_bytes == sum(len(t.encode()) for t in texts)
        assert (arrays[part].ids[arrays[part].documents[:, 0] - 1] == 256).all()
    assert arrays["train"].ids.dtype == np.uint16


def test_large_vocabularies_take_four_bytes():
    vocab = {chr(0x4E00 + i): i for i in range(200)} | {"</s>": 70000}
    wide = Tokenizer(Backend(models.BPE(vocab, [])))
    arrays = make(wide, documents=[("train", chr(0x4E00 + 7)), ("validation", "")])
    assert arrays["train"].ids.dtype == np.uint32
    assert arrays["train"].ids.tolist() == [7, 70000]
    assert arrays["validation"].ids.tolist() == [70000]


def test_arrays_are_kept_and_read_again():
    first = make()
    again = kept_tokens(PARTS, forbidden, BYTES, "key")
    for part in PARTS:
        assert isinstance(again[part].ids, np.memmap)
        assert again[part].ids.tolist() == first[part].ids.tolist()
        assert again[part].fingerprint == first[part].fingerprint
    assert first["train"].fingerprint != first["validation"].fingerprint


def test_another_text_or_tokenizer_is_another_array():
    make()
    trained = Tokenizer.train([text for _, text in DOCUMENTS], 270)
    assert len(make(trained)["train"]) < len(make()["train"])
    with pytest.raises(AssertionError, match="not made again"):
        kept_tokens(PARTS, forbidden, BYTES, "another key")
    assert len(make(key="another key", documents=DOCUMENTS[:2])["train"]) == 8


def test_an_empty_part_is_an_empty_array():
    for _ in range(2):
        arrays = make(documents=DOCUMENTS[:1], key="no validation")
        assert len(arrays["validation"]) == arrays["validation"].text_bytes == 0
        assert len(arrays["validation"].first(10)) == 0


@pytest.mark.parametrize("damage", ["short", "altered", "absent", "no table", "short table", "no about", "half about"])
def test_damaged_files_are_made_again(cache, caplog, damage):
    expected = make()["train"].ids.tolist()
    folder = cache / "tokens" / visible(cache / "tokens")[0]
    ids, table, about = folder / "train.ids", folder / "train.documents.npy", folder / "about.json"
    if damage == "short":
        ids.write_bytes(ids.read_bytes()[:-2])
    elif damage == "altered":
        ids.write_bytes(ids.read_bytes()[:-2] + b"\x07\x00")
    elif damage == "short table":
        table.write_bytes(table.read_bytes()[:-16])
    elif damage == "half about":
        about.write_text(about.read_text()[:20])
    else:
        {"absent": ids, "no table": table, "no about": about}[damage].unlink()
    assert make()["train"].ids.tolist() == expected
    assert "damaged" in caplog.text
    assert kept_tokens(PARTS, forbidden, BYTES, "key")["train"].ids.tolist() == expected
    assert visible(cache / "tokens") == [folder.name]


def test_an_error_on_the_way_leaves_nothing(cache):
    def documents():
        yield DOCUMENTS[0]
        raise DataError("file.jsonl:7: malformed")

    with pytest.raises(DataError, match=r"file\.jsonl:7"):
        kept_tokens(PARTS, documents, BYTES, "key")
    assert visible(cache / "tokens") == []


def test_ranks_that_start_together_tokenise_once(cache):
    made = []

    def documents():
        made.append(threading.get_ident())
        time.sleep(0.05)
        return iter(DOCUMENTS)

    with ThreadPoolExecutor(4) as ranks:
        arrays = list(ranks.map(lambda _: kept_tokens(PARTS, documents, BYTES, "key"), range(4)))
    assert len(made) == 1
    assert len({array["train"].fingerprint for array in arrays}) == 1


def test_the_first_documents():
    train = make()["train"]
    ends = train.documents[:, 0].tolist()
    assert len(train.first(1)) == len(train.first(ends[0])) == ends[0]
    assert len(train.first(ends[0] + 1)) == ends[1]
    assert len(train.first(10**6)) == len(train)
    assert train.first(1).text_bytes == len("one two")


def test_many_documents_come_out_in_their_order():
    texts = [f"{i} " * 1500 for i in range(400)]
    sizes = [(len(ids), size) for ids, size in encode_documents(texts, BYTES)]
    assert sizes == [(len(t) + 1, len(t)) for t in texts]


def test_documents_need_an_end_of_text_token():
    bare = Tokenizer(Backend(models.BPE({"a": 0}, [])))
    with pytest.raises(DataError, match="no end-of-text token"):
        make(bare)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XMOE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot make the cache folder .*; set XMOE_CACHE"):
        make()
