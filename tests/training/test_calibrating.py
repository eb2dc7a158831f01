from __future__ import annotations

from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from training.calibrating import FEWEST_ROWS, Judged, Share, find_threshold
from training.errors import CalibrationError

# Few different values, so that many answers are equally confident.
CONFIDENCES = st.one_of(st.none(), st.integers(-4, 4).map(float), st.floats(-10.0, 0.0))
ROWS = st.lists(st.builds(Judged, CONFIDENCES, st.sampled_from((0.0, 1.0))), min_size=FEWEST_ROWS, max_size=60)
TARGETS = st.one_of(st.floats(0.0, 1.0), st.sampled_from((0.0, 0.5, 0.9, 0.95, 1.0)))


def accepted(rows: list[Judged], threshold: float) -> list[float]:
    return [row.score for row in rows if row.confidence is not None and row.confidence >= threshold]


def reaching(rows: list[Judged], target: float) -> list[float]:
    """Every threshold that reaches the target, tried one by one."""
    values = {row.confidence for row in rows if row.confidence is not None}
    return [value for value in values if sum(scores := accepted(rows, value)) / len(scores) >= target]


def row(confidence: float | None, *, right: bool) -> Judged:
    return Judged(confidence, float(right))


@given(ROWS, TARGETS)
def test_the_threshold_is_the_lowest_that_reaches_the_target(rows: list[Judged], target: float) -> None:
    possible = reaching(rows, target)
    if not possible:
        with pytest.raises(CalibrationError):
            find_threshold(rows, target)
        return
    found = find_threshold(rows, target)
    scores = accepted(rows, found.value)
    assert found.value == min(possible)
    assert (found.accepted.rows, found.accepted.mean) == (len(scores), sum(scores) / len(scores))
    assert found.accepted.mean >= target
    assert found.accepted_share == len(scores) / len(rows)
    assert found.unknown == sum(each.confidence is None for each in rows)
    assert found.all_rows.mean == sum(each.score for each in rows) / len(rows)


@given(ROWS, TARGETS, TARGETS)
def test_a_higher_target_never_has_a_lower_threshold(rows: list[Judged], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assume(reaching(rows, high))
    assert find_threshold(rows, low).value <= find_threshold(rows, high).value


@given(ROWS, TARGETS, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(rows: list[Judged], target: float, random: Random) -> None:
    assume(reaching(rows, target))
    shuffled = random.sample(rows, len(rows))
    assert find_threshold(shuffled, target) == find_threshold(rows, target)


def test_answers_of_equal_confidence_are_accepted_together() -> None:
    rows = [row(0.9, right=True)] * 10 + [row(0.5, right=True)] * 5 + [row(0.5, right=False)] * 5
    found = find_threshold(rows, 0.9)
    assert (found.value, found.accepted.rows, found.accepted.mean) == (0.9, 10, 1.0)
    assert find_threshold(rows, 0.75).value == 0.5


def test_a_target_that_the_rows_reach_exactly_is_reached() -> None:
    rows = [row(0.9, right=True)] * 57 + [row(0.9, right=False)] * 43
    assert find_threshold(rows, 0.57).accepted.mean == 0.57


def test_what_is_accepted_is_held_against_accepting_at_random() -> None:
    rows = [row(0.9, right=True)] * 10 + [row(0.1, right=False)] * 10
    found = find_threshold(rows, 0.95)
    assert (found.accepted.mean, found.all_rows.mean, found.accepted_share) == (1.0, 0.5, 0.5)


def test_scores_between_right_and_wrong_count_as_they_are() -> None:
    rows = [Judged(0.9, 0.75)] * 10 + [Judged(0.1, 0.25)] * 10
    assert find_threshold(rows, 0.7).accepted == Share(0.75, 10)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(CalibrationError, match="19 rows are too few to calibrate on; give at least 20"):
        find_threshold([row(0.9, right=True)] * 19, 0.5)


def test_a_target_that_nothing_reaches_is_refused_with_the_best_there_is() -> None:
    rows = [row(0.9, right=True)] * 6 + [row(0.9, right=False)] * 2 + [row(0.1, right=False)] * 12
    with pytest.raises(CalibrationError, match=r"no threshold reaches 0.95: the best accepts 8 of 20 rows with 0.75"):
        find_threshold(rows, 0.95)


def test_answers_that_never_have_a_confidence_are_refused_with_the_reason() -> None:
    with pytest.raises(CalibrationError, match="no answer had a confidence by this measure"):
        find_threshold([row(None, right=True)] * 20, 0.5)


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (95, 100, 0.8882, 0.9785)],
)
def test_intervals_are_wilsons(right: int, rows: int, low: float, high: float) -> None:
    assert Share(right / rows, rows).interval == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 1000), st.floats(0.0, 1.0))
def test_an_interval_holds_its_mean_and_stays_between_0_and_1(rows: int, mean: float) -> None:
    low, high = Share(mean, rows).interval
    assert 0.0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1.0
