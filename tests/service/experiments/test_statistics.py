from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_store.ledger.sums import UnitSums
from service.experiments.figures import ArmEstimate, GuardrailState, Interval
from service.experiments.statistics import added, estimates, guardrail_state, half_width, missing_differs
from tests.service.experiments.simulating import Array, Units, whole

GOLDEN = json.loads((Path(__file__).parent / "golden_gbstats.json").read_text())["cases"]


def lift_of(sums: dict[str, UnitSums], alpha: float = 0.05) -> ArmEstimate:
    return estimates(sums, "control", direction="maximise", alpha=alpha)[1]


def halves(y: Array, x: Array | None = None) -> Units:
    """Units of one run that come to the control and the first arm in turn, with equal probabilities."""
    arm = np.arange(y.size).reshape(1, -1) % 2
    return Units(arm, np.full(arm.shape, 2.0), y.reshape(1, -1), None if x is None else x.reshape(1, -1))


def from_golden(arm: str, sums: dict[str, float]) -> UnitSums:
    n, x = int(sums["n"]), "x" in sums
    return UnitSums(
        arm=arm, since_ms=0, units=n, uw=2.0 * n, uww=4.0 * n, valued=n, w=2.0 * n, wy=2 * sums["y"], ww=4.0 * n,
        wwy=4 * sums["y"], wwyy=4 * sums["yy"], k=n * x, kw=2.0 * n * x, kww=4.0 * n * x, kwwy=4 * sums["y"] * x,
        wx=2 * sums.get("x", 0.0), wwx=4 * sums.get("x", 0.0), wwxx=4 * sums.get("xx", 0.0),
        wwxy=4 * sums.get("xy", 0.0),
    )  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_lifts_are_those_of_gbstats(case: dict[str, Any]) -> None:
    # gbstats adds nothing to booleans, counts the units of uneven arms as those of even ones, and its theta has
    # what differs between arms in it.
    exact = not case["binary"] and case["name"] not in ("covariate", "numbers, arms of other sizes")
    sums = {arm: from_golden(arm, case[arm]) for arm in ("control", "first")}
    lift = lift_of(sums, case["alpha"]).lift

    width = case["high"] - case["low"]
    assert lift is not None
    assert lift.estimate == pytest.approx(case["lift"], abs=width * (1e-9 if exact else 1e-3))
    assert lift.low == pytest.approx(case["low"], abs=width * (1e-9 if exact else 2e-3))
    assert lift.high == pytest.approx(case["high"], abs=width * (1e-9 if exact else 2e-3))


def test_with_equal_probabilities_a_mean_and_its_variance_are_the_plain_ones() -> None:
    y = np.random.default_rng(1).normal(5.0, 2.0, 600)
    control = estimates(whole(halves(y)), "control", direction="maximise", alpha=0.05)[0]

    own = y[::2]
    assert control.mean is not None
    assert control.mean.estimate == pytest.approx(own.mean())
    assert control.mean.high - own.mean() == pytest.approx(half_width(own.var(ddof=1) / 300, 300, 0.05))


def test_a_sequence_is_narrowest_in_standard_errors_where_it_is_tuned() -> None:
    at = [200, 1000, 4000, 5000, 6000, 50_000, 1_000_000]
    widths = {time: half_width(1.0 / time, time, 0.05) for time in at}
    least = {rho: math.sqrt(2 * (t + 1) / t * math.log(math.sqrt(t + 1) / 0.05)) / math.sqrt(5000)
             for rho in (0.03, 0.0398, 0.05) for t in [5000 * rho * rho]}  # fmt: skip

    assert sorted(widths.values(), reverse=True) == list(widths.values())
    assert widths[5000] == pytest.approx(min(least.values()), rel=1e-4)


