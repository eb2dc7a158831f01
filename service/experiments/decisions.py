"""What the rules of an experiment decide: from its figures, its arms' health and its history. Pure.

`roll_back` asks for no statistics and comes first, as harm must end even where these cannot be made. `judge` decides
the rest. Nothing is decided on figures with a sample-ratio mismatch: whatever made units go missing may have made the
difference too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

from prompt_store.experiments.experiment import RollBack as RollBackRule
from prompt_store.experiments.records import ExperimentEvent, ExperimentRecord
from prompt_store.ledger.sums import MinuteHealth
from service.experiments.advice import difference_of, mismatch_of, winner_of
from service.experiments.best import with_floor
from service.experiments.figures import ArmEstimate, Figures
from service.experiments.reporting import numbers_of
from service.experiments.wording import scale_of

MINUTE_MS = 60_000

_LEAST_CHANGE = 0.01
"""Weights that would change by less stay: each change moves units from arm to arm."""

_UNSETTLED_MINUTES = 2
"""The current minute and the one before, to which replicas whose clocks differ may still be adding."""


@dataclass(frozen=True, slots=True)
class _Decision:
    """`numbers` caused it, as JSON values with null for what is not known or infinite."""

    reason: str
    numbers: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Promote(_Decision):
    action: ClassVar[str] = "promote"
    arm: str


@dataclass(frozen=True, slots=True)
class Stop(_Decision):
    action: ClassVar[str] = "stop"


@dataclass(frozen=True, slots=True)
class RollBack(_Decision):
    """The whole experiment goes back to the control, whatever its other arms do; `arm` is the first that does harm."""

    action: ClassVar[str] = "roll_back"
    arm: str


@dataclass(frozen=True, slots=True)
class Reweight(_Decision):
    action: ClassVar[str] = "reweight"
    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Block(_Decision):
    """Nothing is decided because of a sample-ratio mismatch; `arm` would be promoted without it, None where none."""

    action: ClassVar[str] = "block"
    arm: str | None


@dataclass(frozen=True, slots=True)
class Resume(_Decision):
    """The mismatch that blocked decisions is not there any more."""

    action: ClassVar[str] = "resume"


Decision = Promote | Stop | RollBack | Reweight | Block | Resume


def health_since_ms(rule: RollBackRule, now_ms: int) -> int:
    """The beginning of the first minute that `roll_back` looks at."""
    return _minutes(rule, now_ms)[0] * MINUTE_MS


def roll_back(record: ExperimentRecord, health: Sequence[MinuteHealth], now_ms: int) -> RollBack | None:
    """Where an arm fails more or is slower than its rule allows, in each of so many minutes up to the last settled one.

    A minute in which it or the control answered too few requests, or none, says nothing, so the count begins anew.
    """
    rule = record.experiment.rules.roll_back
    if rule is None:
        return None
    minutes = _minutes(rule, now_ms)
    known = {(each.arm, each.minute): each for each in health}
    control = record.experiment.control
    harmful: dict[str, list[tuple[MinuteHealth, MinuteHealth]]] = {}
    for arm in record.weights:
        pairs = [(known.get((arm, minute)), known.get((control, minute))) for minute in minutes]
        told = [(own, other) for own, other in pairs if own is not None and other is not None]
        if arm != control and len(told) == len(minutes) and all(_is_bad(rule, *pair) for pair in told):
            harmful[arm] = told
    if not harmful:
        return None
    until = datetime.fromtimestamp((minutes[-1] + 1) * MINUTE_MS / 1000, UTC)
    said = "; ".join(_health_in_words(control, pairs) for pairs in harmful.values())
    return RollBack(
        f"in each of {len(minutes)} minutes until {until:%H:%M} UTC {' and '.join(harmful)} went beyond what is "
        f"allowed: {said}",
        {
            "arm": next(iter(harmful)),
            "rule": rule.model_dump(mode="json", exclude_none=True),
            "minutes": {
                arm: [
                    {"at_ms": own.minute * MINUTE_MS, "arm": _facts(own), "control": _facts(other)}
                    for own, other in pairs
                ]
                for arm, pairs in harmful.items()
            },
        },
        next(iter(harmful)),
    )


def rests_on_figures(record: ExperimentRecord) -> bool:
    """Whether `judge` could decide anything."""
    rules = record.experiment.rules
    return rules.promote or rules.futile_below is not None or record.experiment.thompson is not None


def judge(
    record: ExperimentRecord, figures: Figures, history: Sequence[ExperimentEvent], now_ms: int
) -> Promote | Stop | Reweight | Block | Resume | None:
    """What to do about a running experiment; `history` is newest first. None where nothing is to be done or said."""
    if not rests_on_figures(record):
        return None
    promotion = _promote(record, figures)
    if figures.sample_ratio.mismatch:
        return _block(figures, promotion.arm if promotion is not None else None)
    found = promotion or _stop(record, figures) or _reweight(record, figures, history, now_ms)
    if found is None and (said := _newest_recommendation(history)) is not None and said["action"] == Block.action:
        return Resume("there is no sample-ratio mismatch any more; rules decide again", numbers_of(figures))
    return found


def was_said(decision: Decision, history: Sequence[ExperimentEvent]) -> bool:
    """Whether the last recommendation of an experiment, of a history that is newest first, is this one."""
    said = _newest_recommendation(history)
    if said is None or said["action"] != decision.action or said.get("arm") != decision.numbers.get("arm"):
        return False
    return not isinstance(decision, Reweight) or not _differ(said["weights"], decision.weights)


def _minutes(rule: RollBackRule, now_ms: int) -> range:
    end = now_ms // MINUTE_MS + 1 - _UNSETTLED_MINUTES
    return range(end - rule.minutes, end)


def _is_bad(rule: RollBackRule, own: MinuteHealth, control: MinuteHealth) -> bool:
    if min(own.requests, control.requests) < rule.minimum_requests:
        return False
    if rule.error_rate_by is not None and _error_rate(own) - _error_rate(control) > rule.error_rate_by:
        return True
    if rule.p95_latency_by is None or own.p95_latency_ms is None or control.p95_latency_ms is None:
        return False
    return own.p95_latency_ms > control.p95_latency_ms * (1.0 + rule.p95_latency_by)


def _error_rate(health: MinuteHealth) -> float:
    return health.errors / health.requests


def _facts(health: MinuteHealth) -> dict[str, Any]:
    return {
        "requests": health.requests,
        "errors": health.errors,
        "error_rate": _error_rate(health),
        "p95_latency_ms": health.p95_latency_ms,
    }


def _health_in_words(control: str, pairs: Sequence[tuple[MinuteHealth, MinuteHealth]]) -> str:
    def said(minutes: Sequence[MinuteHealth]) -> str:
        share = sum(each.errors for each in minutes) / sum(each.requests for each in minutes)
        slowest = max((each.p95_latency_ms for each in minutes if each.p95_latency_ms is not None), default=None)
        return f"{share:.1%} failed" + (f" and p95 latency was up to {slowest:,.0f} ms" if slowest is not None else "")

    own, others = zip(*pairs, strict=True)
    return f"of {own[0].arm} {said(own)}, of {control} {said(others)}"


def _promote(record: ExperimentRecord, figures: Figures) -> Promote | None:
    winner = winner_of(figures, record)
    if not record.experiment.rules.promote or winner is None:
        return None
    guardrails = ", with guardrails held" if any(each.role == "guardrail" for each in figures.metrics) else ""
    return Promote(
        f"{_difference(figures, winner)}{guardrails}",
        {**numbers_of(figures, winner.arm), "arm": winner.arm},
        winner.arm,
    )


def _stop(record: ExperimentRecord, figures: Figures) -> Stop | None:
    """Where every arm is known so well that none can still be better by as much as would matter."""
    rules = record.experiment.rules
    _, *others = figures.decision.arms
    reachable = {arm: gain.high for arm in others if (gain := figures.decision.gain(arm)) is not None}
    if (
        rules.futile_below is None
        or len(reachable) < len(others)
        or max(reachable.values()) >= rules.futile_below
        or min(arm.units for arm in figures.decision.arms) < rules.minimum_units
    ):
        return None
    nearest = max(reachable, key=lambda arm: reachable[arm])
    least = scale_of(figures.decision).difference(rules.futile_below)
    return Stop(
        f"no arm can be better than {figures.control} by {least}; {_difference(figures, nearest)}",
        {**numbers_of(figures), "futile_below": rules.futile_below},
    )


def _reweight(
    record: ExperimentRecord, figures: Figures, history: Sequence[ExperimentEvent], now_ms: int
) -> Reweight | None:
    thompson = record.experiment.thompson
    best = {arm.arm: arm.best for arm in figures.decision.arms if arm.best is not None}
    if thompson is None or len(best) < len(record.weights):
        return None
    since_ms = round(_last_weighed(record, history).timestamp() * 1000)
    if now_ms - since_ms < thompson.every_minutes * MINUTE_MS:
        return None
    weights = with_floor(best, thompson.floor)
    if not _differ(record.weights, weights):
        return None
    chances = ", ".join(f"{arm} {chance:.1%}" for arm, chance in best.items())
    return Reweight(
        f"the arms are best with a probability of {chances}; weights follow, none under {thompson.floor:g}",
        {**numbers_of(figures), "best": best, "before": dict(record.weights), "weights": weights},
        weights,
    )


def _block(figures: Figures, arm: str | None) -> Block:
    promotion = f"promotion of {arm}" if arm is not None else "promotion"
    return Block(
        f"{promotion} blocked by sample-ratio mismatch, as is all that rests on these figures: {mismatch_of(figures)}; "
        "find the cause",
        {**numbers_of(figures), "arm": arm},
        arm,
    )


def _last_weighed(record: ExperimentRecord, history: Sequence[ExperimentEvent]) -> datetime:
    """When weights were last set or recommended."""
    weighed = (
        event.at
        for event in history
        if event.action == "experiment.reweight" or event.details.get("action") == Reweight.action
    )
    return next(weighed, record.started_at)


def _newest_recommendation(history: Sequence[ExperimentEvent]) -> Mapping[str, Any] | None:
    return next((event.details for event in history if event.action == "experiment.recommend"), None)


def _differ(weights: Mapping[str, float], others: Mapping[str, float]) -> bool:
    return any(abs(weight - others.get(arm, 0.0)) >= _LEAST_CHANGE for arm, weight in weights.items())


def _difference(figures: Figures, arm: ArmEstimate) -> str:
    return f"{difference_of(figures.decision, arm, figures.control, figures.alpha)} after {figures.units:,} units"
