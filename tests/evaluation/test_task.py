"""Log-likelihoods of choices -> metrics, against values worked out by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from evaluation.task import Example, score_choice


def test_acc_norm_divides_by_characters_and_ties_go_to_the_first():
    example = Example("0", "", (), 1, sizes=(2, 8, 4, 4))
    assert score_choice(example, [-3.0, -4.0, -9.0, -9.0]) == {
        "acc": 0.0, "prediction": 0.0, "acc_norm": 1.0, "prediction_norm": 1.0,
    }  # fmt: skip
    assert score_choice(example, [-5.0, -5.0, -7.0, -7.0])["prediction"] == 0.0


@given(st.lists(st.floats(-50, -0.5), min_size=2, max_size=6), st.floats(0.1, 10))
def test_predictions_do_not_depend_on_scale(loglikelihoods, factor):
    example = Example("0", "", (), 0, sizes=(3,) * len(loglikelihoods))
    values = score_choice(example, loglikelihoods)
    assert values["prediction"] == values["prediction_norm"]  # equal sizes
    assert max(loglikelihoods) == loglikelihoods[int(values["prediction"])]
