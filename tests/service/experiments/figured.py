"""Records and figures as values, for what is made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from prompt_store.experiments.experiment import Experiment, parse_experiment
from prompt_store.experiments.records import ExperimentRecord
from service.experiments.figures import (
    ArmEstimate,
    Figures,
    GuardrailState,
    Interval,
    MetricFigures,
    Moment,
    SampleRatio,
    ServedFigures,
)

STARTED = datetime(2026, 11, 2, 9, tzinfo=UTC)
STARTED_MS = round(STARTED.timestamp() * 1000)
HOUR_MS = 3_600_000
UNBOUNDED = (-math.inf, math.inf)


def experiment(arms: Sequence[str] = ("control", "candidate"), **changes: Any) -> Experiment:
    document = {
        "name": "friendlier",
        "task": "copy",
        "control": arms[0],
        "arms": [
            {"name": arm, "weight": 1 / len(arms), "version": f"v{place}"} for place, arm in enumerate(arms, start=1)
        ],
        "metric": "helpful",
    }
    return parse_experiment({**document, **changes})


def record(of: Experiment | None = None, **changes: Any) -> ExperimentRecord:
    of = of or experiment()
    fields: dict[str, Any] = {
        "experiment": of,
        "state": "running",
        "revision": 1,
        "weights": {arm.name: arm.weight for arm in of.arms},
        "versions": {arm.name: (arm.version,) for arm in of.arms},
        "started_at": STARTED,
        "started_by": "anna",
    }
    return ExperimentRecord(**{**fields, **changes})


def metric(
    lifts: Mapping[str, tuple[float, float, float] | None],
    *,
    name: str = "helpful",
    base: float = 0.5,
    units: int = 1000,
    control: str = "control",
    **changes: Any,
) -> MetricFigures:
    """The control at `base`, and each arm with a lift (estimate, low, high) over it, None where none is known."""

    def mean(lift: tuple[float, float, float]) -> Interval:
        half = (lift[2] - lift[1]) / 2
        return Interval(base + lift[0], base + lift[0] - half, base + lift[0] + half)

    halves = [(lift[2] - lift[1]) / 2 for lift in lifts.values() if lift is not None]
    half = min([math.inf, *halves])
    arms = [ArmEstimate(control, units, units, Interval(base, base - half, base + half), None, 0.1)]
    for arm, lift in lifts.items():
        if lift is None:
            arms.append(ArmEstimate(arm, units, 0, None, None, None))
        else:
            arms.append(ArmEstimate(arm, units, units, mean(lift), Interval(*lift), 0.9 / len(lifts)))
    fields: dict[str, Any] = {"direction": "maximise", "role": "decision", "boolean": True}
    return MetricFigures(name, arms=tuple(arms), **{**fields, **changes})


def guardrail(
    lifts: Mapping[str, tuple[float, float, float] | None], states: Mapping[str, GuardrailState], **changes: Any
) -> MetricFigures:
    """latency_ms, which may be 50 ms longer than the control's 800."""
    fields: dict[str, Any] = {
        "name": "latency_ms",
        "base": 800.0,
        "direction": "minimise",
        "role": "guardrail",
        "margin": 50.0,
        "boolean": False,
    }
    worst = min(states.values(), key=["violated", "open", "held"].index)
    return metric(lifts, states=states, guardrail=worst, **{**fields, **changes})


def history(of: MetricFigures, moments: int) -> tuple[Moment, ...]:
    """Sequences that close in on what the metric has now, by the root of time; the first have no bounds."""
    found = []
    for place in range(1, moments + 1):
        part = place / moments
        means, lifts = {}, {}
        for number, arm in enumerate(of.arms):
            wave = 0.4 * math.sin(9 * part + 2 * number) * (1 - part) / part**0.5
            for target, now in ((means, arm.mean), (lifts, arm.lift)):
                if now is not None:
                    half = (now.high - now.low) / 2
                    bounds = (half / part**0.6, half / part**0.6) if place > 2 else (math.inf, math.inf)
                    estimate = now.estimate + wave * (half if math.isfinite(half) else 0.1)
                    target[arm.arm] = Interval(estimate, estimate - bounds[0], estimate + bounds[1])
        units = {arm.arm: round(arm.units * part) for arm in of.arms}
        found.append(Moment(STARTED_MS + place * 6 * HOUR_MS, units, means, lifts))
    return tuple(found)


def ratio(observed: Mapping[str, int], expected: Mapping[str, float], p_value: float = 1.0) -> SampleRatio:
    return SampleRatio(1 / p_value, p_value, 0.001, p_value < 0.001, expected, observed)


def figures(*metrics: MetricFigures, moments: int = 20, **changes: Any) -> Figures:
    decision = metrics[0]
    units = {arm.arm: arm.units for arm in decision.arms}
    total = sum(units.values())
    past = history(decision, moments)
    fields: dict[str, Any] = {
        "experiment": "friendlier",
        "task": "copy",
        "state": "running",
        "control": decision.arms[0].arm,
        "at_ms": STARTED_MS + moments * 6 * HOUR_MS,
        "metrics": metrics,
        "sample_ratio": ratio(units, {arm: total / len(units) for arm in units}),
        "history": past,
        "served": tuple(
            ServedFigures(arm, f"{place:064x}", "local", 3 * count, count, 0.5)
            for place, (arm, count) in enumerate(units.items())
        ),
        "exposures": 3 * total,
        "units": total,
        "crossed": 0,
        "forced": 0,
        "held_out": 0,
        "alpha": 0.05,
        "missing_differs": False,
        "mixed": False,
    }
    return Figures(**{**fields, **changes})
