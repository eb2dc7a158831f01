"""Sums put together into figures, and figures as a document."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import timedelta

import pytest

from prompt_store.ledger.sums import AllocationCount, ExperimentSums, ServedCount, UnitSums
from service.experiments.figures import Direction
from service.experiments.reporting import MOST_MOMENTS, SCHEMA, document_of, figures_of, numbers_of
from tests.service.experiments.figured import HOUR_MS, STARTED, STARTED_MS, experiment, record

DIRECTIONS: dict[str, Direction] = {"helpful": "maximise", "latency_ms": "minimise", "cost": "minimise"}


def of_units(arm: str, values: Sequence[float], since_ms: int = STARTED_MS, *, missing: int = 0) -> UnitSums:
    """The sums of units with these values, each drawn with probability a half, and of some without a value."""
    units, valued = len(values) + missing, len(values)
    total, squares = math.fsum(values), math.fsum(value * value for value in values)
    return UnitSums(
        arm, since_ms, units, 2.0 * units, 4.0 * units, valued,
        w=2.0 * valued, wy=2.0 * total, ww=4.0 * valued, wwy=4.0 * total, wwyy=4.0 * squares,
    )  # fmt: skip


def shares(good: int, bad: int) -> list[float]:
    return [1.0] * good + [0.0] * bad


def sums(**changes: object) -> ExperimentSums:
    """900 units an arm over three hours, of which the candidate helps more."""
    parts = [
        of_units(arm, shares(good, 300 - good), STARTED_MS + hour * HOUR_MS)
        for hour in range(3)
        for arm, good in (("candidate", 210), ("control", 150))
    ]
    fields: dict[str, object] = {
        "metrics": {"helpful": parts},
        "allocations": [
            AllocationCount(1, {"control": 0.5, "candidate": 0.5}, {"control": 900, "candidate": 900}),
        ],
        "served": [
            ServedCount("candidate", "b" * 64, "local", 900, 900, 0.7),
            ServedCount("control", "a" * 64, "local", 900, 900, 0.5),
        ],
        "exposures": 2500,
        "crossed": 3,
        "forced": 2,
        "held_out": 1,
    }
    return ExperimentSums(**{**fields, **changes})  # type: ignore[arg-type]


NOW_MS = STARTED_MS + 4 * HOUR_MS


def test_the_control_comes_first_and_lifts_are_against_it() -> None:
    figures = figures_of(record(), sums(), DIRECTIONS, NOW_MS, booleans={"helpful"})
    control, candidate = figures.decision.arms
    assert (control.arm, control.lift, candidate.arm) == ("control", None, "candidate")
    assert candidate.lift is not None
    assert candidate.lift.estimate == pytest.approx(0.2)
    assert candidate.lift.low > 0.0
    assert (figures.decision.boolean, figures.decision.role, figures.units) == (True, "decision", 1800)
    assert (figures.exposures, figures.crossed, figures.forced, figures.held_out) == (2500, 3, 2, 1)
    assert figures.sample_ratio.observed == {"control": 900, "candidate": 900}


def test_what_is_known_of_a_boolean_stays_between_0_and_1_then_and_now() -> None:
    parts = [
        of_units(arm, shares(good, 150 - good), STARTED_MS + hour * HOUR_MS)
        for hour in range(2)
        for arm, good in (("candidate", 149), ("control", 1))
    ]
    told = [
        figures_of(record(), sums(metrics={"helpful": parts}), DIRECTIONS, NOW_MS, booleans=booleans)
        for booleans in (set(), {"helpful"})
    ]
    lows, highs = (
        [
            [getattr(each.means[arm], bound) for each in figures.history]
            + [getattr(each.mean, bound) for each in figures.decision.arms if each.arm == arm]
            for figures in told
        ]
        for arm, bound in (("control", "low"), ("candidate", "high"))
    )
    assert max(lows[0]) < 0.0
    assert min(highs[0]) > 1.0
    assert lows[1] == [0.0] * 3
    assert highs[1] == [1.0] * 3


def test_what_was_served_has_the_label_of_its_version() -> None:
    figures = figures_of(record(), sums(), DIRECTIONS, NOW_MS, labels={"a" * 64: "v1"})
    assert [(each.arm, each.label) for each in figures.served] == [("control", "v1"), ("candidate", None)]


def test_history_is_what_was_known_at_the_end_of_each_interval() -> None:
    figures = figures_of(record(), sums(), DIRECTIONS, NOW_MS)
    assert [moment.at_ms for moment in figures.history] == [STARTED_MS + hour * HOUR_MS for hour in (1, 2, 4)]
    assert [moment.units["control"] for moment in figures.history] == [300, 600, 900]
    widths = [moment.lifts["candidate"].high - moment.lifts["candidate"].low for moment in figures.history]
    assert widths == sorted(widths, reverse=True)
    assert figures.history[-1].lifts["candidate"] == figures.decision.arms[1].lift


def test_a_long_history_is_thinned_and_keeps_the_newest() -> None:
    parts = [of_units("control", [1.0, 0.0], STARTED_MS + hour * HOUR_MS) for hour in range(5 * MOST_MOMENTS + 1)]
    figures = figures_of(record(), sums(metrics={"helpful": parts}), DIRECTIONS, parts[-1].since_ms + HOUR_MS)
    assert len(figures.history) <= MOST_MOMENTS
    newest = figures.history[-1]
    assert (newest.at_ms, newest.units["control"]) == (parts[-1].since_ms + HOUR_MS, 2 * len(parts))


def test_the_history_of_an_ended_experiment_ends_with_it() -> None:
    ended = record(state="stopped", ended_at=STARTED + timedelta(hours=3), ended_by="anna")
    figures = figures_of(ended, sums(), DIRECTIONS, NOW_MS)
    assert (figures.history[-1].at_ms, figures.at_ms, figures.state) == (STARTED_MS + 3 * HOUR_MS, NOW_MS, "stopped")


def test_arms_without_units_are_there_and_say_nothing() -> None:
    figures = figures_of(record(), sums(metrics={}, allocations=[], served=[]), DIRECTIONS, NOW_MS)
    assert [(arm.arm, arm.units, arm.mean, arm.lift) for arm in figures.decision.arms] == [
        ("control", 0, None, None),
        ("candidate", 0, None, None),
    ]
    assert (figures.units, figures.history, figures.missing_differs, figures.mixed) == (0, (), False, False)


def test_guardrails_have_a_state_for_each_arm_and_the_worst_of_all() -> None:
    times = [800.0 + place % 40 for place in range(900)]
    parts = {
        "control": times,
        "quick": [value - 100.0 for value in times],
        "slow": [value + 100.0 for value in times],
    }
    arms = list(parts)
    guarded = experiment(
        arms, guardrails=[{"metric": "latency_ms", "margin": 0.05, "relative": True}], metrics=["cost"]
    )
    found = {"latency_ms": [of_units(arm, values) for arm, values in parts.items()]}
    figures = figures_of(record(guarded), sums(metrics=found), DIRECTIONS, NOW_MS)
    decision, latency, cost = figures.metrics
    assert [each.role for each in (decision, latency, cost)] == ["decision", "guardrail", "beside"]
    assert latency.states == {"quick": "held", "slow": "violated"}
    assert (latency.guardrail, latency.margin, latency.relative) == ("violated", 0.05, True)
    assert (cost.states, cost.guardrail, cost.metric) == (None, None, "cost")


def test_an_arm_that_two_versions_or_backends_answered_is_mixed() -> None:
    second = ServedCount("candidate", "c" * 64, "away", 40, 30, None)
    figures = figures_of(record(), sums(served=[*sums().served, second]), DIRECTIONS, NOW_MS)
    assert figures.mixed
    assert [(each.arm, each.generations) for each in figures.served] == [
        ("control", 900),
        ("candidate", 900),
        ("candidate", 40),
    ]
    assert not figures_of(record(), sums(), DIRECTIONS, NOW_MS).mixed


def test_arms_that_lose_other_shares_of_their_values_are_told() -> None:
    parts = [of_units("control", shares(450, 450)), of_units("candidate", shares(450, 150), missing=300)]
    assert figures_of(record(), sums(metrics={"helpful": parts}), DIRECTIONS, NOW_MS).missing_differs


def test_the_document_is_json_with_null_for_what_is_infinite() -> None:
    few = {"helpful": [of_units("control", [1.0, 0.0]), of_units("candidate", [1.0, 1.0])]}
    document = document_of(figures_of(record(), sums(metrics=few), DIRECTIONS, NOW_MS), record())
    read = json.loads(json.dumps(document, allow_nan=False))
    assert (read["schema"], read["verdict"]) == (SCHEMA, "continue")
    assert read["sentence"].startswith("Keep going: too little is known of helpful after 4 units")
    assert read["metrics"][0]["arms"][1]["lift"] == {"estimate": 0.5, "low": None, "high": None}
    assert set(read) == {
        "schema", "verdict", "sentence", "caveats", "record", "experiment", "task", "state", "control", "at_ms",
        "metrics", "sample_ratio", "history", "served", "exposures", "units", "crossed", "forced", "held_out", "alpha",
        "missing_differs", "mixed",
    }  # fmt: skip
    assert read["record"]["document"]["metric"] == "helpful"


def test_the_numbers_of_an_act_are_those_of_its_arm_and_the_control() -> None:
    arms = experiment(["control", "candidate", "other"])
    figures = figures_of(record(arms), sums(), DIRECTIONS, NOW_MS)
    numbers = json.loads(json.dumps(numbers_of(figures, "candidate"), allow_nan=False))
    assert [arm["arm"] for arm in numbers["metrics"]["helpful"]["arms"]] == ["control", "candidate"]
    assert numbers["sample_ratio"]["mismatch"] is False
    assert len(numbers_of(figures)["metrics"]["helpful"]["arms"]) == 3
