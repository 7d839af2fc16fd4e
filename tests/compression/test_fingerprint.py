"""Published summaries: a small folder in their format, ranked and mixed by hand; traces summed token by token."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xmoe.compression.fingerprint import (
    Trace,
    coverage,
    import_fingerprint,
    interleave,
    load_ranking,
    overlap,
    ranking_of,
    report,
    summarize,
    trace_text,
)
from xmoe.compression.plan import plan_pruning
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import DataError

E, LAYERS = 6, 2


@pytest.fixture
def published(tmp_path):
    """Three summaries of two categories; each leaves some experts out, one has no answer."""
    generator = torch.Generator().manual_seed(2)
    index = {"quiz": {"law": {}, "art": {}}}
    truth = {}
    for category, group, samples, parts in (
        ("law", "True_False", 3, 2),
        ("law", "False_True", 2, 1),
        ("art", "True_False", 7, 2),
    ):
        summary = {"sample_count": samples, "num_think_tokens": 9.5}
        for name in ("think_expert_analytics", "answer_expert_analytics")[:parts]:
            table = torch.rand(LAYERS, E, generator=generator, dtype=torch.float64)
            table[torch.rand(LAYERS, E, generator=generator) < 0.2] = 0.0
            truth[category, group, name] = (samples, table)
            summary[name] = {
                f"layer_{i}": {
                    str(e): {"prob_density": 0.1, "count_frequency": float(f)} for e, f in enumerate(row) if f
                }
                for i, row in enumerate(table)
            }
        path = f"quiz/{category}/{group}.json"
        (tmp_path / "quiz" / category).mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(summary))
        index["quiz"][category][group] = {"sample_count": samples, "summary_file_path": path}
    (tmp_path / "map.json").write_text(json.dumps(index))
    return tmp_path, truth


def test_scores_follow_the_published_formula(published):
    folder, truth = published
    for categories, wanted in ((["quiz/law"], "law"), (None, "")):
        stats = import_fingerprint(folder, categories, num_experts=E, num_experts_per_tok=2)
        parts = {}
        for (category, group, _), value in truth.items():
            if wanted in category:
                parts.setdefault((category, group), []).append(value)
        for layer in range(LAYERS):
            for e in range(E):
                above = math.fsum(
                    w * 0.5 * sum(float(t[layer, e]) for w, t in p) for p in parts.values() for w in [p[0][0]]
                )
                below = math.fsum(p[0][0] * len(p) for p in parts.values())
                score = float(stats.moments["count"][layer, e]) / stats.tokens / 2
                assert score == pytest.approx(above / below, rel=1e-12)


def test_imported_statistics_add_up_and_make_plans(published):
    folder, _ = published
    law, art = (import_fingerprint(folder, [f"quiz/{c}"], num_experts=E, num_experts_per_tok=2) for c in ("law", "art"))
    both = import_fingerprint(folder, num_experts=E, num_experts_per_tok=2)
    torch.testing.assert_close((law + art).moments["count"], both.moments["count"])
    assert (law + art).tokens == both.tokens
    plan = plan_pruning(law, "frequency", 3)
    assert [list(k) for k in plan.kept] == [sorted(r[:3]) for r in ranking_of(law)]
    with pytest.raises(DataError, match="hold only count; reap needs more"):
        plan_pruning(law, "reap", 3)


@given(st.permutations(range(7)), st.permutations(range(7)))
def test_interleaving_takes_turns_and_repeats_nobody(a, b):
    (mixed,) = interleave([a], [b])
    assert sorted(mixed) == list(range(7))
    assert mixed[0] == a[0] and (b[0] == a[0] or mixed[1] == b[0])
    assert overlap([mixed], [a], 7) == 1.0


def test_overlap_and_coverage():
    assert overlap([[0, 1, 2, 3], [0, 1, 2, 3]], [[1, 0, 3, 2], [2, 3, 0, 1]], 2) == 0.5
    stats = import_fingerprint_like([[4.0, 1.0, 3.0, 2.0]])
    assert coverage(stats, [[0, 2, 3, 1]], 2) == pytest.approx(0.7)


def import_fingerprint_like(rows):
    from xmoe.compression.routing import RoutingStats

    count = torch.tensor(rows, dtype=torch.float64)
    return RoutingStats({"count": count}, (count.shape[1],) * len(rows), 2, tokens=1.0, domain="x")


def test_a_trace_is_summed_by_the_published_spans():
    indices = torch.tensor([[[0, 1]], [[1, 2]], [[2, 1]], [[3, 0]], [[0, 1]]])
    weights = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]], [[1.0, 0.0]], [[0.5, 0.5]], [[0.25, 0.75]]])
    # tokens 10 .. 14 have routing; the role tag stands at 8 and 9; the thinking ends at 12
    think, answer = summarize(Trace(indices, weights, first=10, length=16, answer=12), 4)
    assert think.tokens == 4 and answer.tokens == 3
    assert (think.count_frequency * 4).tolist() == [[1, 2, 1, 0]]
    assert (think.prob_density * 4).tolist() == [[0.75, 0.75, 0.5, 0.0]]
    assert (answer.count_frequency * 3).tolist() == [[2, 1, 0, 1]]
    whole, none = summarize(Trace(indices, weights, first=10, length=16, answer=-1), 4)
    assert none is None and whole.tokens == 8 and float(whole.count_frequency.sum() * 8) == 10


def test_report_holds_every_pair():
    a, b = import_fingerprint_like([[4.0, 1.0, 3.0, 2.0]]), import_fingerprint_like([[1.0, 4.0, 2.0, 3.0]])
    with pytest.raises(DataError, match="same domain"):
        report([a, b])
    b.domain = "y"
    content = report([a, b], tops=(2, 9))
    assert json.loads(json.dumps(content)) == content
    assert content["rankings"] == {"x": [[0, 2, 3, 1]], "y": [[1, 3, 2, 0]]}
    assert list(content["overlap"]) == ["2"] and content["overlap"]["2"]["x"] == {"x": 1.0, "y": 0.0}
    assert content["coverage"]["2"]["x"]["y"] == pytest.approx(0.3)
    assert content["load"]["x"] == [[0.4, 0.1, 0.3, 0.2]]
    with pytest.raises(DataError, match="4 experts, fewer than any size"):
        report([a], tops=(5,))
    with pytest.raises(DataError, match="different models"):
        report([a, dataclasses.replace(import_fingerprint_like([[1.0, 2.0]]), domain="z")])


def test_a_text_is_traced_token_by_token(model):
    tokenizer = Tokenizer.of_bytes()
    with torch.no_grad():
        routing = model.features(torch.tensor([tokenizer.encode("+-*")])).routing
    trace = trace_text(model, tokenizer, "+-*")
    assert trace["tokens"] == ["+", "-", "*"]
    for layer, decided in enumerate(routing):
        assert [row[layer] for row in trace["indices"]] == decided.indices.tolist()
        assert [row[layer] for row in trace["weights"]] == decided.weights.tolist()
    with pytest.raises(DataError, match="no text to trace"):
        trace_text(model, tokenizer, "")


def test_mistakes_are_one_clear_line(published, tmp_path):
    folder, _ = published
    with pytest.raises(DataError, match=r"has no 'quiz/maths'; it has quiz/art, quiz/law"):
        import_fingerprint(folder, ["quiz/maths"])
    with pytest.raises(DataError, match="no fingerprint summary of 3 experts"):
        import_fingerprint(folder, num_experts=3)
    with pytest.raises(DataError, match=r"cannot read .*map\.json"):
        import_fingerprint(tmp_path / "nowhere")
    (folder / "quiz" / "law" / "True_False.json").write_text("{}")
    with pytest.raises(DataError, match="has no sample_count"):
        import_fingerprint(folder, num_experts=E)
    (tmp_path / "r.json").write_text('{"layer_0": [2, 0, 1]}')
    assert load_ranking(tmp_path / "r.json") == [[2, 0, 1]]
    (tmp_path / "r.json").write_text('{"layers": [2, 0, 1]}')
    with pytest.raises(DataError, match="is no ranking"):
        load_ranking(tmp_path / "r.json")
