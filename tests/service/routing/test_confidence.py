from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engines.base import TokenLogprob
from service.engines.collecting import Answer
from service.routing.confidence import confidence, label_confidence, needs_logprobs

LOGPROBS = st.lists(st.floats(-30.0, 0.0), min_size=1, max_size=40)


def answer(*logprobs: float, agreement: float | None = None, refusal: str = "") -> Answer:
    tokens = tuple(TokenLogprob(token, logprob) for token, logprob in enumerate(logprobs))
    return Answer("text", (), tokens, "stop", agreement, refusal=refusal)


def test_mean_logprob_does_not_depend_on_the_length_of_the_answer() -> None:
    assert confidence("mean_logprob", answer(-1.0, -2.0, -6.0)) == pytest.approx(-3.0)
    assert confidence("mean_logprob", answer(*[-0.25] * 50)) == pytest.approx(-0.25)


@given(LOGPROBS, st.integers(1, 9999))
def test_a_quantile_is_numpys_linear_one(logprobs: list[float], share: int) -> None:
    measured = confidence(f"quantile_logprob:0.{share:04}", answer(*logprobs))
    assert measured == pytest.approx(float(np.quantile(logprobs, share / 10_000)))


@given(LOGPROBS)
def test_a_quantile_does_not_depend_on_the_order_of_the_tokens(logprobs: list[float]) -> None:
    forwards, backwards = answer(*logprobs), answer(*reversed(logprobs))
    assert confidence("quantile_logprob:.1", forwards) == confidence("quantile_logprob:.1", backwards)


def test_a_low_quantile_sees_the_one_token_that_a_mean_hides() -> None:
    sure, unsure = answer(*[-0.5] * 10), answer(*[-0.01] * 9, -4.0)
    assert (confidence("mean_logprob", unsure) or 0.0) > (confidence("mean_logprob", sure) or 0.0)
    assert (confidence("quantile_logprob:0.05", unsure) or 0.0) < (confidence("quantile_logprob:0.05", sure) or 0.0)


def test_agreement_is_the_ensembles_own() -> None:
    assert confidence("agreement", answer(-1.0, agreement=0.75)) == 0.75
    assert confidence("agreement", answer(-1.0)) is None
    assert label_confidence("agreement", [0.9, 0.1], 0.5) == 0.5
    assert label_confidence("agreement", [0.9, 0.1]) is None


@pytest.mark.parametrize("measure", ["mean_logprob", "quantile_logprob:0.1", "margin"])
def test_an_answer_without_logprobs_has_no_confidence(measure: str) -> None:
    assert confidence(measure, answer(agreement=1.0)) is None


@pytest.mark.parametrize("measure", ["mean_logprob", "quantile_logprob:0.1", "agreement"])
def test_a_refusal_has_no_confidence(measure: str) -> None:
    assert confidence(measure, answer(-0.1, agreement=1.0, refusal="I cannot help with that")) is None


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_what_is_no_number_is_no_confidence(logprob: float) -> None:
    assert confidence("mean_logprob", answer(-0.1, logprob)) is None
    assert confidence("quantile_logprob:0.1", answer(logprob)) is None
    assert label_confidence("margin", [math.nan, 0.1]) is None


def test_a_margin_is_between_labels_alone() -> None:
    assert confidence("margin", answer(-0.1, -0.2)) is None
    assert label_confidence("margin", [0.7, 0.2, 0.1]) == pytest.approx(0.5)


def test_a_labels_logprob_is_the_logarithm_of_the_best() -> None:
    assert label_confidence("mean_logprob", [0.7, 0.3]) == pytest.approx(math.log(0.7))
    assert label_confidence("mean_logprob", [0.0, 0.0]) is None


@pytest.mark.parametrize("measure", ["margin", "mean_logprob", "quantile_logprob:0.5"])
def test_a_choice_without_probabilities_has_no_confidence(measure: str) -> None:
    assert label_confidence(measure, []) is None


def test_a_label_has_no_quantile() -> None:
    assert label_confidence("quantile_logprob:0.5", [0.7, 0.3]) is None


@pytest.mark.parametrize("measure", ["entropy", "quantile_logprob", "quantile_logprob:1.5", ""])
def test_what_is_no_measure_is_refused(measure: str) -> None:
    with pytest.raises(ValueError, match="no measure of confidence"):
        confidence(measure, answer(-1.0))
    with pytest.raises(ValueError, match="no measure of confidence"):
        label_confidence(measure, [0.6, 0.4])


def test_which_measures_need_logprobs() -> None:
    measures = ("mean_logprob", "quantile_logprob:0.1", "margin", "agreement")
    assert [needs_logprobs(measure) for measure in measures] == [True, True, False, False]
