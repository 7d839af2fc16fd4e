"""The lm-evaluation-harness as referee: its own tasks on our rows, with our scorer underneath, against our tasks."""

from __future__ import annotations

import sys

import pytest

from evaluation import evaluate
from evaluation.harness import THEIR_YAML, adapter, evaluate_with_harness, harness_metrics, task_on_files
from evaluation.scoring import Scorer
from evaluation.settings import EvalConfig
from xmoe.errors import ConfigError


def test_without_the_harness_the_command_that_installs_it_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install lm-eval==0\.4\.13"):
        adapter(Scorer(model, tokenizer))
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        evaluate_with_harness(model, tokenizer, EvalConfig(benchmark=("boolq",), engine="lm-eval"))


def test_metrics_take_our_form():
    found = harness_metrics(
        {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.1, "exact_match,strict-match": 0.5,
         "exact_match_stderr,strict-match": "N/A"}, 8,
    )  # fmt: skip
    assert found["acc"]["stderr"] == 0.1 and found["acc"]["ci95"] == pytest.approx((0.054, 0.446), abs=1e-3)
    assert found["exact_match/strict-match"] == {"value": 0.5, "stderr": None, "ci95": None, "n": 8}


THEIR_METRIC = {"exact_match": "exact_match,strict-match", "flexible_match": "exact_match,flexible-extract"}


@pytest.fixture
def referee(model, tokenizer, data_dir, monkeypatch, tmp_path):
    """(name) -> the harness's numbers for one of its tasks, with our scorer answering."""
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    scorer = Scorer(model, tokenizer, max_length=512)

    def judge(name: str) -> dict:
        task = task_on_files(name, str(data_dir), max_new_tokens=12)
        found = lm_eval.evaluate(lm=adapter(scorer), task_dict={name: task}, bootstrap_iters=0, log_samples=False)
        return found["results"][name]

    return judge


@pytest.mark.parametrize("name", [*THEIR_YAML, "mmlu/virology"])
def test_our_numbers_are_the_harness_s(name, referee, model, tokenizer, data_dir):
    theirs = referee(name)
    name, _, subject = name.partition("/")
    settings = {"max_new_tokens": 12, "subjects": (subject,) if subject else ()}
    ours = evaluate(model, tokenizer, name, data_dir=str(data_dir), max_length=512, **settings).results[name]
    ours |= {"acc": ours["micro"]} if subject else {}
    compared = 0
    for metric, numbers in ours.items():
        key = THEIR_METRIC.get(metric, f"{metric},none")
        if key in theirs:
            assert numbers["value"] == pytest.approx(theirs[key], rel=1e-5), metric
            compared += 1
    assert compared == {"mmlu": 1, "winogrande": 1, "wikitext": 3}.get(name, 2)
