import pytest

from service.experiments.figures import Interval
from service.experiments.wording import Scale, duration, p_value, share


@pytest.mark.parametrize(
    ("interval", "mean", "lift", "bounds"),
    [
        (Interval(0.04123, 0.0121, 0.0703), "4.1%", "+4.1 points", "1.2 to 7.0"),
        (Interval(-0.0412345, -0.0415, -0.0409), "−4.123%", "−4.123 points", "−4.150 to −4.090"),
        (Interval(-0.0001, -0.03, 0.03), "0.0%", "0.0 points", "−3.0 to 3.0"),
        (Interval(0.5, float("-inf"), float("inf")), "50.0%", "+50.0 points", "–"),
    ],
)
def test_shares_are_rounded_by_how_sure_they_are(interval: Interval, mean: str, lift: str, bounds: str) -> None:
    scale = Scale(100.0, "%", " points")
    assert (scale.mean(interval), scale.lift(interval), scale.bounds(interval)) == (mean, lift, bounds)


def test_what_is_large_has_no_decimals_and_groups_of_three() -> None:
    scale = Scale(1.0, " ms", " ms")
    assert scale.mean(Interval(12345.678, 12000.0, 12700.0)) == "12,346 ms"
    assert (scale.mean(None), scale.lift(None), scale.bounds(None)) == ("–", "–", "–")


def test_differences_that_are_given_are_said_as_they_were() -> None:
    points = Scale(100.0, "%", " points")
    assert [points.difference(value) for value in (0.01, 0.004, 0.25)] == ["1 point", "0.4 points", "25 points"]


def test_what_is_almost_certain_is_not_said_to_be_so() -> None:
    assert [share(value, 1) for value in (0.99999, 1.0, 0.00001, 0.0, 0.423, None)] == [
        "> 99.9%", "100.0%", "< 0.1%", "0.0%", "42.3%", "–",
    ]  # fmt: skip
    assert share(0.9999) == "> 99%"
    assert [p_value(value) for value in (0.000001, 0.0321, 1.0)] == ["p < 0.0001", "p = 0.032", "p = 1"]


def test_how_long_an_experiment_runs_is_said_in_the_unit_that_fits() -> None:
    assert [duration(seconds) for seconds in (5, 60, 150, 7200, 172_800)] == [
        "0 minutes", "1 minute", "2 minutes", "2.0 hours", "2.0 days",
    ]  # fmt: skip
