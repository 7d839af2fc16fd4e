"""Finding and reading local files; what is said when they are missing or malformed."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest

from evaluation.rows import Location, load_rows
from evaluation.tasks import BENCHMARKS
from xmoe.errors import DataError

PLAIN = Location(("thing",), ("org/thing", None), {"eval": ("test", "validation"), "fewshot": ("train",)})


def write(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def test_the_split_is_read_from_the_name_and_test_comes_before_validation(tmp_path):
    write(tmp_path / "thing" / "validation.jsonl", [{"a": 1}])
    rows, source = load_rows("thing", PLAIN, "eval", tmp_path)
    assert [r.fields for r in rows] == [{"a": 1}]
    write(tmp_path / "thing" / "data-test.jsonl", [{"a": 2}, {"a": 3}])
    rows, source = load_rows("thing", PLAIN, "eval", tmp_path)
    assert [r.fields["a"] for r in rows] == [2, 3]
    assert rows[1].where.endswith("data-test.jsonl:2")
    file = tmp_path / "thing" / "data-test.jsonl"
    assert source.as_dict() == {"path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "rows": 2}


def test_parquet_shards_are_read_in_order(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "thing" / "main"
    folder.mkdir(parents=True)
    for shard, values in ((1, [["c"]]), (0, [["a"], ["b", "bb"]])):
        table = pyarrow.table({"texts": values})
        parquet.write_table(table, folder / f"test-0000{shard}-of-00002.parquet")
    rows, source = load_rows("thing", PLAIN, "eval", tmp_path)
    assert [r.texts("texts") for r in rows] == [["a"], ["b", "bb"], ["c"]]
    assert source.rows == 3
    (folder / "test-00000-of-00002.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a Parquet file"):
        load_rows("thing", PLAIN, "eval", tmp_path)


def test_mmlu_folders_of_the_hub_give_the_subject(tmp_path):
    row = {"question": "q", "choices": list("abcd"), "answer": 1}
    write(tmp_path / "mmlu" / "anatomy" / "test-00000-of-00001.jsonl", [row])
    write(tmp_path / "mmlu" / "virology_test.jsonl", [row])
    rows, _ = load_rows("mmlu", BENCHMARKS["mmlu"].location, "eval", tmp_path)
    assert sorted(r.part for r in rows) == ["anatomy", "virology"]


def test_csv_with_and_without_a_header(tmp_path):
    location = BENCHMARKS["mmlu"].location
    folder = tmp_path / "mmlu" / "test"
    folder.mkdir(parents=True)
    (folder / "anatomy_test.csv").write_text('"two\nlines",a,b,c,d,B\nq2,a,b,c,d,A\n')
    (folder / "virology_test.csv").write_text("question,A,B,C,D,answer\nq3,a,b,c,d,D\n")
    rows, _ = load_rows("mmlu", location, "eval", tmp_path)
    assert [(r.fields["question"], r.where.rsplit(":", 1)[1]) for r in rows] == [
        ("two\nlines", "1"),
        ("q2", "3"),
        ("q3", "2"),
    ]
    (folder / "anatomy_test.csv").write_text("q,a,b,c,d,B\nq2,a,b\n")
    with pytest.raises(DataError, match=r"anatomy_test.csv:2: 3 columns; expected 6"):
        load_rows("mmlu", location, "eval", tmp_path)


def test_missing_data_names_the_path_that_would_help(tmp_path):
    with pytest.raises(DataError, match="not a folder; expected one that holds thing/"):
        load_rows("thing", PLAIN, "eval", tmp_path / "nowhere")
    with pytest.raises(DataError, match=f"expected the folder {tmp_path / 'thing'}"):
        load_rows("thing", PLAIN, "eval", tmp_path)
    write(tmp_path / "thing" / "train.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match=r"test\.jsonl"):
        load_rows("thing", PLAIN, "eval", tmp_path)
    write(tmp_path / "thing" / "test.jsonl", [])
    with pytest.raises(DataError, match="no rows"):
        load_rows("thing", PLAIN, "eval", tmp_path)


def test_without_files_and_network_the_command_that_helps_is_named(monkeypatch):
    class Offline:
        @staticmethod
        def load_dataset(*args, **kwargs):
            raise ConnectionError("offline mode is enabled\nmore")

    monkeypatch.setitem(sys.modules, "datasets", Offline)
    with pytest.raises(DataError, match=r"org/thing \(test\).*offline mode is enabled.*--data-dir DIR") as caught:
        load_rows("thing", PLAIN, "eval", None)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_rows("thing", PLAIN, "eval", None)


def test_rows_through_the_datasets_library(monkeypatch):
    class Library:
        @staticmethod
        def load_dataset(repository, configuration, split):
            assert (repository, configuration, split) == ("org/thing", None, "train")
            return [{"a": 1}, {"a": 2}]

    monkeypatch.setitem(sys.modules, "datasets", Library)
    rows, source = load_rows("thing", PLAIN, "fewshot", None)
    assert [r.fields["a"] for r in rows] == [1, 2] and source.path == "org/thing:train" and len(source.sha256) == 64


@pytest.mark.parametrize(
    ("line", "message"),
    [("{not json", "test.jsonl:2: not JSON"), ("[1]", "test.jsonl:2: .1. is no row; expected a JSON object")],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "thing" / "test.jsonl"
    path.parent.mkdir()
    path.write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        load_rows("thing", PLAIN, "eval", tmp_path)


def test_the_same_rows_in_two_formats_are_ambiguous(tmp_path):
    write(tmp_path / "thing" / "test.jsonl", [{"a": 1}])
    (tmp_path / "thing" / "test.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match="leave one of them"):
        load_rows("thing", PLAIN, "eval", tmp_path)
