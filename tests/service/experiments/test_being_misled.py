"""How often an experiment's advice misleads who looks at it all the time, in simulated experiments of 2,000 runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator

from prompt_store.ledger.sums import AllocationCount, ExperimentSums, UnitSums
from service.experiments.advice import Advice, advice_of
from service.experiments.figures import Direction, GuardrailState
from service.experiments.reporting import figures_of
from service.experiments.statistics import estimates, guardrail_state
from tests.service.experiments.figured import HOUR_MS, STARTED_MS, experiment, record
from tests.service.experiments.simulating import ARMS, RUNS, Array, Sums, Units, at, excesses, most, running

AT_ONCE = 200
ALPHA = 0.05
STEP = 10

Draw = Callable[[Generator, tuple[int, int]], Array]


def helped(rng: Generator, shape: tuple[int, int]) -> Array:
    return (rng.random(shape) < 0.3).astype(float)


def failed(rng: Generator, shape: tuple[int, int]) -> Array:
    return (rng.random(shape) < 0.01).astype(float)


def costs(rng: Generator, shape: tuple[int, int]) -> Array:
    """Most are nothing, and the others skewed: an answer that another backend had to give."""
    return np.where(rng.random(shape) < 0.05, rng.lognormal(0.0, 1.0, shape), 0.0)


def latencies(rng: Generator, shape: tuple[int, int]) -> Array:
    return rng.lognormal(6.0, 1.0, shape)


def drawn(rng: Generator, draw: Draw, shares: Sequence[float], units: int) -> Units:
    arm = np.searchsorted(np.cumsum(shares)[:-1], rng.random((AT_ONCE, units)), side="right")
    return Units(arm, 1.0 / np.array(shares)[arm], draw(rng, arm.shape))


def advised(known: dict[str, UnitSums], weights: dict[str, float], direction: Direction, boolean: bool) -> Advice:
    """What a report says of one metric's sums, without rules of its own."""
    counted = {arm: each.units for arm, each in known.items()}
    sums = ExperimentSums(
        metrics={"it": list(known.values())},
        allocations=[AllocationCount(1, weights, counted)],
        served=[],
        exposures=sum(counted.values()),
        crossed=0,
        forced=0,
        held_out=0,
    )
    of = record(experiment(tuple(known), metric="it", alpha=ALPHA))
    booleans = {"it"} if boolean else set()
    return advice_of(figures_of(of, sums, {"it": direction}, STARTED_MS + HOUR_MS, booleans=booleans), of)


def at_the_look_that_promises_most(
    units: Units, arms: int, direction: Direction, boolean: bool
) -> Iterator[dict[str, UnitSums]]:
    """By run, the sums at the look at which some arm is further above the control than any at any other."""
    sums = [running(units, place, STEP) for place in range(arms)]
    sign = 1.0 if direction == "maximise" else -1.0
    gains = sign * excesses(sums, alpha=ALPHA, boolean=boolean)
    for run, look in enumerate(np.argmax(gains.max(axis=0), axis=1)):
        yield at(sums, run, look)


