"""Confidence sequences hold at every look: false positives in simulated experiments, of 2,000 runs each."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from numpy.random import Generator

from service.experiments.best import with_floor
from service.experiments.statistics import estimates
from tests.service.experiments.simulating import ARMS, RUNS, Array, Units, alarms, at, excesses, most, running, sums_at

AT_ONCE = 200
ALPHA = 0.05

Draw = Callable[[Generator, tuple[int, int]], Array]


def booleans(rng: Generator, shape: tuple[int, int]) -> Array:
    return (rng.random(shape) < 0.3).astype(float)


def rare(rng: Generator, shape: tuple[int, int]) -> Array:
    return (rng.random(shape) < 0.005).astype(float)


def skewed(rng: Generator, shape: tuple[int, int]) -> Array:
    return rng.lognormal(0.0, 1.0, shape)


def costs(rng: Generator, shape: tuple[int, int]) -> Array:
    """Most are nothing, and the others skewed: an answer that another backend had to give."""
    return np.where(rng.random(shape) < 0.05, rng.lognormal(0.0, 1.0, shape), 0.0)


def drawn(rng: Generator, draw: Draw, shares: tuple[float, ...], units: int) -> Units:
    arm = np.searchsorted(np.cumsum(shares)[:-1], rng.random((AT_ONCE, units)), side="right")
    return Units(arm, 1.0 / np.array(shares)[arm], draw(rng, arm.shape))


def thompson(rng: Generator, draw: Draw, floor: float, units: int, batch: int = 250) -> Units:
    """Weights follow the probability of being best after each batch, as estimated from all units so far."""
    shares = np.full((AT_ONCE, 2), 0.5)
    sums = [{}, {}]
    batches = []
    for _ in range(units // batch):
        arm = (rng.random((AT_ONCE, batch)) >= shares[:, :1]).astype(int)
        batches.append(Units(arm, 1.0 / np.take_along_axis(shares, arm, axis=1), draw(rng, arm.shape)))
        for place in range(2):
            latest = running(batches[-1], place, batch)
            sums[place] = {name: sums[place].get(name, 0) + each for name, each in latest.items()}
        for run in range(AT_ONCE):
            now = {ARMS[place]: sums_at(sums[place], place, run, 0) for place in range(2)}
            best = {each.arm: each.best for each in estimates(now, ARMS[0], direction="maximise", alpha=ALPHA)}
            if None not in best.values():
                shares[run] = list(with_floor(best, floor).values())
    return Units(*(np.concatenate([getattr(each, name) for each in batches], axis=1) for name in ("arm", "w", "y")))


@pytest.mark.parametrize(
    ("draw", "shares", "step"),
    [
        (booleans, (0.5, 0.5), 1),
        (rare, (0.5, 0.5), 4),
        (skewed, (0.5, 0.5), 4),
        (booleans, (0.9, 0.1), 4),
        (rare, (0.9, 0.1), 4),
        (skewed, (0.9, 0.1), 1),
        (costs, (0.9, 0.1), 4),
    ],
)
def test_two_equal_arms_looked_at_all_the_time_differ_no_more_often_than_alpha(
    draw: Draw, shares: tuple[float, float], step: int
) -> None:
    rng = np.random.default_rng(1)
    found = [
        alarm
        for _ in range(RUNS // AT_ONCE)
        for alarm in alarms(drawn(rng, draw, shares, 3000), alpha=ALPHA, step=step)
    ]

    assert len(found) == RUNS
    assert sum(alarm is not None for alarm in found) <= most(ALPHA)


@pytest.mark.parametrize("draw", [booleans, skewed])
def test_the_looks_that_are_chosen_are_the_worst(draw: Draw) -> None:
    rng = np.random.default_rng(8)
    arm = rng.choice(3, size=(1, 2000), p=(0.5, 0.3, 0.2))
    y = draw(rng, arm.shape)
    y[rng.random(y.shape) < 0.2] = np.nan
    for x in (None, np.where(rng.random(y.shape) < 0.7, y + rng.normal(0.0, 0.5, y.shape), np.nan)):
        sums = [running(Units(arm, 1.0 / np.array((0.5, 0.3, 0.2))[arm], y, x), place, 20) for place in range(3)]
        told = excesses(sums, alpha=ALPHA, truth=0.1)
        for look in range(100):
            found = estimates(at(sums, 0, look), ARMS[0], direction="maximise", alpha=ALPHA)
            for place, each in enumerate(found[1:]):
                known = each.lift is not None and math.isfinite(each.lift.high)
                far = (each.lift.estimate - 0.1) / (each.lift.high - each.lift.estimate) if known else 0.0
                assert told[place, 0, look] == pytest.approx(far)
        assert np.count_nonzero(told) > 100
        assert found[1].adjusted == (x is not None)


def visited(rng: Generator, share: float, units: int) -> tuple[Array, Array]:
    """Units' arms, the smaller of which has this share, and how many requests each makes."""
    arm = (rng.random((AT_ONCE, units)) < share).astype(int)
    return arm, rng.integers(1, 11, arm.shape)


