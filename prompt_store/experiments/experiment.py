"""An Experiment as a document: arms, what they are judged by, and what may be decided without asking.

`records` keeps them with their state, `files` reads them from TOML. Names are used once in a store: an experiment's
name salts which units see which arm, and what happened under a name is analysed together.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from prompt_store.errors import InvalidExperiment, InvalidName, Place, nearest_name
from prompt_store.ledger.entries import HOLDOUT
from prompt_store.names import check_alias, check_task_name, check_texts, parse_selector
from prompt_store.routing.routes import DEFAULT_ALIAS, MAX_BRANCHES, Route, in_words, problems_of

_FROZEN = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
_Share = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False, strict=True)]


def _checked(check: Any) -> AfterValidator:
    def validate(text: str) -> str:
        try:
            check(text)
        except InvalidName as error:
            raise ValueError(str(error)) from error
        return text

    return AfterValidator(validate)


_Name = Annotated[str, _checked(check_task_name)]  # experiments follow the grammar of tasks
_ArmName = Annotated[str, Field(min_length=1, max_length=64)]  # as the arms of a split
_MetricName = Annotated[str, Field(min_length=1, max_length=64)]


class ExperimentArm(BaseModel):
    """One side: a version of the task, in the place of the alias in the task's route, or a route of its own.

    With neither, the arm is the task's route as it is when the experiment starts.
    """

    model_config = _FROZEN

    name: _ArmName
    weight: _Share
    version: Annotated[str, _checked(parse_selector)] | None = None
    route: Route | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.version is not None and self.route is not None:
            raise ValueError(f"arm {self.name!r} has a version and a route; give it one of the two")
        if self.name == HOLDOUT:
            raise ValueError(f"no arm may be called {HOLDOUT!r}, as units are that see none; choose another name")
        return self


class Guardrail(BaseModel):
    """A metric that an arm must not make worse than the control by more than `margin`, or that share of the control's.

    With a margin it is held once no more than that is still possible; without one, while nothing worse is shown.
    """

    model_config = _FROZEN

    metric: _MetricName
    margin: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    relative: bool = False


class Judge(BaseModel):
    """A task that scores a sample of answers: it is asked with the inputs of the judged task and `answer`.

    What it says is a number, or a label or text that `scores` gives one; it becomes the value of `metric`.
    """

    model_config = _FROZEN

    task: _Name
    metric: _MetricName
    sample: _Share = 0.1
    version: Annotated[str, _checked(parse_selector)] | None = None
    scores: dict[str, float] = Field(default_factory=dict)


class Thompson(BaseModel):
    """Weights follow the probability that each arm is best, none under `floor`, every so many minutes."""

    model_config = _FROZEN

    floor: float = Field(default=0.05, gt=0.0, le=0.5, allow_inf_nan=False)
    every_minutes: float = Field(default=60.0, gt=0.0, allow_inf_nan=False)


class RollBack(BaseModel):
    """All traffic goes back to the control where an arm fails more, or is slower, for `minutes` one after another.

    `error_rate_by` is the excess over the control's share of errors, `p95_latency_by` that over its 95th percentile as
    a share of it. Minutes in which the arm or the control answered less than `minimum_requests` say nothing.
    """

    model_config = _FROZEN

    error_rate_by: float | None = Field(default=None, gt=0.0, le=1.0, allow_inf_nan=False)
    p95_latency_by: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    minutes: int = Field(default=5, ge=1, le=1440)
    minimum_requests: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.error_rate_by is None and self.p95_latency_by is None:
            raise ValueError("roll_back names no limit; give error_rate_by or p95_latency_by")
        return self


class Rules(BaseModel):
    """What is decided without asking; with `dry_run` it is only recommended.

    `promote`: an arm whose lift's lower bound is above 0, with guardrails held and no sample-ratio mismatch.
    `futile_below`: the experiment is stopped once no arm's lift can reach this. Both wait for `minimum_units` an arm.
    """

    model_config = _FROZEN

    promote: bool = False
    futile_below: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    roll_back: RollBack | None = None
    minimum_units: int = Field(default=100, ge=1)
    dry_run: bool = False


class Experiment(BaseModel):
    """One experiment on a task's traffic. Without `arms` it is on the split of that name that the task's route has.

    `metric` decides, `guardrails` must hold, `metrics` are shown beside. `missing` says what a unit without an outcome
    counts as. `holdout` is the share of units that see none of it, and `targeting` the attributes that a request must
    have, each one of those values, to take part. Weights stay as they are without `thompson`.
    """

    model_config = _FROZEN

    name: _Name
    task: _Name
    control: _ArmName
    arms: tuple[ExperimentArm, ...] = Field(default=(), max_length=MAX_BRANCHES)
    metric: _MetricName
    guardrails: tuple[Guardrail, ...] = ()
    metrics: tuple[_MetricName, ...] = ()
    description: str = ""
    alpha: float = Field(default=0.05, gt=0.0, lt=0.5, allow_inf_nan=False)
    missing: Literal["ignore", "zero"] = "ignore"
    holdout: float = Field(default=0.0, ge=0.0, le=0.5, allow_inf_nan=False)
    targeting: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(default_factory=dict)
    thompson: Thompson | None = None
    rules: Rules = Rules()
    judge: Judge | None = None
    alias: Annotated[str, _checked(check_alias)] = DEFAULT_ALIAS

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = [*self._twice(), *(self._arm_faults() if self.arms else [])]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _twice(self) -> Iterator[str]:
        guards = [guardrail.metric for guardrail in self.guardrails]
        named = [self.metric, *guards, *self.metrics]
        for name in sorted({name for name in named if named.count(name) > 1}):
            yield f"metric {name!r} is named twice; it decides, guards or stands beside, so name it once"

    def _arm_faults(self) -> Iterator[str]:
        names = [arm.name for arm in self.arms]
        if len(names) < 2:
            yield "an experiment needs two arms; add one, or leave arms out to use the route's split"
        if len(set(names)) < len(names):
            yield "two arms have the same name; name each arm once"
        if self.control not in names:
            near = nearest_name(self.control, names)
            hint = f"did you mean {near!r}?" if near is not None else f"name one of {', '.join(names)}"
            yield f"the control {self.control!r} is none of the arms; {hint}"
        if abs((whole := math.fsum(arm.weight for arm in self.arms)) - 1.0) > 1e-6:
            yield f"the arms' weights sum to {whole:.6g}; they must sum to 1"
        if (fault := self.floor_fault(len(names))) is not None:
            yield fault

    def floor_fault(self, arms: int) -> str | None:
        """What is wrong with the floor for so many arms."""
        if self.thompson is None or self.thompson.floor * arms <= 1.0:
            return None
        return f"a floor of {self.thompson.floor:g} for {arms} arms is more than there is; lower it"

    def document(self) -> dict[str, Any]:
        """As JSON values, without what is left at its default; routes whole, as their kinds are defaults too."""
        document = self.model_dump(mode="json", exclude_defaults=True)
        for arm, dumped in zip(self.arms, document.get("arms", ()), strict=True):
            if arm.route is not None:
                dumped["route"] = arm.route.model_dump(mode="json", exclude_none=True)
        return document


def parse_experiment(document: Mapping[str, Any]) -> Experiment:
    """Raises InvalidExperiment with every problem at its place, and for an unknown key that nearest to it."""
    check_texts("text of the experiment", document, InvalidExperiment)
    try:
        return Experiment.model_validate(dict(document))
    except RecursionError as error:
        raise InvalidExperiment("the experiment is nested too deeply; flatten it") from error
    except ValidationError as error:
        raise InvalidExperiment.of(problems_of(error, _in_words)) from error


_TABLES: dict[Place, type[BaseModel]] = {
    (): Experiment,
    ("arms",): ExperimentArm,
    ("guardrails",): Guardrail,
    ("judge",): Judge,
    ("thompson",): Thompson,
    ("rules",): Rules,
    ("rules", "roll_back"): RollBack,
}


def _in_words(place: Place, kind: str, message: str) -> str:
    if "route" in place:
        return in_words(place, kind, message)
    names = tuple(step for step in place if isinstance(step, str))
    if kind == "extra_forbidden" and (table := _TABLES.get(names[:-1])) is not None:
        known = list(table.model_fields)
        near = nearest_name(names[-1], known)
        hint = f"did you mean {near!r}?" if near is not None else f"the known ones are {', '.join(known)}"
        return f"there is no such key; {hint}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "this is no table; write one (an object in JSON)"
    return in_words(place, kind, message)
