"""Who stays under every criterion and budget, the file in between, and every way in which it can be wrong."""

from __future__ import annotations

import json

import pytest

from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.weights import load
from xmoe.compression.criteria import ACTIVATION, CRITERIA, ranked
from xmoe.compression.layerwise import StoredModel
from xmoe.compression.plan import PrunePlan, plan_pruning, scores_of
from xmoe.compression.routing import RoutingStats, record_routing
from xmoe.errors import ConfigError, DataError


@pytest.fixture
def stats(model, tokens):
    return record_routing(model, [tokens], domain="law", sample=40)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c not in ("ranking", "list")])
def test_each_criterion_keeps_its_best(stats, model, criterion):
    plan = plan_pruning(stats, criterion, 4, model=model, guard=False)
    assert plan.counts == (4, 4, 4)
    for kept, scores in zip(plan.kept, scores_of(plan)):
        assert list(kept) == sorted(ranked(scores)[:4])
    assert plan.data["domain"] == "law" and plan.model == stats.model and plan.criterion == criterion


def test_a_list_of_experts_needs_nothing_but_the_model(model):
    plan = plan_pruning(None, "list", remove=[(0, 1), (0, 5), (2, 0)], model=model)
    assert plan.kept == ((0, 2, 3, 4, 6), tuple(range(7)), (1, 2, 3, 4, 5, 6)) and plan.criterion == "list"
    with pytest.raises(ConfigError, match="leave out keep"):
        plan_pruning(None, "list", 4, remove=[(0, 1)], model=model)
    with pytest.raises(ConfigError, match="nothing says how many"):
        plan_pruning(None, "list", model=model)


@pytest.mark.parametrize("layout", ["native", "hf-bf16"])
@pytest.mark.parametrize("criterion", ["weight_norm", "aimer", "reconstruction", "random"])
def test_a_checkpoint_on_disk_is_judged_as_its_model_is(checkpoint, tokens, criterion, layout):
    source = checkpoint(layout)
    model, _ = load(source)
    stats = record_routing(model, [tokens], sample=30)
    plans = [
        plan_pruning(stats, criterion, 4, budget=budget, model=one)
        for budget in ("uniform", "sensitivity")
        for one in (model, StoredModel(Checkpoint(source)))
    ]
    for a, b in (plans[:2], plans[2:]):
        assert (a.kept, a.scores, a.model) == (b.kept, b.scores, b.model)


@pytest.mark.parametrize("budget", ["global", "sensitivity"])
def test_other_budgets_keep_as_many_in_all(stats, model, budget):
    plan = plan_pruning(stats, "reap-sum", 4, budget=budget, model=model)
    assert sum(plan.counts) == 12 and min(plan.counts) >= 3
    for layer, (kept, scores) in enumerate(zip(plan.kept, scores_of(plan))):
        free = [e for e in ranked(scores) if (layer, e) not in plan.protected]
        sure = {e for i, e in plan.protected if i == layer}
        assert set(kept) == sure | set(free[: len(kept) - len(sure)])


def test_protection_overrides_rank_and_removal_too(stats):
    worst = ranked(scores_of(plan_pruning(stats, "reap", 3))[1])[-1]
    best = ranked(scores_of(plan_pruning(stats, "reap", 3))[2])[0]
    plan = plan_pruning(stats, "reap", 3, protect=[(1, worst)], remove=[(2, best)])
    assert worst in plan.kept[1] and best not in plan.kept[2] and plan.counts == (3, 3, 3)
    assert (1, worst) in plan.protected
    plan = plan_pruning(stats, "reap", remove=[(0, 1), (0, 2)], guard=False)
    assert plan.kept == ((0, 3, 4, 5, 6), tuple(range(7)), tuple(range(7)))


def test_super_experts_are_protected_unless_told_otherwise(stats):
    stats.moments["max_norm"][1, 5] = 1e4
    stats.moments["weighted_norm"][1, 5] = 0.0
    assert 5 in plan_pruning(stats, "reap", 2).kept[1]
    assert 5 not in plan_pruning(stats, "reap", 2, guard=False).kept[1]
    assert plan_pruning(stats, "reap", 2).protected == ((1, 5),)


def test_fewer_than_k_lowers_k_and_says_so(stats):
    plan = plan_pruning(stats, "frequency", 2)
    assert plan.experts_per_token == 2
    assert "layer 0 keeps fewer than 3 experts: every token now visits 2 in all layers" in plan.summary()
    assert "3 layers keep exactly 3" in plan_pruning(stats, "frequency", 3).summary()


