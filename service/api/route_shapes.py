"""The bodies of routes over HTTP in both directions, as pydantic models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal, Self

from litestar.openapi.spec import OpenAPIMediaType, Operation, Reference, RequestBody
from pydantic import BaseModel, ConfigDict, Field

from prompt_store.routing.revisions import AppliedRoute, RouteRevision
from prompt_store.routing.routes import TaskRoute
from prompt_store.routing.shadows import ShadowAnswer, ShadowSummary
from service.api.bodies import JSON


@dataclass
class ApplyOperation(Operation):
    """Describes the body that is read as a document, so that all that is wrong with it is answered, not the first."""

    def __post_init__(self) -> None:
        self.request_body = RequestBody(
            {JSON: OpenAPIMediaType(Reference("#/components/schemas/TaskRoute"))}, required=True
        )


class RouteRollbackBody(BaseModel):
    """`to` is the revision to put in force again; without it, what was in force before."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    to: int | None = Field(None, ge=1, lt=2**31)
    reason: str = ""


class RouteBody(BaseModel):
    """A task's route and since when it is in force, by whom and why.

    Revision 0 is the route of a task that none was applied to. `restores` is the revision that a rollback went back to.
    """

    object: Literal["route"] = "route"
    task: str
    revision: int
    route: TaskRoute
    reason: str
    restores: int | None
    created_at: datetime | None
    principal: str | None

    @classmethod
    def of(cls, task: str, revision: RouteRevision | None, **more: Any) -> Self:
        if revision is None:
            unapplied = {"revision": 0, "reason": "", "restores": None, "created_at": None, "principal": None}
            return cls(task=task, route=TaskRoute(), **unapplied, **more)
        return cls(
            task=task,
            revision=revision.number,
            route=revision.route,
            reason=revision.reason,
            restores=revision.restores,
            created_at=revision.created_at,
            principal=revision.principal,
            **more,
        )


class AppliedRouteBody(RouteBody):
    """`changed` is false where it was in force already; `warnings` are of what will not last."""

    changed: bool
    warnings: list[str]

    @classmethod
    def applied(cls, task: str, applied: AppliedRoute) -> Self:
        return cls.of(task, applied.revision, changed=applied.changed, warnings=list(applied.warnings))


class TrialBody(BaseModel):
    """What applying a route would do. `revision` and `current` are in force, and stay so."""

    object: Literal["route.trial"] = "route.trial"
    task: str
    revision: int
    current: TaskRoute
    route: TaskRoute
    changed: bool
    warnings: list[str]


class RouteListBody(BaseModel):
    """Every revision of a task's route, newest first."""

    object: Literal["list"] = "list"
    data: list[RouteBody]


class ServedRouteBody(BaseModel):
    """The route by which this service answers for a task; `unreadable` says why it cannot."""

    object: Literal["route.served"] = "route.served"
    task: str
    route: TaskRoute | None
    unreadable: str | None


class ServedRouteListBody(BaseModel):
    """Every task with its route, by name."""

    object: Literal["list"] = "list"
    data: list[ServedRouteBody]


class ShadowAnswerBody(BaseModel):
    """One request's two answers; times in milliseconds. Of `shadow_text` and `shadow_error` one is null."""

    id: str
    generation_id: str
    at: datetime
    primary_version: str
    primary_label: str
    primary_backend: str
    primary_text: str
    primary_ms: float
    shadow_version: str
    shadow_label: str
    shadow_backend: str
    shadow_text: str | None
    shadow_error: str | None
    shadow_ms: float
    agreement: float | None


class ShadowSummaryBody(BaseModel):
    """Answers by one shadow version and backend; agreement and times are means."""

    shadow_version: str
    shadow_label: str
    shadow_backend: str
    count: int
    failed: int
    agreement: float | None
    primary_ms: float
    shadow_ms: float


class ShadowsBody(BaseModel):
    """What the shadows of a task's route said: a summary of each, and the newest answers."""

    object: Literal["route.shadows"] = "route.shadows"
    task: str
    summary: list[ShadowSummaryBody]
    data: list[ShadowAnswerBody]

    @classmethod
    def of(cls, task: str, summaries: Sequence[ShadowSummary], answers: Sequence[ShadowAnswer]) -> Self:
        return cls(
            task=task,
            summary=[ShadowSummaryBody(**asdict(summary)) for summary in summaries],
            data=[
                ShadowAnswerBody(**{name: getattr(answer, name) for name in ShadowAnswerBody.model_fields})
                for answer in answers
            ],
        )