@pytest.mark.parametrize("units", [1, 2, 150])
def test_under_the_burn_in_nothing_is_bounded_and_nothing_is_best(units: int) -> None:
    y = np.where(np.arange(units) % 3 == 0, 1.0, 0.0)
    control, first = estimates(whole(halves(y)), "control", direction="maximise", alpha=0.05)

    assert control.best is None
    assert first.best is None
    assert (first.mean is None) == (units == 1)
    if first.mean is not None and first.lift is not None:
        assert (first.mean.low, first.mean.high) == (first.lift.low, first.lift.high) == (-math.inf, math.inf)


def test_few_units_that_weigh_most_are_few() -> None:
    w = np.concatenate([np.full((1, 980), 1.0), np.full((1, 20), 1000.0)], axis=1)
    arm = np.concatenate([np.arange(980), np.zeros(20)]).reshape(1, -1).astype(int) % 2
    y = np.random.default_rng(2).normal(size=(1, 1000))
    control, first = estimates(whole(Units(arm, w, y)), "control", direction="maximise", alpha=0.05)

    assert control.valued == 510
    assert control.mean is not None
    assert first.mean is not None
    assert math.isinf(control.mean.high)
    assert math.isfinite(first.mean.high)


def test_outcomes_that_are_all_equal_say_nothing_of_others_unless_they_are_booleans() -> None:
    numbers = lift_of(whole(halves(np.full(1000, 0.1))))
    never, always = lift_of(whole(halves(np.zeros(1000)))), lift_of(whole(halves(np.ones(1000))))

    assert numbers.lift is not None
    assert math.isinf(numbers.lift.high)
    for estimate in (never, always):
        assert estimate.mean is not None
        assert estimate.lift is not None
        # 500 units, none of which failed: at least 3 / 500 may, by the rule of three
        assert 3 / 500 < estimate.mean.high - estimate.mean.estimate < 8 / 500
        assert estimate.lift.high > 3 / 500
        assert estimate.best == pytest.approx(0.5)


def test_a_boolean_has_no_mean_beyond_0_and_1_and_no_lift_beyond_those_between_them() -> None:
    shares = np.where(np.arange(400) % 2, np.arange(400) % 40 != 1, np.arange(400) % 40 == 0).astype(float)
    sums = whole(halves(shares))
    number, boolean = (
        estimates(sums, "control", direction="maximise", alpha=1e-9, boolean=each) for each in (False, True)
    )

    for of_number, of_boolean, least, most in (
        (number[0].mean, boolean[0].mean, 0.0, 1.0),
        (number[1].mean, boolean[1].mean, 0.0, 1.0),
        (number[1].lift, boolean[1].lift, -1.0, 1.0),
    ):
        assert of_number.low < least or of_number.high > most
        assert of_boolean == Interval(of_number.estimate, max(of_number.low, least), min(of_number.high, most))
    few = estimates(whole(halves(shares[:100])), "control", direction="maximise", alpha=0.05, boolean=True)
    assert (few[1].mean.low, few[1].mean.high, few[1].lift.low) == (-math.inf, math.inf, -math.inf)


def test_booleans_of_units_with_many_requests_are_as_uncertain_as_booleans() -> None:
    rare = np.where(np.arange(2000) % 1000 < 2, 0.5, 0.0)
    number, boolean = (
        estimates(whole(halves(rare)), "control", direction="maximise", alpha=0.05, boolean=each)[0].mean
        for each in (False, True)
    )

    assert boolean.high > 1.5 * number.high
    assert number.low < boolean.low == 0.0


def test_an_arm_without_units_has_no_estimate_and_the_others_keep_theirs() -> None:
    y = np.random.default_rng(3).normal(size=800)
    sums = whole(halves(y), arms=3)
    control, first, second = estimates(sums, "control", direction="maximise", alpha=0.05)
    together = estimates({arm: sums[arm] for arm in ("control", "first")}, "control", direction="maximise", alpha=0.025)

    assert (second.units, second.mean, second.lift, second.best) == (0, None, None, None)
    assert control.best is None
    assert first.lift == together[1].lift


def test_the_control_comes_first_and_has_no_lift() -> None:
    sums = whole(halves(np.random.default_rng(4).normal(size=800)))
    found = estimates(dict(reversed(sums.items())), "control", direction="maximise", alpha=0.05)

    assert [each.arm for each in found] == ["control", "first"]
    assert found[0].lift is None
    assert found[1].lift is not None


