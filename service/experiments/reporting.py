"""What people see of an experiment: sums put together into Figures, a sentence that says what to do, and a document.

`statistics` and `sample_ratio` know the formulas; here it is only said which of them a report needs. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

from prompt_store.experiments.experiment import Guardrail
from prompt_store.experiments.records import ExperimentRecord
from prompt_store.ledger.sums import ExperimentSums, UnitSums
from service.experiments.advice import advice_of, caveats_of
from service.experiments.figures import (
    Direction,
    Figures,
    GuardrailState,
    MetricFigures,
    Moment,
    SampleRatio,
    ServedFigures,
)
from service.experiments.sample_ratio import sample_ratio
from service.experiments.statistics import added, estimates, guardrail_state, missing_differs

SCHEMA = "softcue.experiment-report/1"
MOST_MOMENTS = 120

_NOTHING: dict[str, Any] = dict.fromkeys(("units", "uw", "uww", "valued", "w", "wy", "ww", "wwy", "wwyy"), 0)
_WORST_FIRST: tuple[GuardrailState, ...] = ("violated", "open", "held")


def figures_of(
    record: ExperimentRecord,
    sums: ExperimentSums,
    directions: Mapping[str, Direction],
    now_ms: int,
    *,
    booleans: Collection[str] = (),
    labels: Mapping[str, str] = MappingProxyType({}),
) -> Figures:
    """All figures of an experiment.

    `booleans` are those of its metrics whose values are true or false, `labels` those of versions by their digest.
    """
    experiment = record.experiment
    arms = [experiment.control, *(arm for arm in record.weights if arm != experiment.control)]

    def figures(name: str, **role: Any) -> MetricFigures:
        totals, boolean = _totals(arms, sums.metrics.get(name, ())), name in booleans
        found = estimates(
            totals, experiment.control, direction=directions[name], alpha=experiment.alpha, boolean=boolean
        )
        return MetricFigures(name, directions[name], arms=found, boolean=boolean, **role)

    def guarded(guardrail: Guardrail) -> MetricFigures:
        limits = {"margin": guardrail.margin, "relative": guardrail.relative}
        metric = figures(guardrail.metric, role="guardrail", **limits)
        control, *others = metric.arms
        states = {
            arm.arm: guardrail_state(arm, control, metric.direction, guardrail.margin, guardrail.relative)
            for arm in others
        }
        worst = next(state for state in _WORST_FIRST if state in states.values())
        return replace(metric, guardrail=worst, states=states)

    guardrails = [guarded(each) for each in experiment.guardrails]
    judged = {experiment.metric, *(each.metric for each in guardrails)}
    beside = [figures(name, role="beside") for name in dict.fromkeys(experiment.metrics) if name not in judged]
    decision = figures(experiment.metric, role="decision")
    deciding = [each for each in sums.metrics.get(experiment.metric, ()) if each.arm in arms]
    served = tuple(
        ServedFigures(
            each.arm, each.version, each.backend, each.generations, each.units, each.mean, labels.get(each.version)
        )
        for each in sorted(sums.served, key=lambda each: (_place(arms, each.arm), -each.generations))
    )
    last_ms = now_ms if record.ended_at is None else min(now_ms, round(record.ended_at.timestamp() * 1000))
    return Figures(
        experiment=experiment.name,
        task=experiment.task,
        state=record.state,
        control=experiment.control,
        at_ms=now_ms,
        metrics=(decision, *guardrails, *beside),
        sample_ratio=_in_order(sample_ratio(sums.allocations), arms),
        history=tuple(_history(arms, deciding, decision, experiment.alpha, last_ms)),
        served=served,
        exposures=sums.exposures,
        units=sum(arm.units for arm in decision.arms),
        crossed=sums.crossed,
        forced=sums.forced,
        held_out=sums.held_out,
        alpha=experiment.alpha,
        missing_differs=missing_differs(_totals(arms, deciding), experiment.control, experiment.alpha),
        mixed=len({each.arm for each in served}) < len(served),
    )


def _in_order(ratio: SampleRatio, arms: Sequence[str]) -> SampleRatio:
    """The same, with the arms in their order; those that there are no longer stand last."""
    order = sorted(ratio.expected, key=lambda arm: _place(arms, arm))
    return replace(
        ratio,
        expected={arm: ratio.expected[arm] for arm in order},
        observed={arm: ratio.observed[arm] for arm in order},
    )


def document_of(figures: Figures, record: ExperimentRecord) -> dict[str, Any]:
    """A report as JSON values, for notebooks: keys are only ever added to a schema of this number.

    `schema`; `verdict` (promote, stop, continue, unreadable or ended) with its `sentence`, and `caveats`; `record`: the
    experiment's document, state, revision, weights and versions by arm, when and by whom it started and ended; and
    under its own names all that Figures has: `metrics` (the decision metric first, each with its `arms`, the control
    first), `sample_ratio`, `history`, `served` and counts. An interval is `estimate`, `low` and `high`, a bound null
    where it is infinite. Times are ISO 8601 in `record` and Unix milliseconds elsewhere.
    """
    advice = advice_of(figures, record)
    return {
        "schema": SCHEMA,
        "verdict": advice.verdict,
        "sentence": advice.sentence,
        "caveats": list(caveats_of(figures)),
        "record": record_document(record),
        **_finite(asdict(figures)),
    }


def record_document(record: ExperimentRecord) -> dict[str, Any]:
    """An experiment's state as JSON values."""
    return {
        "name": record.experiment.name,
        "task": record.experiment.task,
        "state": record.state,
        "revision": record.revision,
        "weights": dict(record.weights),
        "versions": {arm: list(versions) for arm, versions in record.versions.items()},
        "started_at": record.started_at.isoformat(),
        "started_by": record.started_by,
        "ended_at": _iso(record.ended_at),
        "ended_by": record.ended_by,
        "reason": record.reason,
        "winner": record.winner,
        "document": record.experiment.document(),
    }