@pytest.mark.parametrize(
    ("draw", "direction", "shares"),
    [
        (helped, "maximise", (0.5, 0.5)),
        (helped, "maximise", (0.25, 0.25, 0.25, 0.25)),
        (failed, "minimise", (0.9, 0.1)),
        (costs, "minimise", (0.9, 0.1)),
    ],
)
def test_no_more_than_alpha_of_experiments_whose_arms_are_equal_ever_advise_to_promote(
    draw: Draw, direction: Direction, shares: tuple[float, ...]
) -> None:
    rng = np.random.default_rng(1)
    boolean = draw is not costs
    weights = dict(zip(ARMS, shares, strict=False))
    verdicts = [
        advised(known, weights, direction, boolean).verdict
        for _ in range(RUNS // AT_ONCE)
        for known in at_the_look_that_promises_most(drawn(rng, draw, shares, 3000), len(shares), direction, boolean)
    ]

    assert len(verdicts) == RUNS
    assert verdicts.count("promote") <= most(ALPHA)


def test_the_better_of_four_arms_is_what_advice_says_to_promote() -> None:
    rng = np.random.default_rng(2)
    units = drawn(rng, helped, (0.25,) * 4, 4000)
    better = np.where((units.arm == 2) & (rng.random(units.arm.shape) < 0.2), 1.0, units.y)
    found = [
        advised(known, dict.fromkeys(ARMS, 0.25), "maximise", True).sentence
        for known in at_the_look_that_promises_most(Units(units.arm, units.w, better), 4, "maximise", True)
    ]

    assert sum(sentence.startswith("Promote second: ") for sentence in found) >= 0.9 * AT_ONCE


def states(sums: Sequence[Sums], truth: float, direction: Direction, margin: float, relative: bool) -> Iterator[Any]:
    """By run, a guardrail's states at the two looks at which the lift is the furthest from `truth` on either side.

    The first of the two is on the side that is worse.
    """
    sign = 1.0 if direction == "minimise" else -1.0
    worse = sign * excesses(sums, alpha=ALPHA, truth=truth)[0]
    for run in range(len(worse)):
        found = []
        for look in (np.argmax(worse[run]), np.argmin(worse[run])):
            control, arm = estimates(at(sums, run, look), ARMS[0], direction=direction, alpha=ALPHA)
            found.append(guardrail_state(arm, control, direction, margin, relative))
        yield tuple(found)


def limited(
    rng: Generator, draw: Draw, harm: float, direction: Direction, margin: float, relative: bool
) -> list[tuple[GuardrailState, GuardrailState]]:
    """States of an arm whose values are `harm` times the margin worse than the control's, at the worst looks."""
    found: list[Any] = []
    for _ in range(RUNS // AT_ONCE):
        units = drawn(rng, draw, (0.7, 0.3), 2000)
        sign = 1.0 if direction == "minimise" else -1.0
        change = sign * harm * margin
        y = np.where(units.arm == 1, units.y * (1.0 + change) if relative else units.y + change, units.y)
        limit = sign * margin * (float(np.exp(6.5)) if relative else 1.0)
        sums = [running(Units(units.arm, units.w, y), place, STEP) for place in range(2)]
        found += states(sums, limit, direction, margin, relative)
    return found


@pytest.mark.parametrize("direction", ["minimise", "maximise"])
@pytest.mark.parametrize(("margin", "relative"), [(0.1, True), (100.0, False)])
def test_a_guardrail_at_its_margin_is_neither_held_nor_violated_more_often_than_alpha(
    direction: Direction, margin: float, relative: bool
) -> None:
    found = limited(np.random.default_rng(3), latencies, 1.0, direction, margin, relative)

    assert sum(worse == "violated" for worse, _ in found) <= most(ALPHA)
    assert sum(better == "held" for _, better in found) <= most(ALPHA)


@pytest.mark.parametrize("direction", ["minimise", "maximise"])
def test_a_guardrail_without_a_margin_is_violated_by_equal_arms_no_more_often_than_alpha(
    direction: Direction,
) -> None:
    found = limited(np.random.default_rng(4), latencies, 0.0, direction, 0.0, False)

    assert sum(worse == "violated" for worse, _ in found) <= most(ALPHA)


@pytest.mark.parametrize("direction", ["minimise", "maximise"])
def test_a_guardrail_finds_harm_and_that_there_is_none(direction: Direction) -> None:
    harmed = limited(np.random.default_rng(5), latencies, 6.0, direction, 200.0, False)
    harmless = limited(np.random.default_rng(5), latencies, -2.0, direction, 200.0, False)

    assert sum(worse == "violated" for worse, _ in harmed) > 0.9 * RUNS
    assert sum(better == "held" for _, better in harmless) > 0.9 * RUNS