def test_the_best_arm_is_that_of_the_direction() -> None:
    y = np.random.default_rng(5).normal(size=4000) + 0.2 * (np.arange(4000) % 2)
    sums = whole(halves(y))
    most, least = (estimates(sums, "control", direction=each, alpha=0.05) for each in ("maximise", "minimise"))

    assert most[1].best > 0.999
    assert least[1].best == pytest.approx(most[0].best)
    assert most[1].lift == least[1].lift


@pytest.mark.parametrize(("known", "used"), [(150, False), (250, True)])
def test_a_covariate_is_used_once_enough_units_of_every_arm_have_one(known: int, used: bool) -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(3.0, 1.0, 2000)
    y = x + rng.normal(0.0, 0.5, 2000)
    x[known:] = np.nan
    estimate = lift_of(whole(halves(y, x)))

    assert estimate.adjusted is used
    assert estimate.mean == lift_of(whole(halves(y))).mean


@pytest.mark.parametrize("x", [np.full(2000, 7.1), np.full(2000, np.nan)])
def test_a_covariate_that_tells_nothing_is_left_out(x: Array) -> None:
    y = np.random.default_rng(7).normal(size=2000)

    assert lift_of(whole(halves(y, x))) == lift_of(whole(halves(y)))


def responding(rng: np.random.Generator, shares: tuple[float, float], units: int) -> dict[str, UnitSums]:
    arm = rng.integers(0, 2, (1, units))
    y = np.where(rng.random(arm.shape) < np.array(shares)[arm], rng.normal(size=arm.shape), np.nan)
    return whole(Units(arm, np.full(arm.shape, 2.0), y))


def test_missing_differs_where_one_arm_answers_less() -> None:
    rng = np.random.default_rng(8)

    assert missing_differs(responding(rng, (0.3, 0.2), 8000), "control", 0.01)
    assert not missing_differs(responding(rng, (0.3, 0.3), 8000), "control", 0.01)
    assert not missing_differs(responding(rng, (1.0, 1.0), 8000), "control", 0.01)
    assert not missing_differs(responding(rng, (1.0, 0.0), 100), "control", 0.01)


def test_missing_does_not_differ_where_an_arm_only_has_newer_units() -> None:
    rng = np.random.default_rng(9)
    arm = np.concatenate([rng.random((1, 4000)) < 0.2, rng.random((1, 4000)) < 0.8], axis=1).astype(int)
    early = np.arange(8000).reshape(1, -1) < 4000
    w = 1.0 / np.where((arm == 1) == early, 0.2, 0.8)
    y = np.where(rng.random(arm.shape) < np.where(early, 0.8, 0.2), 1.0, np.nan)
    sums = whole(Units(arm, w, y))

    assert sums["first"].valued / sums["first"].units < 0.5 * sums["control"].valued / sums["control"].units
    assert not missing_differs(sums, "control", 0.05)


def estimated(lift: Interval | None, mean: Interval | None = None) -> ArmEstimate:
    return ArmEstimate("arm", 500, 500, mean, lift, None)


@pytest.mark.parametrize(
    ("lift", "margin", "state"),
    [
        (Interval(0.0, -0.01, 0.01), 0.0, "held"),
        (Interval(0.05, 0.01, 0.09), 0.0, "violated"),
        (Interval(-0.05, -0.09, -0.01), 0.0, "held"),
        (Interval(0.0, -0.01, 0.01), 0.02, "held"),
        (Interval(0.01, -0.01, 0.03), 0.02, "open"),
        (Interval(0.03, 0.01, 0.05), 0.02, "open"),
        (Interval(0.05, 0.03, 0.07), 0.02, "violated"),
        (Interval(0.0, -math.inf, math.inf), 0.0, "open"),
        (Interval(0.0, -math.inf, math.inf), 0.02, "open"),
        (None, 0.0, "open"),
    ],
)
def test_a_guardrail_is_held_violated_or_open(lift: Interval | None, margin: float, state: GuardrailState) -> None:
    control = estimated(None, Interval(0.2, 0.19, 0.21))
    mirrored = None if lift is None else Interval(-lift.estimate, -lift.high, -lift.low)

    assert guardrail_state(estimated(lift), control, "minimise", margin, False) == state
    assert guardrail_state(estimated(mirrored), control, "maximise", margin, False) == state


