"""A report as one HTML page that needs nothing else: the sentence, tables and plots. `report.html` lays it out.

It is read with any browser, in light and dark, and on paper; whatever people named is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from prompt_store.experiments.records import ExperimentEvent, ExperimentRecord
from service.experiments import plots, wording
from service.experiments.advice import advice_of, caveats_of, margin_of
from service.experiments.figures import ArmEstimate, Figures, Interval, MetricFigures, ServedFigures
from service.experiments.plots import Series, Span
from service.experiments.wording import Scale, is_bounded, scale_of

_ACTIONS = {
    "experiment.start": "started",
    "experiment.stop": "stopped",
    "experiment.promote": "promoted",
    "experiment.roll_back": "rolled back",
    "experiment.reweight": "weights changed",
    "experiment.recommend": "recommended",
}


def page_of(figures: Figures, record: ExperimentRecord, events: Sequence[ExperimentEvent]) -> str:
    """The page; `events` are the experiment's history, newest first."""
    return _template().render(_Page(figures, record).content(events))


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


@dataclass(frozen=True, slots=True)
class _Page:
    figures: Figures
    record: ExperimentRecord

    def content(self, events: Sequence[ExperimentEvent]) -> dict[str, Any]:
        figures, record = self.figures, self.record
        advice = advice_of(figures, record)
        decision = figures.decision
        scale = scale_of(decision)
        return {
            "figures": figures,
            "experiment": record.experiment,
            "record": record,
            "advice": advice,
            "caveats": caveats_of(figures),
            "state": record.state.replace("_", " "),
            "facts": self._facts(),
            "confidence": wording.confidence(figures.alpha),
            "decision": decision,
            "difference_unit": scale.difference_unit.strip(),
            "arms": [self._arm(arm, decision) for arm in decision.arms],
            "lifts": self._lifts() if len(decision.arms) > 1 else None,
            "means": self._means(),
            "ratio": self._ratio(),
            "ratio_test": self._ratio_in_words(),
            "guardrails": [self._guardrail(place, each) for place, each in enumerate(self._of_role("guardrail"))],
            "beside": [self._metric(each) for each in figures.metrics if each.role != "decision"],
            "served": [self._served(each) for each in figures.served],
            "events": [_event(each) for each in events],
            "rules": self._rules(),
            "at": _moment(datetime.fromtimestamp(figures.at_ms / 1000, UTC)),
            "started": _moment(record.started_at),
            "ended": _moment(record.ended_at) if record.ended_at is not None else None,
        }

    def _of_role(self, role: str) -> list[MetricFigures]:
        return [each for each in self.figures.metrics if each.role == role]

    def _facts(self) -> list[tuple[str, str]]:
        """What stands in large figures: how much was seen, for how long, and how sure the best arm is."""
        record, figures = self.record, self.figures
        until_s = figures.at_ms / 1000 if record.ended_at is None else record.ended_at.timestamp()
        lasted = wording.duration(max(until_s - record.started_at.timestamp(), 0.0))
        best = max((arm for arm in figures.decision.arms if arm.best is not None), key=_best, default=None)
        readable = figures.units and not figures.sample_ratio.mismatch
        sure = [(f"{best.arm} is best", wording.share(best.best))] if best is not None and readable else []
        return [
            ("units", f"{figures.units:,}"),
            ("exposures", f"{figures.exposures:,}"),
            ("so far" if record.ended_at is None else "in all", lasted),
            *sure,
        ]

    def _place(self, arm: str) -> int:
        """Where an arm stands among the arms, the control first; behind them all where it is none of them."""
        names = [each.arm for each in self.figures.decision.arms]
        return names.index(arm) if arm in names else len(names)

    def _colour(self, arm: str) -> int:
        place = self._place(arm)
        return 0 if place == 0 else 1 + (place - 1) % (plots.ARM_COLOURS - 1)

    def _arm(self, arm: ArmEstimate, metric: MetricFigures) -> dict[str, Any]:
        bounds = [
            bound
            for each in metric.arms
            if each.lift is not None and is_bounded(each.lift)
            for bound in (each.lift.low, each.lift.high, each.lift.estimate)
        ]
        low, high = min([0.0, *bounds]), max([0.0, *bounds])
        scale = scale_of(metric)
        drawn = None
        if metric is self.figures.decision and arm.lift is not None and is_bounded(arm.lift):
            title = f"{arm.arm} against {self.figures.control}: {_in_words(arm.lift, scale)}"
            drawn = plots.interval(f"lift-{self._place(arm.arm)}", title, arm.lift, low, high, self._colour(arm.arm))
        return {
            "name": arm.arm,
            "colour": self._colour(arm.arm),
            "versions": ", ".join(self.record.versions.get(arm.arm, ())) or wording.UNKNOWN,
            "weight": wording.share(self.record.weights.get(arm.arm), 1),
            "units": f"{arm.units:,}",
            "valued": f"{arm.valued:,}",
            "mean": scale.mean(arm.mean),
            "mean_bounds": scale.bounds(arm.mean),
            "lift": scale.lift(arm.lift),
            "lift_bounds": scale.bounds(arm.lift),
            "best": wording.share(arm.best, 1),
            "adjusted": arm.adjusted,
            "drawn": drawn,
            "control": arm.arm == self.figures.control,
            "winner": arm.arm == self.record.winner,
            "judged": _judged(arm, metric),
        }

    def _series(self, intervals: Sequence[Mapping[str, Interval]], say: Callable[[Interval], str]) -> list[Series]:
        found = []
        for arm in self.figures.decision.arms:
            points = [
                (moment.at_ms, each[arm.arm], f"{arm.arm}, {_short(moment.at_ms)}: {say(each[arm.arm])}, "
                 f"{moment.units.get(arm.arm, 0):,} units")
                for moment, each in zip(self.figures.history, intervals, strict=True)
                if arm.arm in each
            ]  # fmt: skip
            if points:
                found.append(Series(arm.arm, self._colour(arm.arm), points))
        return found

    def _time(self) -> tuple[int, int]:
        start_ms = round(self.record.started_at.timestamp() * 1000)
        moments = [moment.at_ms for moment in self.figures.history]
        return min([start_ms, *moments]), max([start_ms, *moments])

    def _lifts(self) -> Markup:
        metric = self.figures.decision
        scale = scale_of(metric)
        newest = [f"{arm.arm} {_in_words(arm.lift, scale)}" for arm in metric.arms if arm.lift is not None]
        return plots.over_time(
            "lifts",
            f"Lift of {metric.metric} over {self.figures.control}, over time",
            f"Now: {'; '.join(newest) or 'nothing is known yet'}. The line at zero is {self.figures.control}.",
            self._series([moment.lifts for moment in self.figures.history], lambda lift: _in_words(lift, scale)),
            *self._time(),
            factor=scale.factor,
            zero=True,
        )

    def _means(self) -> Markup:
        metric = self.figures.decision
        scale = scale_of(metric)

        def say(mean: Interval) -> str:
            return f"{scale.mean(mean)} ({scale.bounds(mean)})" if is_bounded(mean) else scale.mean(mean)

        newest = [f"{arm.arm} {say(arm.mean)}" for arm in metric.arms if arm.mean is not None]
        return plots.over_time(
            "means",
            f"{metric.metric} by arm, over time",
            f"Now: {'; '.join(newest) or 'nothing is known yet'}.",
            self._series([moment.means for moment in self.figures.history], say),
            *self._time(),
            factor=scale.factor,
            limits=(0.0, 1.0) if metric.boolean else (-math.inf, math.inf),
        )

    def _ratio(self) -> Markup | None:
        ratio = self.figures.sample_ratio
        observed, expected = sum(ratio.observed.values()), sum(ratio.expected.values())
        if not observed or not expected:
            return None
        rows = [
            (arm, self._colour(arm), ratio.observed.get(arm, 0) / observed, ratio.expected[arm] / expected,
             f"{ratio.observed.get(arm, 0):,} of {ratio.expected[arm]:,.0f}")
            for arm in sorted(ratio.expected, key=self._place)
        ]  # fmt: skip
        told = "; ".join(f"{arm} {seen:.1%} where {drawn:.1%} was drawn" for arm, _, seen, drawn, _ in rows)
        return plots.shares("ratio", "Units by arm, observed against expected", f"{told}.", rows)

    def _ratio_in_words(self) -> str:
        ratio = self.figures.sample_ratio
        said = f"{wording.p_value(ratio.p_value)} at any time, against a limit of {ratio.alpha:g}"
        if ratio.mismatch:
            return f"Mismatch: {said}. What is shown here may be wrong until its cause is found."
        return f"No mismatch: {said}."

    def _guardrail(self, place: int, metric: MetricFigures) -> dict[str, Any]:
        scale = scale_of(metric)
        control, *others = metric.arms
        margin = metric.margin or 0.0
        if metric.relative:
            margin *= abs(control.mean.estimate) if control.mean is not None else 0.0
        limit = math.copysign(margin, 1.0 if metric.direction == "minimise" else -1.0)
        states = metric.states or {}
        rows = [
            Span(arm.arm, self._colour(arm.arm), arm.lift, states.get(arm.arm, "open"),
                 f"{states.get(arm.arm, 'open')}, {scale.lift(arm.lift)}")
            for arm in others
        ]  # fmt: skip
        told = "; ".join(f"{row.name} {row.state}, {_in_words(row.lift, scale)}" for row in rows)
        side = "above" if metric.direction == "minimise" else "below"
        return {
            "name": metric.metric,
            "rule": f"Worse is {side} {self.figures.control}, with {margin_of(metric)}.",
            "unit": scale.difference_unit.strip(),
            "plot": plots.against_margin(
                f"guardrail-{place}",
                f"{metric.metric}: lift over {self.figures.control} against its margin",
                f"{told}. With {margin_of(metric)}.",
                rows,
                limit,
                factor=scale.factor,
            ),
        }

    def _metric(self, metric: MetricFigures) -> dict[str, Any]:
        return {
            "name": metric.metric,
            "direction": "lower is better" if metric.direction == "minimise" else "higher is better",
            "arms": [
                {**self._arm(arm, metric), "state": (metric.states or {}).get(arm.arm, "")} for arm in metric.arms
            ],
        }

    def _served(self, served: ServedFigures) -> dict[str, Any]:
        generations = sum(each.generations for each in self.figures.served if each.arm == served.arm)
        return {
            "arm": served.arm,
            "colour": self._colour(served.arm),
            "version": served.label or served.version[:12],
            "backend": served.backend,
            "generations": f"{served.generations:,}",
            "share": wording.share(served.generations / generations if generations else None, 1),
            "units": f"{served.units:,}",
            "mean": scale_of(self.figures.decision).mean(
                Interval(served.mean, -math.inf, math.inf) if served.mean is not None else None
            ),
        }

    def _rules(self) -> list[str]:
        experiment, rules = self.record.experiment, self.record.experiment.rules
        metric, scale = experiment.metric, scale_of(self.figures.decision)
        found = []
        if rules.promote:
            found.append(f"promote an arm whose lift of {metric} is surely better, with guardrails held")
        if rules.futile_below is not None:
            found.append(f"stop when no arm can gain {scale.difference(rules.futile_below)}")
        if (back := rules.roll_back) is not None:
            limits = []
            if back.error_rate_by is not None:
                limits.append(f"errors exceed the control's by {100 * back.error_rate_by:g} points")
            if back.p95_latency_by is not None:
                limits.append(f"p95 latency exceeds the control's by {100 * back.p95_latency_by:g}%")
            found.append(f"roll back when {' or '.join(limits)} for {back.minutes} minutes")
        if experiment.thompson is not None:
            found.append(f"weights follow how likely each arm is best, none under {experiment.thompson.floor:.0%}")
        if found and rules.dry_run:
            found.append("all of it is only recommended")
        return found


def _best(arm: ArmEstimate) -> float:
    return arm.best or 0.0


def _judged(arm: ArmEstimate, metric: MetricFigures) -> str:
    """Whether an arm is surely better or worse: a class of the page."""
    if arm.lift is None or arm.lift.low <= 0.0 <= arm.lift.high:
        return ""
    return "better" if (arm.lift.low > 0.0) == (metric.direction == "maximise") else "worse"


def _in_words(lift: Interval | None, scale: Scale) -> str:
    if lift is None or not is_bounded(lift):
        return scale.lift(lift)
    return f"{scale.lift(lift)} ({scale.bounds(lift)})"


def _event(event: ExperimentEvent) -> dict[str, Any]:
    return {
        "at": _moment(event.at),
        "action": _ACTIONS.get(event.action, event.action.removeprefix("experiment.").replace("_", " ")),
        "principal": event.principal,
        "reason": event.reason,
        "details": json.dumps(dict(event.details), indent=2, ensure_ascii=False) if event.details else "",
    }


def _moment(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%-d %B %Y, %H:%M} UTC"


def _short(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%-d %b %H:%M}"
