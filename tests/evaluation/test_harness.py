"""The lm-evaluation-harness as referee: its own tasks on our rows, with our scorer underneath, against our tasks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from evaluation import evaluate
from evaluation.harness import adapter, evaluate_with_harness, harness_metrics
from evaluation.rows import load_rows
from evaluation.scoring import Scorer
from evaluation.settings import EvalConfig
from evaluation.tasks import BENCHMARKS, HARNESS_SEED
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


SHOTS = {"gsm8k": 2, "arc_easy": 1}
YAMLS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "wikitext": "wikitext/wikitext.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}


def their_task(name: str, data_dir):
    """The harness's built-in task with our rows in place of its download."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    location = BENCHMARKS[name].location
    rows, _ = load_rows(name, location, "eval", data_dir)
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / YAMLS[name])
    split = config.get("test_split") or config["validation_split"]
    table = datasets.Dataset.from_list([{k: str(v) if k == "label" else v for k, v in r.fields.items()} for r in rows])
    shots = {}
    if name in SHOTS:
        shots["train"] = datasets.Dataset.from_list(
            [r.fields for r in load_rows(name, location, "fewshot", data_dir)[0]]
        )
    config |= {
        "dataset_path": None,
        "dataset_name": None,
        "training_split": None,
        "validation_split": None if config.get("test_split") else split,
        "fewshot_split": "train" if shots else None,
        "num_fewshot": SHOTS.get(name, 0),
        "test_split": split if config.get("test_split") else None,
        "custom_dataset": lambda **_: datasets.DatasetDict({split: table} | shots),
    }
    if name == "gsm8k":
        config["generation_kwargs"] = config["generation_kwargs"] | {"max_gen_toks": 12}
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(HARNESS_SEED)
    return task


THEIR_METRIC = {"exact_match": "exact_match,strict-match", "flexible_match": "exact_match,flexible-extract"}


@pytest.fixture
def referee(model, tokenizer, data_dir, monkeypatch, tmp_path):
    """(name) -> the harness's numbers for one of its tasks, with our scorer answering."""
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    scorer = Scorer(model, tokenizer, max_length=512)

    def judge(name: str) -> dict:
        task = their_task(name, data_dir)
        found = lm_eval.evaluate(lm=adapter(scorer), task_dict={name: task}, bootstrap_iters=0, log_samples=False)
        return found["results"][name]

    return judge


@pytest.mark.parametrize("name", list(YAMLS))
def test_our_numbers_are_the_harness_s(name, referee, model, tokenizer, data_dir):
    theirs = referee(name)
    settings = {"num_fewshot": SHOTS.get(name), "max_new_tokens": 12}
    ours = evaluate(model, tokenizer, name, data_dir=str(data_dir), max_length=512, **settings).results[name]
    compared = 0
    for metric, numbers in ours.items():
        key = THEIR_METRIC.get(metric, f"{metric},none")
        if key in theirs:
            assert numbers["value"] == pytest.approx(theirs[key], rel=1e-5), metric
            compared += 1
    assert compared == {"lambada": 2, "winogrande": 1, "wikitext": 3}.get(name, 2)