def test_weight_mass_is_what_the_kept_were_given(stats):
    plan = plan_pruning(stats, "soft", 4)
    for layer, kept in enumerate(plan.kept):
        row = stats.moments["weight"][layer]
        assert plan.weight_mass[layer] == pytest.approx(float(row[list(kept)].sum() / row.sum()))
    assert "law (66 tokens): 12 of 21 experts stay" in plan.summary()


def test_a_saved_plan_comes_back_and_reads_well(stats, tmp_path):
    plan = plan_pruning(stats, "reap", 4, protect=[(0, 3)])
    plan.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == plan
    text = (tmp_path / "plan.json").read_text()
    assert json.dumps(plan.kept[1]) + ",\n" in text  # one line a layer


def edited(plan, tmp_path, **changes):
    content = json.loads(plan.to_json())
    content.update(changes)
    path = tmp_path / "edited.json"
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": [[0], [1], [9]]}, "keeps expert 9 in layer 2, which has experts 0..6"),
        ({"kept": [[0], [1], []]}, "keeps no expert in layer 2"),
        ({"kept": [[0], [1]]}, "keeps experts in 2 layers and names 3"),
        ({"kept": [[2, 0], [1], [1]]}, "must ascend, each once"),
        ({"kept": [[0, 0], [1], [1]]}, "must ascend, each once"),
        ({"kept": [["0"], [1], [1]]}, "must list whole numbers"),
        ({"kept": 3}, "malformed"),
        ({"kept": "absent"}, "lacks kept"),
        ({"keep": 3}, "unknown key 'keep'"),
        ({"schema_version": 9}, "schema_version 9; expected 1"),
    ],
)
def test_a_wrong_plan_file_is_one_clear_line(stats, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        PrunePlan.load(edited(plan_pruning(stats, "reap", 4), tmp_path, **changes))


def test_files_that_are_no_plans(tmp_path):
    for text, message in (("{", "is no JSON"), ("[]", "no JSON object")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            PrunePlan.load(tmp_path / "p.json")
    with pytest.raises(ConfigError, match="does not exist"):
        PrunePlan.load(tmp_path / "none.json")


def test_mistakes_are_one_clear_line(stats, model, random_model, config):
    def refused(error, message, *args, **options):
        with pytest.raises(error, match=message):
            plan_pruning(*args, **options)

    refused(ConfigError, "keep is 0; at least 1", stats, "reap", 0)
    refused(ConfigError, "keep is 8, more than the 7", stats, "reap", 8)
    refused(ConfigError, "keep is 1.0; a share must lie between", stats, "reap", 1.0)
    refused(ConfigError, "nothing says how many", stats, "reap")
    refused(ConfigError, "unknown criterion 'x'", stats, "x", 3)
    refused(ConfigError, "unknown budget 'x'", stats, "reap", 3, budget="x")
    refused(ConfigError, "needs routing statistics, a model, or both", None, "reap", 3)
    refused(ConfigError, "protect 0:7: there is no such expert", stats, "reap", 3, protect=[(0, 7)])
    refused(ConfigError, "remove 3:0: there is no such expert", stats, "reap", 3, remove=[(3, 0)])
    refused(ConfigError, "both protected and removed", stats, "reap", 3, protect=[(0, 1)], remove=[(0, 1)])
    refused(ConfigError, "layer 0 protects 4 experts and keeps 3", stats, "reap", 3, protect=[(0, e) for e in range(4)])
    refused(ConfigError, "cannot keep 6 experts when only 5", stats, "reap", 6, remove=[(0, 1), (0, 2)])
    refused(ConfigError, "need the model", stats, "reconstruction", 3)
    refused(ConfigError, "looks at the weights", stats, "aimer", 3)
    refused(ConfigError, "judges by routing statistics", None, "reap", 3, model=model)
    refused(ConfigError, "needs a ranking", stats, "ranking", 3)
    refused(ConfigError, "takes? the uniform budget", stats, "reconstruction_exact", 3, budget="global", model=model)
    refused(DataError, "hold no tokens", RoutingStats.empty([7] * 3, 3), "reap", 3)
    refused(DataError, "of another model", stats, "reap", 3, model=random_model(config(), seed=9))
    assert set(ACTIVATION) < set(CRITERIA)
