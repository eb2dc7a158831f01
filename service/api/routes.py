"""Routes over HTTP: what each task is answered by, applied by compare-and-set through ETags, with their history.

A route's ETag is the number of its revision, in quotes; it is "0" where none was ever applied.
"""

from __future__ import annotations

from typing import Annotated, Any

from litestar import Controller, Request, Response, get, post, put
from litestar.datastructures import ResponseHeader
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from prompt_store.prompts.listing import DEFAULT_PAGE, LARGEST_PAGE
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.unreadable import Unreadable
from prompt_store.routing.revisions import AppliedRoute
from prompt_store.routing.routes import TaskRoute, parse_task_route
from service.api.answers import errors
from service.api.callers import principal_of
from service.api.conditions import IfMatch, IfNoneMatch, compared_with_revision, etag, expected_revision
from service.api.queries import require_known_query
from service.api.route_shapes import (
    AppliedRouteBody,
    ApplyOperation,
    RouteBody,
    RouteListBody,
    RouteRollbackBody,
    ServedRouteBody,
    ServedRouteListBody,
    ShadowsBody,
    TrialBody,
)
from service.catalog import Catalog

ETAG = ResponseHeader(name="etag", description="The revision's number, in quotes", documentation_only=True)
_EITHER: Any = AppliedRouteBody | TrialBody
_APPLIED_OR_TRIED = {200: ResponseSpec(_EITHER, description="Applied, or tried", generate_examples=False)}
PageSize = Annotated[int, QueryParameter(ge=1, le=LARGEST_PAGE)]


class RouteController(Controller):
    """The route of one task, as the store has it."""

    path = "/v1/tasks/{task:str}/route"
    tags = ("Routes",)
    before_request = staticmethod(require_known_query)

    @get(sync_to_thread=True, response_headers=[ETAG], responses=errors(400, 404, 500, 503))
    def show_route(self, task: FromPath[str], registry: NamedDependency[Registry]) -> Response[RouteBody]:
        """The route in force and its limits; its ETag is what a change expects in If-Match."""
        revision = registry.route_revision(task)
        return _tagged(RouteBody.of(task, revision))

    @put(
        sync_to_thread=True,
        operation_class=ApplyOperation,
        response_headers=[ETAG],
        responses=_APPLIED_OR_TRIED | errors(400, 404, 409, 412, 413, 415, 428, 500, 503),
    )
    def apply_route(
        self,
        request: Request[Any, Any, Any],
        task: FromPath[str],
        data: JSONBody[dict[str, Any]],
        registry: NamedDependency[Registry],
        dry_run: FromQuery[bool] = False,
        reason: FromQuery[str] = "",
        if_match: IfMatch = None,
        if_none_match: IfNoneMatch = None,
    ) -> Response[Any]:
        """Put a route in force, where revision If-Match still is; If-None-Match: * where none was applied yet.

        All of it is checked first: versions, backends and what they serve, calibrations. `dry_run` checks and changes
        nothing; it needs no condition, and is held to one that comes with it.
        """
        route = parse_task_route(data)
        unconditional = dry_run and if_match is None and if_none_match is None
        expected = None if unconditional else expected_revision(if_match, if_none_match)
        with compared_with_revision(expected):
            if dry_run:
                return _try(registry, task, route, expected)
            applied = registry.apply_route(task, route, principal_of(request), expected=expected, reason=reason)
        return _answer(task, applied)

    @get("/history", sync_to_thread=True, responses=errors(400, 404, 500, 503))
    def show_history(self, task: FromPath[str], registry: NamedDependency[Registry]) -> RouteListBody:
        """Every revision, newest first: what was in force, since when, by whom and why."""
        return RouteListBody(data=[RouteBody.of(task, revision) for revision in registry.route_history(task)])

    @post(
        "/rollback",
        status_code=200,
        sync_to_thread=True,
        response_headers=[ETAG],
        responses=errors(400, 404, 409, 412, 413, 415, 500, 503),
    )
    def roll_back(
        self,
        request: Request[Any, Any, Any],
        task: FromPath[str],
        data: JSONBody[RouteRollbackBody],
        registry: NamedDependency[Registry],
        if_match: IfMatch = None,
    ) -> Response[AppliedRouteBody]:
        """Put an earlier revision in force again, as a new one, if it can still be applied."""
        expected = expected_revision(if_match) if if_match is not None else None
        with compared_with_revision(expected):
            applied = registry.rollback_route(
                task, principal_of(request), to=data.to, expected=expected, reason=data.reason
            )
        return _answer(task, applied)

    @get("/shadows", sync_to_thread=True, responses=errors(400, 404, 500, 503))
    def show_shadows(
        self, task: FromPath[str], registry: NamedDependency[Registry], limit: PageSize = DEFAULT_PAGE
    ) -> ShadowsBody:
        """How far the answers of shadows agree with those that were given, and the newest of both."""
        return ShadowsBody.of(task, registry.shadow_summary(task), registry.shadow_answers(task, limit=limit))


@get("/v1/routes", tags=["Routes"], before_request=require_known_query, responses=errors(400, 503))
async def list_routes(catalog: NamedDependency[Catalog]) -> ServedRouteListBody:
    """The route of every task, as this service answers by it now."""
    found = []
    for name, task in sorted(catalog.snapshot.tasks.items()):
        route, reason = (None, task.route.reason) if isinstance(task.route, Unreadable) else (task.route, None)
        found.append(ServedRouteBody(task=name, route=route, unreadable=reason))
    return ServedRouteListBody(data=found)


def _try(registry: Registry, task: str, route: TaskRoute, expected: int | None) -> Response[TrialBody]:
    current = RouteBody.of(task, registry.route_revision(task))
    warnings = registry.check_routes({task: route}, expected={task: expected} if expected is not None else None)[task]
    body = TrialBody(
        task=task,
        revision=current.revision,
        current=current.route,
        route=route,
        changed=current.route != route,
        warnings=list(warnings),
    )
    return Response(body, headers={"etag": etag(str(current.revision))})


def _answer(task: str, applied: AppliedRoute) -> Response[AppliedRouteBody]:
    return _tagged(AppliedRouteBody.applied(task, applied))


def _tagged(body: RouteBody) -> Response[Any]:
    return Response(body, headers={"etag": etag(str(body.revision))})
