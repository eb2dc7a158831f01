"""An experiment in one sentence: what to do and how sure that is; and what may mislead whoever reads its figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prompt_store.experiments.records import ExperimentRecord
from service.experiments.figures import ArmEstimate, Figures, GuardrailState, Interval, MetricFigures
from service.experiments.statistics import BURN_IN_UNITS
from service.experiments.wording import Scale, confidence, is_bounded, p_value, scale_of

Verdict = Literal["promote", "stop", "continue", "unreadable", "ended"]


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do, for a program and in words."""

    verdict: Verdict
    sentence: str


def advice_of(figures: Figures, record: ExperimentRecord) -> Advice:
    """What to do now, or how it ended."""
    if record.state != "running":
        return Advice("ended", _ending(figures, record))
    if figures.sample_ratio.mismatch:
        return Advice("unreadable", f"Do not read this yet: {mismatch_of(figures)}; find the cause first.")
    if figures.units == 0:
        return Advice("continue", "Keep going: no unit has come to an arm yet.")
    return _advice(figures, record)


def sentence_of(figures: Figures, record: ExperimentRecord) -> str:
    """The words of `advice_of`."""
    return advice_of(figures, record).sentence


def caveats_of(figures: Figures) -> tuple[str, ...]:
    """What to keep in mind, a sentence each."""
    found = []
    if figures.sample_ratio.mismatch and figures.state != "running":
        found.append(f"No figure can be believed: {mismatch_of(figures)}.")
    if figures.missing_differs:
        found.append(
            f"Arms differ in how many of their units have a value of {figures.decision.metric}, so their means are "
            "over units that may not be alike; find out why values are missing."
        )
    if figures.mixed:
        found.append(
            "An arm's requests were not all answered by the same version and backend; units count for the arm that was "
            "meant, and what answered is under “As served”."
        )
    if figures.crossed:
        found.append(
            f"{_units(figures.crossed)} saw more than one arm, as happens when weights change; each counts for the "
            "first that it saw."
        )
    if figures.forced:
        asked, count = ("exposure was", "counts") if figures.forced == 1 else ("exposures were", "count")
        found.append(f"{figures.forced:,} {asked} asked for rather than drawn and {count} nowhere.")
    if figures.held_out:
        found.append(
            f"{_units(figures.held_out)} {'was' if figures.held_out == 1 else 'were'} held out and saw no arm."
        )
    return tuple(found)


def mismatch_of(figures: Figures) -> str:
    """Units came to arms as 48.0 to 52.0 where 50 to 50 was drawn (p < 0.0001)."""
    ratio = figures.sample_ratio
    observed, expected = sum(ratio.observed.values()), sum(ratio.expected.values())
    came = " to ".join(f"{100 * ratio.observed.get(arm, 0) / observed:.1f}" for arm in ratio.expected)
    drawn = " to ".join(f"{100 * units / expected:.3g}" for units in ratio.expected.values())
    return f"units came to arms as {came} where {drawn} was drawn ({p_value(ratio.p_value)})"


def margin_of(metric: MetricFigures) -> str:
    """A guardrail's margin in words."""
    if not metric.margin:
        return "no margin"
    size = (
        f"{100 * metric.margin:.3g}% of the control's"
        if metric.relative
        else scale_of(metric).difference(metric.margin)
    )
    return f"a margin of {size}"


def difference_of(metric: MetricFigures, arm: ArmEstimate, control: str, alpha: float, verb: str = "is") -> str:
    """helpful is 4.1 points higher with candidate than with control (95% confidence sequence 1.2 to 7.0 higher)."""
    assert arm.lift is not None, "said of arms whose lift is known"
    scale = scale_of(metric)
    sequence = (
        f"{confidence(alpha)} confidence sequence {_range(arm.lift, scale)}"
        if is_bounded(arm.lift)
        else "too little is known for a confidence sequence"
    )
    if scale.is_nothing(arm.lift):
        return f"{metric.metric} {verb} about the same with {arm.arm} as with {control} ({sequence})"
    side = "higher" if arm.lift.estimate >= 0.0 else "lower"
    judged = ""
    if metric.direction == "minimise" and arm.lift.estimate:
        judged = ", which is worse," if arm.lift.estimate > 0.0 else ", which is better,"
    size = scale.size(arm.lift)
    return f"{metric.metric} {verb} {size} {side}{judged} with {arm.arm} than with {control} ({sequence})"


def winner_of(figures: Figures, record: ExperimentRecord) -> ArmEstimate | None:
    """The arm that may be promoted: surely better, with guardrails held and the units that rules wait for.

    Of several it is the one that is better by most at the least: whose gain's lower bound is the greatest.
    """
    control, *others = figures.decision.arms
    better = {
        arm: gain.low
        for arm in others
        if (gain := figures.decision.gain(arm)) is not None
        and gain.low > 0.0
        and min(arm.units, control.units) >= record.experiment.rules.minimum_units
        and state_of(figures, arm.arm) == "held"
    }
    return max(better, key=lambda arm: better[arm], default=None)


