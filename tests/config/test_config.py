"""Strict configs: types, inheritance, overrides, origins, and refusals that help."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import pytest
import yaml

from xmoe.config import dump_config, explain, load_config, resolve
from xmoe.errors import ConfigError
from xmoe.model.config import PRESETS, ModelConfig


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    steps: int = 10
    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    nesterov: bool = False
    note: str | None = None
    ALIASES: ClassVar[dict[str, str]] = {"learning_rate": "lr"}

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"optim.steps is {self.steps}; expected at least 1")


@dataclasses.dataclass(frozen=True)
class Train:
    z_loss_coef: float = 0.0
    load_balancing_coef: float = 0.01
    effort: dict[str, int] | None = None
    ALIASES: ClassVar[dict[str, str]] = {"aux_loss_coef": "load_balancing_coef"}


@dataclasses.dataclass(frozen=True)
class Run:
    model: ModelConfig
    optim: Optim = dataclasses.field(default_factory=Optim)
    train: Train = dataclasses.field(default_factory=Train)


@pytest.fixture
def write(tmp_path):
    def _write(text, name="run.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return _write


def test_defaults_base_file_and_set_win_in_that_order(write):
    write("model: {preset: tiny, num_experts: 12}\noptim:\n  lr: 3e-4\n  steps: 7\n", "base.yaml")
    path = write("base: base.yaml\nmodel:\n  num_experts: 14\noptim: {steps: 9}\n")
    run, origins = resolve(Run, path, ["optim.name=muon", "train.z_loss_coef=1e-3"])
    assert run.model.num_experts == 14 and run.model.hidden_size == PRESETS["tiny"]["hidden_size"]
    assert run.optim == Optim(lr=3e-4, steps=9, name="muon") and run.train.z_loss_coef == 1e-3
    assert isinstance(run.optim.lr, float)
    assert origins[("model", "num_experts")].endswith("run.yaml:3")
    assert origins[("model", "hidden_size")] == "preset tiny"
    assert origins[("optim", "lr")].endswith("base.yaml:3")
    assert origins[("optim", "name")] == "--set"
    shown = explain(run, origins)
    assert "# --set" in shown and "run.yaml:4" in shown and "# default" in shown


def test_what_is_saved_can_be_run_again(write):
    run = load_config(Run, write("model: {preset: light, num_experts: 24}\ntrain: {effort: {low: 1, high: 4}}\n"))
    assert load_config(Run, write(dump_config(run), "saved.yaml")) == run
    assert run.train.effort == {"low": 1, "high": 4}


def test_explained_config_is_yaml_of_the_same_values(write):
    run, origins = resolve(Run, write("model: {preset: tiny}\noptim: {note: 'a: b # c'}\n"))
    again = yaml.safe_load(explain(run, origins))
    assert again["optim"]["note"] == "a: b # c" and again["model"]["head_dim"] == 12


@pytest.mark.parametrize(
    ("text", "found", "offered"),
    [
        (
            "model: {preset: tiny}\noptim:\n  learning_rate: 1\n",
            "run.yaml:3: unknown key optim.learning_rate",
            "optim.lr?",
        ),
        ("model: {preset: tiny, experts_per_token: 2}\n", "run.yaml:1", "model.num_experts_per_tok?"),
        ("model: {preset: tiny, dim: 2}\n", "unknown key model.dim", "model.hidden_size?"),
        ("model: {preset: tiny}\ntrain: {aux_loss_coef: 1}\n", "train.aux_loss_coef", "train.load_balancing_coef?"),
        ("model: {preset: tiny}\ntrain: {lr: 1}\n", "train.lr", "optim.lr?"),
        ("model: {preset: tiny}\noptim: {stpes: 1}\n", "optim.stpes", "optim.steps?"),
        ("model: {preset: tiny}\noptimizer: {lr: 1}\n", "unknown key optimizer", "sections: model, optim, train"),
    ],
)
def test_unknown_keys_are_refused_with_the_right_name(write, text, found, offered):
    with pytest.raises(ConfigError) as error:
        load_config(Run, write(text))
    assert found in str(error.value) and offered in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {preset: tiny}\noptim: {lr: fast}\n", "run.yaml:2: optim.lr: expected a number, found 'fast'"),
        ("model: {preset: tiny}\noptim: {steps: 1.5}\n", "optim.steps: expected a whole number, found 1.5"),
        ("model: {preset: tiny}\noptim: {nesterov: 1}\n", "expected true or false"),
        ("model: {preset: tiny}\noptim: {name: adam}\n", "expected one of adamw, muon"),
        ("model: {preset: tiny}\noptim: {betas: 0.9}\n", "expected a list of a number"),
        ("model: {preset: tiny}\noptim: 3\n", "optim is a section"),
        ("model: {preset: tiny}\noptim: {steps: 0}\n", "run.yaml: optim.steps is 0; expected at least 1"),
        ("model: {preset: tyni}\n", "did you mean tiny?"),
        ("model: {hidden_size: 3}\n", "model: missing vocab_size"),
        ("model: {preset: tiny\n", "not valid YAML"),
        ("- 1\n", "expected sections"),
        ("model: {preset: tiny}\nmodel: {preset: tiny}\n", "given twice"),
        ("base: none.yaml\nmodel: {preset: tiny}\n", "none.yaml does not exist"),
    ],
)
def test_wrong_values_are_one_clear_line(write, text, message):
    with pytest.raises(ConfigError) as error:
        load_config(Run, write(text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_file_offers_a_neighbour(write, tmp_path):
    write("model: {preset: tiny}\n", "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"did you mean .*quickstart\.yaml"):
        load_config(Run, tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        load_config(Run, None, ["optim.lr"])


def test_every_config_of_the_project_names_known_presets_only():
    for name, values in PRESETS.items():
        assert ModelConfig(**values).vocab_size > 0, name
