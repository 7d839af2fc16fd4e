from __future__ import annotations

import json
import sys
import sysconfig
import types
from pathlib import Path

import pytest

from xmoe.data.sources import Reading, keep_hub_documents, load_documents, locate
from xmoe.errors import DataError

from .conftest import prose, visible


def rows(path, *objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects), encoding="utf-8")
    return path


def test_the_standard_library_is_everywhere():
    (place,) = locate("python")
    root = Path(sysconfig.get_path("stdlib"))
    names = {file.relative_to(root).as_posix() for file in place.files}
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics.py"} <= names
    assert not [n for n in names if {"test", "site-packages", "lib2to3", "idle_test"} & set(n.split("/"))]
    assert list(place.files) == list(locate("python")[0].files) != sorted(place.files)
    assert place.size() > 3_000_000


def test_the_first_part_of_the_standard_library():
    reading = Reading(max_bytes=300_000)
    documents = list(load_documents("python", reading))
    sizes = [len(d.encode()) for d in documents]
    assert sum(sizes) >= 300_000 > sum(sizes[:-1])
    assert max(sizes) <= 256 * 1024
    assert any("import" in d for d in documents)


def test_no_standard_library_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no source text in this Python's library"):
        locate("python")


def test_a_file_in_another_encoding_is_left_out_of_the_library(monkeypatch, tmp_path):
    (tmp_path / "old.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    (tmp_path / "new.py").write_text("x = 'é'\n", encoding="utf-8")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text("no\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(load_documents("python")) == ["x = 'é'\n"]


def test_a_lone_file_is_cut_into_pieces(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(prose(100), encoding="utf-8")
    documents = list(load_documents(str(file)))
    assert len(documents) > 3
    assert "".join(documents) == prose(100)
    assert list(load_documents(file, Reading(separator="file"))) == [prose(100)]


def test_a_folder_is_read_in_the_order_of_names(text_folder):
    (text_folder / ".hidden.txt").write_text("no")
    (text_folder / "picture.png").write_bytes(b"\xff\x00")
    (text_folder / "blank.txt").write_text(" \n\n")
    rows(text_folder / "z.jsonl", {"text": "row one"}, {"text": "row two"})
    documents = list(load_documents(text_folder))
    files = sorted(text_folder.rglob("[0-9]*.txt"))
    assert documents == [f.read_text(encoding="utf-8") for f in files] + ["row one", "row two"]


def test_line_ends_and_marks_of_byte_order(tmp_path):
    file = tmp_path / "windows.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    assert list(load_documents(file)) == ["one\r\n\r\ntwo\r\n"]


def test_several_sources_follow_one_another(tmp_path):
    (tmp_path / "b.txt").write_text("bee\n")
    (tmp_path / "a.txt").write_text("ay\n")
    (tmp_path / "c,d.txt").write_text("comma\n")
    assert list(load_documents(f"{tmp_path}/b.txt,{tmp_path}/a.txt")) == ["bee\n", "ay\n"]
    assert list(load_documents(f"{tmp_path}/c,d.txt")) == ["comma\n"]


def test_max_bytes_counts_utf8_and_cuts_no_document(text_folder):
    everything = list(load_documents(text_folder))
    for limit in (1, 2000, 10**9):
        some = list(load_documents(text_folder, Reading(max_bytes=limit)))
        assert some == everything[: len(some)]
        sizes = [len(d.encode()) for d in some]
        assert sum(sizes[:-1]) < limit
        assert sum(sizes) >= limit or some == everything


def test_fields_of_rows(tmp_path):
    file = rows(tmp_path / "a.jsonl", {"question": "2+2?", "answer": "4", "id": 1})
    assert list(load_documents(file)) == ["2+2?\n4"]
    assert list(load_documents(file, Reading(text_field="answer"))) == ["4"]
    assert list(load_documents(file, Reading(text_field="answer+question"))) == ["4\n2+2?"]
    file = rows(tmp_path / "b.jsonl", {"text": "t", "question": "q", "answer": "a"})
    assert list(load_documents(file)) == ["t"]
    file = rows(tmp_path / "c.jsonl", {"instruction": "do", "input": "", "output": "done"})
    assert list(load_documents(file)) == ["do\ndone"]


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ('{"text": "unfinished', None, r"data\.jsonl:3: malformed JSON \(.*column"),
        ('["a list"]', None, r"data\.jsonl:3: expected an object"),
        ('{"body": "x"}', None, r"data\.jsonl:3: no field that is known to hold text \(fields: body\); set data\.text"),
        ('{"text": "x"}', "body", r"data\.jsonl:1: no field 'body' \(fields: text\); set data\.text_field"),
        ('{"text": 5}', None, r"data\.jsonl:3: field 'text' is not text but int"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_line(tmp_path, line, field, message):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        list(load_documents(file, Reading(text_field=field)))
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "old.txt"
    file.write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"old\.txt is not UTF-8 text \(byte 0xe9 after line 0\)"):
        list(load_documents(file))


@pytest.mark.parametrize("name", ["absent.txt", "absent", "./some/file", "a/b/c", "org/absent.txt", "~/no/such/place"])
def test_what_is_not_there_is_named_at_once(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"no file or folder '{name}'; expected a text file"):
        load_documents(name)


def test_a_missing_file_in_a_folder_that_exists_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no file or folder 'data/absent'"):
        locate("data/absent")
    assert locate("org/absent")[0].on_hub


def test_empty_sources_are_named(tmp_path):
    with pytest.raises(DataError, match=r"folder .* holds no texts; looked for files ending in \.txt"):
        load_documents(tmp_path)
    for content in ("", " \n\n"):
        (tmp_path / "empty.txt").write_text(content)
        with pytest.raises(DataError, match=r"empty\.txt holds no text"):
            list(load_documents(tmp_path / "empty.txt"))


def test_the_content_decides_the_hash(text_folder, tmp_path):
    (before,) = locate(text_folder)
    text_folder.rename(tmp_path / "renamed")
    (after,) = locate(tmp_path / "renamed")
    assert before.name != after.name
    hash = after.content_hash()
    (after.files[4]).write_text("changed")
    assert after.content_hash() != hash
    (tmp_path / "x.txt").write_text('{"text": "a"}\n')
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    assert locate(tmp_path / "x.txt")[0].content_hash() != locate(tmp_path / "x.jsonl")[0].content_hash()


# --- the hub, played by a module of our own ---------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` module that serves rows from here and notes what it was asked for."""
    module = types.ModuleType("datasets")
    module.rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]
    module.parts = ["main", "socratic"]
    module.asked = []

    def load_dataset(name, subset, *, split, streaming):
        assert streaming
        module.asked.append((name, subset, split))
        yield from module.rows

    module.load_dataset = load_dataset
    module.get_dataset_config_names = lambda name: module.parts
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_rows_are_streamed(hub):
    documents = load_documents("openai/gsm8k", Reading(split="test"))
    assert hub.asked == []
    assert next(documents) == "q0\na0"
    assert hub.asked == [("openai/gsm8k", "main", "test")]


@pytest.mark.parametrize(
    ("parts", "subset", "chosen"),
    [(["default", "other"], None, "default"), (["only"], None, "only"), (["a", "b"], "b", "b")],
)
def test_the_part_of_a_hub_dataset(hub, parts, subset, chosen):
    hub.parts = parts
    assert len(list(load_documents("org/name", Reading(subset=subset)))) == 5
    assert hub.asked == [("org/name", chosen, "train")]


def test_a_part_must_be_named_where_none_is_the_whole(hub):
    hub.parts = ["de", "fr"]
    with pytest.raises(DataError, match=r"org/name has several parts; set data\.subset to one of de, fr"):
        list(load_documents("org/name"))


def test_hub_documents_are_kept(hub, cache):
    (place,) = locate("org/name")
    kept = keep_hub_documents(place, Reading())
    assert not kept.on_hub
    documents = list(load_documents([kept]))
    assert documents == [f"q{i}\na{i}" for i in range(5)]
    hub.rows = []
    assert list(load_documents([keep_hub_documents(place, Reading())])) == documents
    assert len(hub.asked) == 1
    hub.rows = [{"text": " = Title = \n"}, {"text": "line\n"}]
    other = keep_hub_documents(place, Reading(split="test"))
    assert list(load_documents([other])) == [" = Title = \nline\n"]
    assert list(load_documents([other], Reading(text_field="absent", separator="e"))) == [" = Title = \nline\n"]


def test_an_interrupted_fetch_leaves_nothing(hub, cache):
    def broken(*args, **kwargs):
        yield {"text": "one"}
        raise ConnectionError("the line is dead\nand more")

    hub.load_dataset = broken
    with pytest.raises(DataError, match=r"org/name \(the line is dead\); without a network use a local"):
        keep_hub_documents(locate("org/name")[0], Reading())
    assert visible(cache / "texts") == []


def test_an_unreachable_hub_and_a_missing_library_are_said(hub, monkeypatch):
    def unreachable(name):
        raise ConnectionError("no route")

    hub.get_dataset_config_names = unreachable
    with pytest.raises(DataError, match=r"cannot read the hub dataset org/name \(no route\)"):
        list(load_documents("org/name"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the datasets library: pip install 'xmoe\[hub\]'"):
        list(load_documents("org/name"))
