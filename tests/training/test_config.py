"""The settings of a run: what cannot work is refused in one line before anything is written."""

from __future__ import annotations

import io

import pytest

from xmoe.errors import ConfigError
from xmoe.training.trainer import train


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.seq_len=700"], "data.seq_len is 700, longer than the model's context of 512"),
        (["model.num_experts=2"], "num_experts is 2, fewer than num_experts_per_tok 3"),
        (["train.steps=many"], "train.steps: expected a whole number, found 'many'"),
        (["train.stepz=3"], "unknown key train.stepz; did you mean train.steps"),
        (["train.batch_size=3"], "did you mean train.micro_batch"),
        (["model.experts_per_token=3"], "did you mean model.num_experts_per_tok"),
        (["train.steps=0"], "train.steps is 0; expected 1 or more"),
        (["train.effort_sampling=sometimes"], "expected one of none, step, layer"),
        (["train.effort_sampling=step", "model.reasoning_effort=null"], "model.reasoning_effort does not list"),
        (["train.effort_weights={low: 0}"], "expected shares of 0 or more, not all 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(config_file, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        train(config_file, overrides, output=tmp_path / "run", console=io.StringIO())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