def _advice(figures: Figures, record: ExperimentRecord) -> Advice:
    metric, rules = figures.decision, record.experiment.rules
    control, *others = metric.arms
    broken = [arm for arm in others if state_of(figures, arm.arm) == "violated"]
    if len(broken) == len(others):
        return Advice("stop", f"Stop: {_breaches(figures, broken)}, so no arm may be promoted.")
    gains = {
        arm: gain for arm in others if arm not in broken and (gain := metric.gain(arm)) is not None and is_bounded(gain)
    }
    if not gains:
        return Advice(
            "continue",
            f"Keep going: too little is known of {metric.metric} after {_units(figures.units)}; every arm needs "
            f"{BURN_IN_UNITS} with a value, and values that are not all the same.",
        )
    winner = winner_of(figures, record)
    leader = winner or max(gains, key=lambda arm: (gains[arm].low > 0.0, gains[arm].estimate))
    found = f"{difference_of(metric, leader, control.arm, figures.alpha)} after {_units(figures.units)}"
    if winner is not None:
        return Advice("promote", f"Promote {winner.arm}: {found}{_held(figures, winner)}.")
    if gains[leader].low > 0.0:
        return Advice("continue", f"Keep going: {found}, but {_missing(figures, record, leader)}.")
    if unknown := [arm.arm for arm in others if arm not in gains and arm not in broken]:
        return Advice("continue", f"Keep going: {found}, but too little is known of {_joined(unknown)}.")
    reachable = max(gain.high for gain in gains.values())
    none = f"{_breaches(figures, broken)}, and no other arm" if broken else "no arm"
    if reachable < 0.0:
        stop = f"Stop: {none} can be better than {control.arm}; {found}."
    elif rules.futile_below is not None and reachable < rules.futile_below:
        least = scale_of(metric).difference(rules.futile_below)
        stop = f"Stop: {none} can be better than {control.arm} by {least}; {found}."
    else:
        return Advice("continue", f"Keep going: {found}, so it is not settled which is better.")
    if few := _too_few(metric.arms, rules.minimum_units):
        return Advice("continue", f"Keep going: {found}, but {few}.")
    return Advice("stop", stop)


def _missing(figures: Figures, record: ExperimentRecord, leader: ArmEstimate) -> str:
    """Why an arm that is surely better, and breaks no guardrail, may not be promoted yet."""
    if few := _too_few((leader, figures.decision.arms[0]), record.experiment.rules.minimum_units):
        return few
    return _joined(
        f"it is not settled yet that {_kept(each)}" if each.margin else f"too little is known of {each.metric}"
        for each in _guardrails(figures, leader.arm, "open")
    )


def _too_few(arms: Iterable[ArmEstimate], minimum: int) -> str:
    """Empty where each arm has the units that rules wait for."""
    fewest = min(arm.units for arm in arms)
    return f"an arm has {_units(fewest)} of the {minimum:,} that it should have" if fewest < minimum else ""


def _held(figures: Figures, winner: ArmEstimate) -> str:
    """What speaks for a promotion, and against it."""
    held = _guardrails(figures, winner.arm, "held")
    kept = f", and {_joined(_kept(each) for each in held)}" if held else ""
    return f"{kept}, but first find out why arms differ in missing values" if figures.missing_differs else kept


def _kept(guardrail: MetricFigures) -> str:
    """What it means that a guardrail is held: without a margin, that nothing is known against it."""
    if guardrail.margin:
        return f"{guardrail.metric} stays within {margin_of(guardrail)}"
    return f"{guardrail.metric} is not seen to be worse"


def _ending(figures: Figures, record: ExperimentRecord) -> str:
    when = f" on {record.ended_at:%-d %B %Y}" if record.ended_at is not None else ""
    whom = f" by {record.ended_by}" if record.ended_by else ""
    did = {
        "promoted": f"{record.winner} was promoted",
        "stopped": "Stopped",
        "rolled_back": f"Rolled back to {figures.control}",
    }[record.state]
    reason = record.reason.rstrip(". ")
    why = f": {reason}" if reason else ""
    gains = {arm: gain for arm in figures.decision.arms if (gain := figures.decision.gain(arm)) is not None}
    if not gains:
        return f"{did}{when}{whom}{why}. Nothing was known of {figures.decision.metric} then."
    arm = max(gains, key=lambda each: (each.arm == record.winner, gains[each].estimate))
    if arm.lift is None or not is_bounded(arm.lift):
        few = f"{_units(figures.units)} {'was' if figures.units == 1 else 'were'}"
        return f"{did}{when}{whom}{why}. {few} too few to say anything of {figures.decision.metric}."
    difference = difference_of(figures.decision, arm, figures.control, figures.alpha, "was")
    return f"{did}{when}{whom}{why}. After {_units(figures.units)}, {difference}."


def state_of(figures: Figures, arm: str) -> GuardrailState:
    """The worst state of an arm's guardrails."""
    states = [each.states.get(arm, "held") for each in figures.metrics if each.states is not None]
    return next((state for state in ("violated", "open") if state in states), "held")


def _guardrails(figures: Figures, arm: str, state: GuardrailState) -> list[MetricFigures]:
    return [each for each in figures.metrics if each.states is not None and each.states.get(arm) == state]


def _breaches(figures: Figures, arms: Iterable[ArmEstimate]) -> str:
    """candidate makes latency_ms worse than a margin of 50 ms allows."""

    def worse(metric: MetricFigures) -> str:
        return f"{metric.metric} worse" + (f" than {margin_of(metric)} allows" if metric.margin else "")

    return _joined(
        f"{arm.arm} makes {_joined(worse(each) for each in _guardrails(figures, arm.arm, 'violated'))}" for arm in arms
    )


def _range(lift: Interval, scale: Scale) -> str:
    """1.2 to 7.0 higher, 1.2 to 7.0 lower, or 2.0 lower to 7.0 higher where it spans zero."""
    decimals = scale.decimals(lift)
    low, high = (f"{abs(bound) * scale.factor:,.{decimals}f}" for bound in (lift.low, lift.high))
    if lift.low < 0.0 < lift.high:
        return f"{low} lower to {high} higher"
    return f"{low} to {high} higher" if lift.low >= 0.0 else f"{high} to {low} lower"


def _joined(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def _units(count: int) -> str:
    return f"{count:,} unit{'' if count == 1 else 's'}"
