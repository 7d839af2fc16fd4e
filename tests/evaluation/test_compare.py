"""Paired differences of two reports, and refusals to compare what differs in more than the model."""

from __future__ import annotations

import pytest

from evaluation.compare import as_dicts, compare, table
from evaluation.results import Report
from evaluation.task import Example
from evaluation.tasks import BENCHMARKS
from xmoe.errors import DataError


def report(right: list[int], name: str = "winogrande", sha: str = "x", **protocol) -> Report:
    made = Report(protocol={"mode": "raw", "max_length": 64, "benchmarks": {name: {"num_fewshot": 0}}} | protocol)
    examples = [Example(str(i), "", (), 0) for i in range(len(right))]
    made.add(BENCHMARKS[name], examples, [{"acc": float(r), "prediction": 0.0} for r in right])
    made.data[name] = {"path": f"{sha}.jsonl", "sha256": sha}
    return made


def test_accuracy_is_compared_row_by_row():
    a, b = report([1, 1, 0, 0, 1, 1]), report([1, 0, 0, 1, 0, 0])
    (found,) = compare(a, b)
    assert (found.metric, found.only_a, found.only_b) == ("acc", 3, 1)
    assert found.p_value == pytest.approx(2 * (1 + 4) / 16)
    assert found.change.value == pytest.approx(-2 / 6) and found.change.ci95[0] < found.change.ci95[1]
    assert "| winogrande | acc | 0.6667 | 0.3333 | -0.3333 |" in table([found])
    assert as_dicts([found])[0]["change"]["n"] == 6


def test_pages_are_compared_in_nats_a_word_and_byte():
    def pages(*nats: float) -> Report:
        made = Report(protocol={"mode": "raw", "max_length": 64})
        values = [{"loglikelihood": -x, "words": w, "bytes": 5 * w} for x, w in zip(nats, (10.0, 30.0))]
        made.add(BENCHMARKS["wikitext"], [Example("0", "", (), ""), Example("1", "", (), "")], values)
        made.data["wikitext"] = {"path": "p", "sha256": "s"}
        return made

    word, byte = compare(pages(20.0, 60.0), pages(24.0, 72.0))
    assert (word.metric, byte.metric) == ("nats_per_word", "nats_per_byte")
    assert word.a == 2.0 and word.change.value == pytest.approx(0.4) and byte.change.value == pytest.approx(0.08)
    assert word.change.stderr == pytest.approx(0.0, abs=1e-12)  # the same 20 % on both pages


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (report([1, 0, 1]), "different rows"),
        (report([1, 0], sha="y"), "different data"),
        (report([1, 0], mode="letter"), "mode is raw in one report and letter"),
        (report([1, 0], max_length=32), "max_length is 64"),
        (report([1, 0], benchmarks={"winogrande": {"num_fewshot": 5}}), "0-shot in one report and 5-shot"),
        (report([1, 0], name="arc_easy"), "share no benchmark"),
    ],
)
def test_refuses_unlike_reports(other, message):
    with pytest.raises(DataError, match=message):
        compare(report([1, 0]), other)


def test_refuses_reports_without_rows():
    empty = report([1, 0])
    empty.rows["winogrande"] = {"name": []}
    with pytest.raises(DataError, match="no rows"):
        compare(empty, empty)


def test_reports_are_read_back(tmp_path):
    made = report([1, 0])
    made.save(tmp_path / "a.json")
    read = Report.load(tmp_path / "a.json")
    assert read.rows == made.rows and read.results["winogrande"]["acc"]["value"] == 0.5
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(DataError, match="no benchmark results"):
        Report.load(tmp_path / "b.json")
    with pytest.raises(DataError, match="no report at"):
        Report.load(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("no")
    with pytest.raises(DataError, match="not JSON"):
        Report.load(tmp_path / "d.json")
