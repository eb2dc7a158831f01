"""The bodies of experiments over HTTP in both directions, as pydantic models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Self

from litestar.openapi.spec import OpenAPIMediaType, Operation, Reference, RequestBody
from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from prompt_store.experiments.experiment import Experiment
from prompt_store.experiments.records import ExperimentEvent, ExperimentRecord, State
from prompt_store.experiments.starting import StartPlan
from prompt_store.routing.routes import TaskRoute
from service.api.bodies import JSON
from service.experiments.acting import Report
from service.experiments.advice import Verdict
from service.experiments.figures import Direction, GuardrailState
from service.experiments.reporting import document_of, record_document


@dataclass
class StartOperation(Operation):
    """Describes the body that is read as a document, so that all that is wrong with it is answered, not the first."""

    def __post_init__(self) -> None:
        self.request_body = RequestBody(
            {JSON: OpenAPIMediaType(Reference("#/components/schemas/Experiment"))}, required=True
        )


class EndBody(BaseModel):
    """Why, for the history."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    reason: str = ""


class PromoteBody(EndBody):
    """The arm that wins; `despite_mismatch` promotes it though units came otherwise than drawn, and needs a reason."""

    arm: str
    despite_mismatch: bool = False


class WeightsBody(EndBody):
    """The share of every arm; they sum to 1."""

    weights: dict[str, float] = Field(min_length=1)


class ExperimentBody(BaseModel):
    """An experiment's state; `weights` and `versions` are by arm, `experiment` is the document that started it."""

    object: Literal["experiment"] = "experiment"
    name: str
    task: str
    state: State
    revision: int
    weights: dict[str, float]
    versions: dict[str, list[str]]
    started_at: datetime
    started_by: str
    ended_at: datetime | None
    ended_by: str
    reason: str
    winner: str | None
    experiment: Experiment

    @classmethod
    def of(cls, record: ExperimentRecord) -> Self:
        document = record_document(record)
        del document["document"]
        return cls(**document, experiment=record.experiment)


class ExperimentListBody(BaseModel):
    """Experiments, those that started last first."""

    object: Literal["list"] = "list"
    data: list[ExperimentBody]


class StartTrialBody(BaseModel):
    """What starting an experiment would do: the task's route, and the versions that each arm is pinned to."""

    object: Literal["experiment.trial"] = "experiment.trial"
    experiment: Experiment
    route: TaskRoute
    weights: dict[str, float]
    versions: dict[str, list[str]]
    warnings: list[str]

    @classmethod
    def of(cls, experiment: Experiment, planned: StartPlan) -> Self:
        return cls(
            experiment=experiment,
            route=planned.route,
            weights=dict(planned.weights),
            versions={arm: list(labels) for arm, labels in planned.versions.items()},
            warnings=list(planned.warnings),
        )


class IntervalBody(BaseModel):
    """An estimate and its confidence sequence now; a bound is null where it is infinite."""

    estimate: float | None
    low: float | None
    high: float | None


class ArmBody(BaseModel):
    """One metric of one arm; `lift` is against the control, `best` the probability that it is the best."""

    arm: str
    units: int
    valued: int
    mean: IntervalBody | None
    lift: IntervalBody | None
    best: float | None
    adjusted: bool


class MetricBody(BaseModel):
    """One metric of every arm, the control first; what a guardrail alone has is null of other metrics."""

    metric: str
    direction: Direction
    role: Literal["decision", "guardrail", "beside"]
    arms: list[ArmBody]
    guardrail: GuardrailState | None
    states: dict[str, GuardrailState] | None
    margin: float | None
    relative: bool
    boolean: bool


class SampleRatioBody(BaseModel):
    """Whether units came to arms as they were drawn."""

    e_value: float | None
    p_value: float
    alpha: float
    mismatch: bool
    expected: dict[str, float]
    observed: dict[str, int]


class MomentBody(BaseModel):
    """The decision metric of the units that had come by then, by arm."""

    at_ms: int
    units: dict[str, int]
    means: dict[str, IntervalBody]
    lifts: dict[str, IntervalBody]


class ServedBody(BaseModel):
    """Of an arm's generations, those that a version on a backend answered: by its digest, and by its label, if any."""

    arm: str
    version: str
    backend: str
    generations: int
    units: int
    mean: float | None
    label: str | None


@pydantic_dataclass
class ReportBody:
    """All that is known of an experiment: what to do in a sentence first. It is what `softcue experiments show` has.

    A dataclass, as a model of pydantic's can have no field `schema`.
    """

    schema: str
    verdict: Verdict
    sentence: str
    caveats: list[str]
    record: ExperimentBody
    experiment: str
    task: str
    state: State
    control: str
    at_ms: int
    metrics: list[MetricBody]
    sample_ratio: SampleRatioBody
    history: list[MomentBody]
    served: list[ServedBody]
    exposures: int
    units: int
    crossed: int
    forced: int
    held_out: int
    alpha: float
    missing_differs: bool
    mixed: bool
    object: Literal["experiment.report"] = "experiment.report"

    @classmethod
    def of(cls, report: Report) -> Self:
        document = document_of(report.figures, report.record)
        return cls(**{**document, "record": ExperimentBody.of(report.record)})


class ExperimentEventBody(BaseModel):
    """One thing that was done to an experiment; `details` are the numbers that it rests on."""

    action: str
    at: datetime
    principal: str
    reason: str
    details: Mapping[str, Any]

    @classmethod
    def of(cls, event: ExperimentEvent) -> Self:
        return cls(
            action=event.action, at=event.at, principal=event.principal, reason=event.reason, details=event.details
        )


class ExperimentHistoryBody(BaseModel):
    """What was done to an experiment, newest first."""

    object: Literal["list"] = "list"
    data: list[ExperimentEventBody]
