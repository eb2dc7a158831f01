"""What is known of an experiment at one moment: estimates with their sequences, checks, and what to do.

`statistics` estimates, `sample_ratio` tests, `reporting` puts them together and says it in a sentence; `decisions` acts
on the same figures. All of it may be looked at at any time: intervals are those of confidence sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Direction = Literal["maximise", "minimise"]
GuardrailState = Literal["held", "open", "violated"]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence sequence's bounds now; infinite bounds where too little is known."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ArmEstimate:
    """One metric of one arm over `valued` of its `units`.

    `mean` is of the metric as it is. `lift` is arm less control, in the metric's own unit and sign; `best` the
    probability that the arm is the best by the metric's direction. Both are None where they cannot be said, and lift of
    the control. `adjusted` says that a pre-period covariate made it narrower.
    """

    arm: str
    units: int
    valued: int
    mean: Interval | None
    lift: Interval | None
    best: float | None
    adjusted: bool = False


@dataclass(frozen=True, slots=True)
class Moment:
    """The decision metric of the units that came until `at_ms`, so many an arm: means and lifts by arm.

    Values are those that are known now: an outcome that came late counts from its unit's first exposure on.
    """

    at_ms: int
    units: Mapping[str, int]
    means: Mapping[str, Interval]
    lifts: Mapping[str, Interval]


@dataclass(frozen=True, slots=True)
class MetricFigures:
    """One metric over all arms, the control first. `guardrail` is the worst state of any arm, `states` each arm's.

    A `relative` margin is a share of the control's mean. The mean of a `boolean` metric is a share of the units.
    """

    metric: str
    direction: Direction
    role: Literal["decision", "guardrail", "beside"]
    arms: tuple[ArmEstimate, ...]
    guardrail: GuardrailState | None = None
    states: Mapping[str, GuardrailState] | None = None
    margin: float | None = None
    relative: bool = False
    boolean: bool = False

    def gain(self, arm: ArmEstimate) -> Interval | None:
        """An arm's lift, turned so that more is better."""
        if arm.lift is None or self.direction == "maximise":
            return arm.lift
        return Interval(-arm.lift.estimate, -arm.lift.high, -arm.lift.low)


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """Whether units came to arms as often as their probabilities say: an e-value, and the p-value 1 / e.

    `mismatch` where p is below `alpha`. `expected` and `observed` are units by arm over all allocations.
    """

    e_value: float
    p_value: float
    alpha: float
    mismatch: bool
    expected: Mapping[str, float]
    observed: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ServedFigures:
    """As served: of one arm's generations, those that a version on a backend answered. A description, no comparison.

    `version` is a digest, and `label` what people call it; None where it was deleted, or the base answered alone.
    """

    arm: str
    version: str
    backend: str
    generations: int
    units: int
    mean: float | None
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything. `missing_differs` says that arms differ in how many units have a value, so means may mislead."""

    experiment: str
    task: str
    state: str
    control: str
    at_ms: int
    metrics: tuple[MetricFigures, ...]
    sample_ratio: SampleRatio
    history: tuple[Moment, ...]
    served: tuple[ServedFigures, ...]
    exposures: int
    units: int
    crossed: int
    forced: int
    held_out: int
    alpha: float
    missing_differs: bool
    mixed: bool

    @property
    def decision(self) -> MetricFigures:
        """The metric that decides."""
        return next(each for each in self.metrics if each.role == "decision")
