from __future__ import annotations

import math

import pytest

from service.engines.base import Scores, Usage
from service.engines.errors import UnsupportedFeature
from service.engines.scoring import Normalise, label_log_probabilities, log_softmax


def scores(*probabilities: float, lengths: tuple[int, ...] = ()) -> Scores:
    return Scores(tuple(map(math.log, probabilities)), Usage(1, 0), lengths)


def probabilities(given: Scores, normalise: Normalise = "none", prior: Scores | None = None) -> list[float]:
    return [math.exp(value) for value in label_log_probabilities(given, normalise, prior)]


def test_labels_share_what_the_model_gives_to_all_of_them() -> None:
    assert probabilities(scores(0.03, 0.01)) == pytest.approx([0.75, 0.25])


def test_length_takes_the_mean_of_a_labels_tokens() -> None:
    # Geometric means 0.5 and 0.25: probabilities of two tokens and of one.
    assert probabilities(scores(0.25, 0.25, lengths=(2, 1)), "length") == pytest.approx([2 / 3, 1 / 3])


def test_calibration_divides_by_the_content_free_probability() -> None:
    # (0.6, 0.4) / (0.75, 0.25) = (0.8, 1.6)
    assert probabilities(scores(0.6, 0.4), prior=scores(0.75, 0.25)) == pytest.approx([1 / 3, 2 / 3])


def test_a_content_free_input_calibrated_by_itself_favours_no_label() -> None:
    given = scores(0.6, 0.3, 0.1, lengths=(3, 1, 2))
    for normalise in ("none", "length"):
        assert probabilities(given, normalise, given) == pytest.approx([1 / 3] * 3)


def test_length_without_counted_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedFeature, match="use 'none'"):
        label_log_probabilities(scores(0.5, 0.5), "length")


def test_log_softmax_holds_for_values_that_would_underflow_and_for_the_impossible() -> None:
    assert log_softmax([-10_000.0, -10_000.0]) == pytest.approx([-math.log(2)] * 2)
    assert log_softmax([0.0, -math.inf]) == [0.0, -math.inf]
    assert log_softmax([-math.inf, -math.inf]) == pytest.approx([-math.log(2)] * 2)
