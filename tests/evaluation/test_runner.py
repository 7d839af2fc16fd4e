"""evaluate(): selection of rows, averages of MMLU, what is kept when a run is killed, and what fails alone."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import evaluation.runner as runner
from evaluation import evaluate
from evaluation.chat_modes import end_tokens, plain_text
from evaluation.progress import Progress
from evaluation.runner import choose, load_examples
from evaluation.scoring import Scorer
from evaluation.settings import EvalConfig
from evaluation.task import Answer, Example, Request
from evaluation.tasks import BENCHMARKS
from xmoe.checkpoint.weights import Source
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import ConfigError, DataError

SCORED = ("hellaswag", "lambada", "mmlu", "winogrande", "arc_easy", "arc_challenge", "wikitext")


def example(name: str, group: str = "") -> Example:
    return Example(name, group, (Request("c", " a"), Request("c", " b")), 0)


def test_a_report_of_everything(model, tokenizer, data_dir):
    report = evaluate(model, tokenizer, SCORED, data_dir=str(data_dir), max_length=512)
    assert list(report.results) == list(SCORED) and not report.failed
    counts = {name: len(rows["name"]) for name, rows in report.rows.items()}
    assert counts == {
        "hellaswag": 2, "lambada": 2, "mmlu": 10, "winogrande": 2, "arc_easy": 2, "arc_challenge": 1, "wikitext": 2,
    }  # fmt: skip
    content = json.loads(report.to_json())
    assert content["schema_version"] == 1 and content["model"]["parameters"] == model.config.parameter_count()
    for metrics in content["results"].values():
        for numbers in metrics.values():
            assert set(numbers) == {"value", "stderr", "ci95", "n"}
    assert content["data"]["mmlu"]["rows"] == 10 and len(content["data"]["mmlu"]["sha256"]) == 64
    assert content["data"]["mmlu"]["fewshot"]["rows"] == 15
    assert content["protocol"]["benchmarks"]["mmlu"]["num_fewshot"] == 5
    table = report.table()
    assert "| HellaSwag | acc_norm |" in table and "| MMLU | macro |" in table and "0.25" in table


def test_batch_1_equals_batch_8(model, tokenizer, data_dir):
    one, eight = (evaluate(model, tokenizer, SCORED, data_dir=str(data_dir), batch_size=b) for b in (1, 8))
    for name in SCORED:
        for column, values in one.rows[name].items():
            if column != "loglikelihood":
                assert values == eight.rows[name][column], (name, column)
            else:
                assert values == pytest.approx(eight.rows[name][column], abs=1e-4)


def test_mmlu_averages_and_adding_subjects_one_at_a_time(model, tokenizer, data_dir):
    def run(*subjects: str):
        return evaluate(model, tokenizer, "mmlu", data_dir=str(data_dir), num_fewshot=1, subjects=subjects)

    whole = run().results["mmlu"]
    parts = {s: run(s).results["mmlu"]["micro"] for s in ("anatomy", "virology", "us_foreign_policy")}
    for subject, alone in parts.items():
        assert whole[f"subject/{subject}"] == alone
    sizes = {s: p["n"] for s, p in parts.items()}
    assert sizes == {"anatomy": 3, "virology": 5, "us_foreign_policy": 2}
    weighted = sum(p["value"] * p["n"] for p in parts.values()) / 10
    assert whole["micro"]["value"] == pytest.approx(weighted)
    assert whole["macro"]["value"] == pytest.approx(sum(p["value"] for p in parts.values()) / 3)
    assert whole["category/stem"]["n"] == 3 and whole["category/other"]["n"] == 5
    assert "category/humanities" not in whole


def test_a_limit_takes_a_seeded_choice_of_every_group():
    examples = [example(f"{g}/{i}", g) for g in ("a", "b") for i in range(20)]
    chosen = choose(examples, 5, seed=0, first=False)
    assert chosen == choose(examples, 5, seed=0, first=False) == sorted(chosen)
    assert [sum(examples[i].group == g for i in chosen) for g in "ab"] == [5, 5]
    assert chosen != choose(examples, 5, seed=1, first=False)
    only_b = choose(examples[20:], 5, seed=0, first=False)
    assert [examples[20:][i].name for i in only_b] == [examples[i].name for i in chosen if examples[i].group == "b"]
    assert choose(examples, 2, seed=0, first=True) == [0, 1, 20, 21]
    assert choose(examples, None, 0, False) == choose(examples, 99, 0, False) == list(range(40))


def test_chosen_rows_are_in_the_report(data_dir):
    config = EvalConfig(benchmark=("mmlu",), data_dir=str(data_dir), limit=2, num_fewshot=0)
    examples, data = load_examples(BENCHMARKS["mmlu"], config)
    assert data["indices"] == [e.name for e in examples] and len(examples) == 6


def test_a_killed_run_continues_and_never_with_another_model(model, tokenizer, data_dir, tmp_path, monkeypatch, capsys):
    path = tmp_path / "report.json.progress.jsonl"
    whole = evaluate(model, tokenizer, "mmlu", data_dir=str(data_dir))
    real = Scorer.score_tokens

    def killed(self, requests):
        for count, found in enumerate(real(self, requests)):
            if count == 17:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Scorer, "score_tokens", killed)
    with pytest.raises(KeyboardInterrupt, match="answers are in"):
        evaluate(model, tokenizer, "mmlu", data_dir=str(data_dir), progress=path)
    monkeypatch.setattr(Scorer, "score_tokens", real)
    kept = len(path.read_text().splitlines()) - 1
    assert 1 <= kept <= 4
    path.write_text(path.read_text() + '{"key": "torn')  # as a kill leaves it
    resumed = evaluate(model, tokenizer, "mmlu", data_dir=str(data_dir), progress=path)
    assert f"continuing: {kept} examples" in capsys.readouterr().err
    assert resumed.results == whole.results and not path.exists()
    assert resumed.protocol["benchmarks"]["mmlu"]["resumed_examples"] == kept

    monkeypatch.setattr(Scorer, "score_tokens", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, "mmlu", data_dir=str(data_dir), progress=path)
    monkeypatch.setattr(Scorer, "score_tokens", real)
    with torch.no_grad():
        model.blocks[0].moe.experts.down[0, 0, 0] += 1
    other = evaluate(model, tokenizer, "mmlu", data_dir=str(data_dir), progress=path)
    assert "starting over" in capsys.readouterr().err
    assert other.protocol["benchmarks"]["mmlu"]["resumed_examples"] == 0


def test_progress_knows_the_bytes_that_were_sent(tmp_path):
    kept = Progress(tmp_path / "p.jsonl", {"model": "m"})
    kept.add("mmlu", example("1"), [Answer(-1.5, True), Answer(float("-inf"))])
    kept.close(remove=False)
    again = Progress(tmp_path / "p.jsonl", {"model": "m"})
    assert again.answers("mmlu", example("1")) == [Answer(-1.5, True, ""), Answer(float("-inf"), False, "")]
    changed = dataclasses.replace(example("1"), requests=(Request("c ", " a"), Request("c", " b")))
    assert again.answers("mmlu", changed) is None and again.answers("arc_easy", example("1")) is None
    again.close(remove=True)
    assert not (tmp_path / "p.jsonl").exists()


def test_a_benchmark_that_fails_leaves_the_others(model, tokenizer, data_dir, monkeypatch, capsys):
    (data_dir / "lambada" / "lambada_test.jsonl").write_text('{"text": "one two"}\nbroken\n')

    def broken(benchmark, *rest):
        if benchmark.name == "winogrande":
            raise RuntimeError("out of luck")
        return real(benchmark, *rest)

    real = runner.answer
    monkeypatch.setattr(runner, "answer", broken)
    report = evaluate(model, tokenizer, ("lambada", "winogrande", "arc_easy"), data_dir=str(data_dir))
    assert list(report.results) == ["arc_easy"]
    assert "lambada_test.jsonl:2: not JSON" in report.failed["lambada"] and report.failed["winogrande"] == "out of luck"
    assert "out of luck" in capsys.readouterr().err
    assert "failed: out of luck" in report.table()
    with pytest.raises(DataError, match=r"lambada_test\.jsonl:2"):
        evaluate(model, tokenizer, "lambada", data_dir=str(data_dir))


def test_gsm8k_is_generated_and_stops_where_it_should(model, tokenizer, data_dir, monkeypatch):
    seen = []

    # a special token is no text, and what stands behind the stop string was never asked for
    ids = [*tokenizer.encode(" 4\n#### 4"), tokenizer.special("<|call|>"), *tokenizer.encode("\n\nQuestion: 7")]

    def generate(model, tokenizer, prompts, **settings):
        seen.append((prompts, settings))
        return [SimpleNamespace(ids=ids) for _ in prompts]

    monkeypatch.setattr("evaluation.chat_modes.generate", generate)
    said = []
    report = evaluate(
        model, tokenizer, "gsm8k", data_dir=str(data_dir), num_fewshot=1, max_new_tokens=9,
        on_example=lambda benchmark, example, answers, values: said.extend(a.text for a in answers),
    )  # fmt: skip
    assert said == [" 4\n#### 4\n\n"]
    assert report.results["gsm8k"]["exact_match"]["value"] == 1.0
    ((prompts, settings),) = seen
    assert tokenizer.decode(prompts[0]).endswith("#### 5\n\nQuestion: Two and two?\nAnswer:")
    assert settings["temperature"] == 0.0 and settings["max_new_tokens"] == 9 and "Question:" in settings["stop"]
    assert settings["stop_tokens"] == {tokenizer.eos_id}


def test_generation_ends_where_the_checkpoint_says_too(model, tokenizer, tmp_path):
    scorer = Scorer(model, tokenizer)
    model.source = Source(tmp_path, {"eos_token_id": 7})
    assert end_tokens(scorer) == {tokenizer.eos_id, 7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert end_tokens(scorer) == {tokenizer.eos_id, 5, 9}


def test_half_a_character_at_the_end_shows(tokenizer):
    ids = tokenizer.encode("so 4€")
    assert plain_text(tokenizer, ids, ("Question:",)) == "so 4€"
    assert plain_text(tokenizer, ids[:-1], ("Question:", "x")) == "so 4\ufffd"
    assert plain_text(tokenizer, tokenizer.encode("a Q b STOP c Q"), ("STOP", "Q")) == "a "


def test_gsm8k_for_real(model, tokenizer, data_dir):
    report = evaluate(model, tokenizer, "gsm8k", data_dir=str(data_dir), num_fewshot=0, max_new_tokens=5)
    assert report.results["gsm8k"]["exact_match"]["n"] == 1


def test_wrong_tokenizer_and_no_tokenizer(model, data_dir):
    class Larger:
        vocab_size = model.config.vocab_size + 1

    with pytest.raises(ConfigError, match="the tokenizer has ids up to"):
        evaluate(model, Larger(), "lambada", data_dir=str(data_dir))
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        evaluate(model, None, "lambada", data_dir=str(data_dir))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"benchmark": ("mlu",)}, "did you mean mmlu"),
        ({"benchmark": ("mmlu",), "subjects": ("anatmy",)}, "did you mean anatomy"),
        ({"benchmark": ("lambada",), "num_fewshot": 3}, "lambada is zero-shot"),
        ({"benchmark": ("lambada",), "mode": "letter"}, "only mode is raw"),
        ({"mode": "chat"}, "choose raw, letter, generate"),
        ({"limit": 0}, "expected 1 or more, or -1"),
        ({"temperature": -1.0}, "argmax"),
        ({"benchmark": ()}, "no benchmark"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvalConfig(**settings)


def test_what_all_means():
    everything = [b.name for b in EvalConfig().chosen()]
    assert everything == list(BENCHMARKS)
    assert [b.name for b in EvalConfig(mode="letter").chosen()] == [
        "hellaswag", "mmlu", "winogrande", "arc_easy", "arc_challenge", "gsm8k",
    ]  # fmt: skip
    shots = EvalConfig(num_fewshot=2)
    assert [shots.shots(BENCHMARKS[n]) for n in ("mmlu", "lambada", "arc_easy")] == [2, 0, 2]
    assert EvalConfig().shots(BENCHMARKS["mmlu"]) == 5 and EvalConfig(limit=-1).rows_wanted() is None


def test_routing_can_be_watched(model, tokenizer, data_dir):
    seen = []
    evaluate(
        model,
        tokenizer,
        "hellaswag",
        data_dir=str(data_dir),
        observe=lambda layer, routing: seen.append(routing.output_norm),
    )
    assert seen and all(norm is not None for norm in seen)


def test_unknown_field_of_a_tokenizer_is_not_needed(model, data_dir):
    """A tokenizer trained on other text, but small enough, is accepted: ids are all that count."""
    report = evaluate(model, Tokenizer.of_bytes(), "winogrande", data_dir=str(data_dir))
    assert report.results["winogrande"]["acc"]["n"] == 2
