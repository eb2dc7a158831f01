"""Experiments over HTTP: started, looked at, changed by compare-and-set through ETags, and ended.

An experiment's ETag is the number of its revision, in quotes.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from litestar import Controller, MediaType, Request, Response, get, post
from litestar.datastructures import ResponseHeader
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from prompt_store.experiments.experiment import parse_experiment
from prompt_store.experiments.records import ExperimentRecord
from prompt_store.prompts.registry import Registry
from service.api.answers import errors, success
from service.api.callers import principal_of
from service.api.conditions import IfMatch, compared_with_revision, etag, expected_experiment
from service.api.experiment_shapes import (
    EndBody,
    ExperimentBody,
    ExperimentEventBody,
    ExperimentHistoryBody,
    ExperimentListBody,
    PromoteBody,
    ReportBody,
    StartOperation,
    StartTrialBody,
    WeightsBody,
)
from service.api.queries import require_known_query
from service.experiments import acting

ETAG = ResponseHeader(name="etag", description="The revision's number, in quotes", documentation_only=True)
_STARTED_OR_TRIED = success(201, ExperimentBody) | {
    200: ResponseSpec(StartTrialBody, description="It was checked, and not started", generate_examples=False)
}
_CHANGED = errors(400, 404, 409, 412, 413, 415, 428, 500, 503)

# The page brings all it shows, and nothing of it may run.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "cache-control": "no-store",
}

OfTask = Annotated[str | None, QueryParameter(name="task", description="Those of this task alone")]


class ExperimentController(Controller):
    """`/v1/experiments`: experiments of the store, and what is known of them now."""

    path = "/v1/experiments"
    tags = ("Experiments",)
    before_request = staticmethod(require_known_query)

    @get(sync_to_thread=True, responses=errors(400, 404, 500, 503))
    def list_experiments(self, registry: NamedDependency[Registry], task: OfTask = None) -> ExperimentListBody:
        """Every experiment, those that started last first."""
        return ExperimentListBody(data=[ExperimentBody.of(record) for record in registry.experiments(task)])

    @post(
        sync_to_thread=True,
        operation_class=StartOperation,
        response_headers=[ETAG],
        responses=_STARTED_OR_TRIED | errors(400, 404, 409, 413, 415, 500, 503),
    )
    def start_experiment(
        self,
        request: Request[Any, Any, Any],
        data: JSONBody[dict[str, Any]],
        registry: NamedDependency[Registry],
        dry_run: FromQuery[bool] = False,
        reason: FromQuery[str] = "",
    ) -> Response[Any]:
        """Start an experiment on its task's traffic, once all of it was checked; `dry_run` only checks it."""
        experiment = parse_experiment(data)
        if dry_run:
            trial = StartTrialBody.of(experiment, registry.check_experiment(experiment))
            return Response(trial, status_code=200)
        record = registry.start_experiment(experiment, principal_of(request), reason=reason)
        return Response(ExperimentBody.of(record), status_code=201, headers=_tag(record))

    @get("/{name:str}", sync_to_thread=True, response_headers=[ETAG], responses=errors(400, 404, 500, 503))
    def show_experiment(self, name: FromPath[str], registry: NamedDependency[Registry]) -> Response[ReportBody]:
        """What to do and how sure that is, with all figures; its ETag is what a change expects in If-Match."""
        found = acting.report(registry, name, _now_ms())
        return Response(ReportBody.of(found), headers=_tag(found.record))

    @get(
        "/{name:str}/report",
        sync_to_thread=True,
        media_type=MediaType.HTML,
        responses=errors(400, 404, 500, 503),
    )
    def show_report(self, name: FromPath[str], registry: NamedDependency[Registry]) -> Response[str]:
        """The same as a page with plots, which needs nothing else."""
        page = acting.html_report(registry, acting.report(registry, name, _now_ms()))
        return Response(page, media_type=MediaType.HTML, headers=_PAGE_HEADERS)

    @get("/{name:str}/history", sync_to_thread=True, responses=errors(400, 404, 500, 503))
    def show_history(self, name: FromPath[str], registry: NamedDependency[Registry]) -> ExperimentHistoryBody:
        """What was done to it, newest first: by whom, why, and on which numbers."""
        events = registry.experiment_history(name)
        return ExperimentHistoryBody(data=[ExperimentEventBody.of(event) for event in events])

    @post("/{name:str}/stop", status_code=200, sync_to_thread=True, response_headers=[ETAG], responses=_CHANGED)
    def stop_experiment(
        self,
        request: Request[Any, Any, Any],
        name: FromPath[str],
        data: JSONBody[EndBody],
        registry: NamedDependency[Registry],
        if_match: IfMatch = None,
    ) -> Response[ExperimentBody]:
        """End it without a winner: its task is answered as before. It needs no If-Match, as haste may need it."""
        expected = expected_experiment(if_match) if if_match is not None else None
        with compared_with_revision(expected):
            record = acting.stop(
                registry, name, principal_of(request), _now_ms(), reason=data.reason, expected=expected
            )
        return _answer(record)

    @post("/{name:str}/promote", status_code=200, sync_to_thread=True, response_headers=[ETAG], responses=_CHANGED)
    def promote_arm(
        self,
        request: Request[Any, Any, Any],
        name: FromPath[str],
        data: JSONBody[PromoteBody],
        registry: NamedDependency[Registry],
        if_match: IfMatch = None,
    ) -> Response[ExperimentBody]:
        """End it with a winner: the alias moves to the arm's version. A sample-ratio mismatch refuses it."""
        expected = expected_experiment(if_match)
        with compared_with_revision(expected):
            record = acting.promote(
                registry,
                name,
                data.arm,
                principal_of(request),
                _now_ms(),
                reason=data.reason,
                despite_mismatch=data.despite_mismatch,
                expected=expected,
            )
        return _answer(record)

    @post("/{name:str}/weights", status_code=200, sync_to_thread=True, response_headers=[ETAG], responses=_CHANGED)
    def reweight_experiment(
        self,
        request: Request[Any, Any, Any],
        name: FromPath[str],
        data: JSONBody[WeightsBody],
        registry: NamedDependency[Registry],
        if_match: IfMatch = None,
    ) -> Response[ExperimentBody]:
        """Give its arms other shares; as few units as that takes change their arm."""
        expected = expected_experiment(if_match)
        with compared_with_revision(expected):
            record = registry.reweight_experiment(
                name, data.weights, principal_of(request), reason=data.reason, expected=expected
            )
        return _answer(record)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _tag(record: ExperimentRecord) -> dict[str, str]:
    return {"etag": etag(str(record.revision))}


def _answer(record: ExperimentRecord) -> Response[ExperimentBody]:
    return Response(ExperimentBody.of(record), headers=_tag(record))