@pytest.mark.parametrize(("high", "state"), [(0.0, "held"), (8.9, "held"), (9.1, "open"), (10.9, "open")])
def test_a_relative_margin_is_held_by_the_least_that_the_control_may_be(high: float, state: GuardrailState) -> None:
    control = estimated(None, Interval(100.0, 90.0, 110.0))

    assert guardrail_state(estimated(Interval(0.0, -high, high)), control, "minimise", 0.1, True) == state


@pytest.mark.parametrize(("low", "state"), [(9.5, "open"), (10.9, "open"), (11.1, "violated")])
def test_a_relative_margin_is_violated_by_the_most_that_the_control_may_be(low: float, state: GuardrailState) -> None:
    control = estimated(None, Interval(100.0, 90.0, 110.0))

    assert guardrail_state(estimated(Interval(low + 1, low, low + 2)), control, "minimise", 0.1, True) == state


numbers = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=50, deadline=None)
@given(numbers, st.integers(1, 12))
def test_sums_of_intervals_of_time_add_up_to_those_of_all_of_it(rng: np.random.Generator, parts: int) -> None:
    arm = rng.integers(0, 2, (1, 600))
    units = Units(arm, rng.uniform(1.2, 9.0, arm.shape), rng.normal(size=arm.shape), rng.normal(size=arm.shape))
    cuts = [0, *sorted(rng.integers(0, 600, parts - 1)), 600]
    pieces = []
    for at, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):  # noqa: RUF007 (indices beside pairs)
        if end > start:
            part = Units(*(each[:, start:end] for each in (units.arm, units.w, units.y, units.x)))
            pieces += [dataclasses.replace(each, since_ms=60_000 * (at + 1)) for each in whole(part).values()]
    everything = added(pieces)

    for sums in whole(units).values():
        together = dataclasses.asdict(everything[sums.arm])
        assert together.pop("since_ms") == min(each.since_ms for each in pieces)
        assert together == pytest.approx(
            {name: each for name, each in dataclasses.asdict(sums).items() if name != "since_ms"}
        )
    assert added(reversed(pieces)) == everything


@settings(max_examples=50, deadline=None)
@given(numbers, st.floats(-50.0, 50.0), st.floats(0.01, 100.0), st.booleans())
def test_estimates_move_and_stretch_with_the_values(
    rng: np.random.Generator, shift: float, scale: float, covariate: bool
) -> None:
    arm = rng.integers(0, 3, (1, 2400))
    w, x = rng.uniform(2.0, 5.0, arm.shape), rng.normal(size=arm.shape) if covariate else None
    y = rng.normal(size=arm.shape) + (0.0 if x is None else x)
    before = estimates(whole(Units(arm, w, y, x), arms=3), "control", direction="maximise", alpha=0.05)
    moved_x = None if x is None else 3.0 * x - 1.0
    moved = whole(Units(arm, w, shift + scale * y, moved_x), arms=3)
    after = estimates(dict(reversed(moved.items())), "control", direction="maximise", alpha=0.05)

    for old, new in zip(
        before, sorted(after, key=lambda each: [one.arm for one in before].index(each.arm)), strict=True
    ):
        assert old.adjusted == new.adjusted == covariate
        assert new.best == pytest.approx(old.best, abs=1e-6)
        for was, now, moves in ((old.mean, new.mean, shift), (old.lift, new.lift, 0.0)):
            if was is not None:
                expected = [moves + scale * each for each in dataclasses.astuple(was)]
                assert list(dataclasses.astuple(now)) == pytest.approx(expected, abs=1e-6 * scale + 1e-9 * abs(shift))