def numbers_of(figures: Figures, arm: str | None = None) -> dict[str, Any]:
    """What an act on an experiment rests on, for the audit trail: of one arm against the control, or of all arms."""
    metrics = {
        metric.metric: {
            "direction": metric.direction,
            "role": metric.role,
            "margin": metric.margin,
            "arms": [asdict(each) for each in metric.arms if arm is None or each.arm in (arm, figures.control)],
            "states": dict(metric.states) if metric.states is not None else None,
        }
        for metric in figures.metrics
    }
    numbers = {
        "at_ms": figures.at_ms,
        "units": figures.units,
        "alpha": figures.alpha,
        "metrics": metrics,
        "sample_ratio": asdict(figures.sample_ratio),
    }
    return dict(_finite(numbers))


def _totals(arms: Sequence[str], sums: Sequence[UnitSums]) -> dict[str, UnitSums]:
    """Sums by arm in the order of `arms`, one without units too."""
    found = added(each for each in sums if each.arm in arms)
    return {arm: found.get(arm) or UnitSums(arm=arm, since_ms=0, **_NOTHING) for arm in arms}


def _history(
    arms: Sequence[str], sums: Sequence[UnitSums], metric: MetricFigures, alpha: float, last_ms: int
) -> list[Moment]:
    """The decision `metric` at the end of each interval of the sums, at most so many of them, the newest included."""
    control = arms[0]
    begun: dict[int, list[UnitSums]] = {}
    for each in sums:
        begun.setdefault(each.since_ms, []).append(each)
    starts = sorted(begun)
    ends = [*starts[1:], max([last_ms, *starts[-1:]])]
    step = math.ceil(len(starts) / MOST_MOMENTS) or 1
    kept = set(range(len(starts) - 1, -1, -step))
    totals = _totals(arms, ())
    found = []
    for place, (start_ms, end_ms) in enumerate(zip(starts, ends, strict=False)):
        totals = _totals(arms, [*totals.values(), *begun[start_ms]])
        if place not in kept:
            continue
        known = estimates(
            totals, control, direction=metric.direction, alpha=alpha, boolean=metric.boolean, chances=False
        )
        found.append(
            Moment(
                end_ms,
                {arm.arm: arm.units for arm in known},
                {arm.arm: arm.mean for arm in known if arm.mean is not None},
                {arm.arm: arm.lift for arm in known if arm.lift is not None},
            )
        )
    return found


def _place(arms: Sequence[str], arm: str) -> tuple[int, str]:
    return (arms.index(arm) if arm in arms else len(arms), arm)


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for it."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment is not None else None