def test_units_of_many_requests_that_rarely_fail_differ_no_more_often_than_alpha() -> None:
    rng = np.random.default_rng(9)
    false, chance = 0, 0.005
    for _ in range(RUNS // AT_ONCE):
        arm, requests = visited(rng, 0.1, 3000)
        of_unit = rng.beta(20 * chance, 20 * (1 - chance), arm.shape)
        units = Units(arm, 1 / np.where(arm, 0.1, 0.9), rng.binomial(requests, of_unit) / requests)
        false += sum(alarm is not None for alarm in alarms(units, alpha=ALPHA, step=4, boolean=True))

    assert false <= most(ALPHA)


def test_a_unit_counts_once_however_many_requests_it_makes() -> None:
    rng = np.random.default_rng(10)
    once = each = 0
    for _ in range(RUNS // AT_ONCE):
        arm, requests = visited(rng, 0.5, 1500)
        of_unit = rng.lognormal(0.0, 1.0, arm.shape)
        noise = rng.lognormal(0.0, 0.5, arm.shape)
        units = Units(arm, np.full(arm.shape, 2.0), of_unit * noise ** (1 / requests))
        repeated = Units(*(np.repeat(field, 8, axis=1) for field in (units.arm, units.w, units.y)))
        once += sum(alarm is not None for alarm in alarms(units, alpha=ALPHA, step=3))
        each += sum(alarm is not None for alarm in alarms(repeated, alpha=ALPHA, step=24))

    assert once <= most(ALPHA)
    assert each > 3 * most(ALPHA)


def test_the_bound_is_felt_where_each_look_is_taken_for_the_only_one() -> None:
    rng = np.random.default_rng(1)
    false = 0
    for _ in range(RUNS // AT_ONCE):
        units = drawn(rng, booleans, (0.5, 0.5), 3000)
        sums = [running(units, place) for place in range(2)]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean, other = (each["wy"] / each["w"] for each in sums)
            error = np.sqrt(mean * (1 - mean) / sums[0]["valued"] + other * (1 - other) / sums[1]["valued"])
            beyond = np.abs(other - mean) / error > NormalDist().inv_cdf(1 - ALPHA / 2)
        false += int(np.any(beyond[:, 300:], axis=1).sum())

    assert false > 3 * most(ALPHA)


def test_lifts_of_three_arms_hold_together() -> None:
    rng = np.random.default_rng(2)
    found = [
        alarm
        for _ in range(RUNS // AT_ONCE)
        for alarm in alarms(drawn(rng, skewed, (0.4, 0.3, 0.3), 3000), alpha=ALPHA, arms=3, step=3)
    ]

    assert sum(alarm is not None for alarm in found) <= most(ALPHA)


@pytest.mark.parametrize("draw", [booleans, skewed, costs])
def test_weights_that_follow_the_better_arm_do_not_make_more_false_positives(draw: Draw) -> None:
    rng = np.random.default_rng(3)
    false = 0
    for _ in range(RUNS // AT_ONCE):
        units = thompson(rng, draw, 0.05, 3000)
        assert units.w.max() > 10.0  # some arm was nearly left alone
        false += sum(alarm is not None for alarm in alarms(units, alpha=ALPHA, step=5))

    assert false <= most(ALPHA)


def test_a_covariate_does_not_make_more_false_positives() -> None:
    rng = np.random.default_rng(4)
    false = 0
    for _ in range(RUNS // AT_ONCE):
        plain = drawn(rng, skewed, (0.5, 0.5), 2500)
        x = np.where(rng.random(plain.y.shape) < 0.7, plain.y + rng.normal(0.0, 1.0, plain.y.shape), np.nan)
        units = Units(plain.arm, plain.w, plain.y, x)
        false += sum(alarm is not None for alarm in alarms(units, alpha=ALPHA, step=5))

    assert false <= most(ALPHA)


@pytest.mark.parametrize(("lift", "units", "share"), [(0.05, 12000, 0.9), (0.1, 4000, 0.95), (0.2, 1000, 0.9)])
def test_a_lift_of_a_boolean_is_found(lift: float, units: int, share: float) -> None:
    rng = np.random.default_rng(5)
    runs = 200
    arm = rng.integers(0, 2, (runs, units))
    y = (rng.random(arm.shape) < 0.4 + lift * arm).astype(float)
    everything = Units(arm, np.full(arm.shape, 2.0), y)
    found = alarms(everything, alpha=ALPHA, step=10)

    assert sum(each is not None and each.low > 0.0 for each in found) >= share * runs
    assert sum(each is not None for each in alarms(everything, alpha=ALPHA, step=10, truth=lift)) <= most(ALPHA) / 10


def test_a_lift_is_estimated_without_bias_though_weights_follow_it() -> None:
    rng = np.random.default_rng(6)
    runs, units, batch, lift = 2000, 2000, 200, 0.5
    shares = np.full((runs, 1), 0.5)
    arms, weights, values = [], [], []
    plain = np.zeros((2, 2, runs))  # sums and counts by arm, as one who ignores probabilities has them
    for start in range(0, units, batch):
        arm = (rng.random((runs, batch)) < shares).astype(int)
        drift = 2.0 * start / units  # later units have higher values in either arm
        y = rng.normal(drift, 1.0, arm.shape) + lift * arm
        arms, weights, values = [*arms, arm], [*weights, 1 / np.where(arm, shares, 1 - shares)], [*values, y]
        for place in range(2):
            plain[place] += (y * (arm == place)).sum(axis=1), (arm == place).sum(axis=1)
        better = plain[1, 0] / plain[1, 1] > plain[0, 0] / plain[0, 1]
        shares = np.where(better, 0.8, 0.2)[:, None]
    everything = Units(*(np.concatenate(each, axis=1) for each in (arms, weights, values)))
    sums = [running(everything, place, units) for place in range(2)]
    lifts = np.array(
        [
            estimates(
                {ARMS[place]: sums_at(sums[place], place, run, 0) for place in range(2)},
                ARMS[0],
                direction="maximise",
                alpha=ALPHA,
            )[1].lift.estimate
            for run in range(runs)
        ]
    )
    ignorant = plain[1, 0] / plain[1, 1] - plain[0, 0] / plain[0, 1]

    assert abs(lifts.mean() - lift) < 4 * lifts.std() / runs**0.5
    assert abs(ignorant.mean() - lift) > 20 * ignorant.std() / runs**0.5


def test_an_adjusted_lift_is_narrower_and_without_bias() -> None:
    rng = np.random.default_rng(7)
    runs, units, lift = 1000, 2000, 0.2
    arm = rng.integers(0, 2, (runs, units))
    x = rng.normal(3.0, 2.0, arm.shape)
    y = x + rng.normal(0.0, 1.0, arm.shape) + lift * arm
    x[rng.random(arm.shape) < 0.2] = np.nan
    adjusted, plain = [], []
    for units_of, lifts in (
        (Units(arm, np.full(arm.shape, 2.0), y, x), adjusted),
        (Units(arm, np.full(arm.shape, 2.0), y), plain),
    ):
        sums = [running(units_of, place, units) for place in range(2)]
        for run in range(runs):
            now = {ARMS[place]: sums_at(sums[place], place, run, 0) for place in range(2)}
            estimate = estimates(now, ARMS[0], direction="maximise", alpha=ALPHA)[1]
            assert estimate.adjusted == (lifts is adjusted)
            lifts.append(estimate.lift)
    estimated = np.array([each.estimate for each in adjusted])

    assert abs(estimated.mean() - lift) < 4 * estimated.std() / runs**0.5
    assert all(
        narrow.high - narrow.low < 0.8 * (wide.high - wide.low) for narrow, wide in zip(adjusted, plain, strict=True)
    )
