"""What the parity benchmark counts, on answers of our own making."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from evaluation.task import Answer, Example, Request


@pytest.fixture
def benchmark():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "harness_parity.py"
    spec = importlib.util.spec_from_file_location("harness_parity", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CHOICE = Example("0", "", (Request("q", " a"), Request("q", " bc")), 1, sizes=(1, 2))


def said(*loglikelihoods, strings=(("q", " a"), ("q", " bc")), **metrics):
    return {"none": {"arguments": list(strings), "resps": [[(x, False)] for x in loglikelihoods], **metrics}}


def test_equal_rows_count_nothing_but_rounding(benchmark):
    answers = [Answer(-3.0), Answer(-200.0)]
    found = benchmark._compare_row(said(-3.5, -201.0, acc=0), CHOICE, answers, {"acc": 0.0, "prediction": 0.0})
    assert found == {
        "requests": 2, "strings_differ": False, "predictions_differ": False, "row_metrics_differ": 0,
        "largest_difference": 1.0, "largest_relative_difference": pytest.approx(0.5 / 3.5),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "counted"),
    [
        (said(-3.0, -200.0, acc=1), {"row_metrics_differ"}),
        (said(-3.0, -2.0, acc=0), {"predictions_differ"}),
        (said(-3.0, -200.0, acc=0, strings=(("q ", "a"), ("q", " bc"))), {"strings_differ"}),
    ],
)
def test_each_difference_is_counted(benchmark, samples, counted):
    answers = [Answer(-3.0), Answer(-200.0)]
    found = benchmark._compare_row(samples, CHOICE, answers, {"acc": 0.0, "prediction": 0.0})
    assert {key for key in found if key.endswith("differ") and found[key]} == counted


@pytest.mark.parametrize(("text", "differs"), [("so 4", False), ("so 5", True)])
def test_generated_texts_are_compared_whole(benchmark, text, differs):
    example = Example("0", "", (Request("Question: q\nAnswer:", ""),), "#### 4")
    filters = {"arguments": [("Question: q\nAnswer:", {})], "resps": [["so 4"]], "exact_match": 0}
    samples = {"strict-match": filters, "flexible-extract": {**filters, "exact_match": 1}}
    values = {"exact_match": 0.0, "flexible_match": 1.0}
    found = benchmark._compare_row(samples, example, [Answer(text=text)], values)
    assert found == {"requests": 1, "strings_differ": False, "texts_differ": differs, "row_metrics_differ": 0}
