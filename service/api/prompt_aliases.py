"""Aliases over HTTP: `/v1/prompts/{task}/aliases`, moved by compare-and-set through ETags, with their history."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Request, Response, delete, get, post, put
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from prompt_store.names import check_alias
from prompt_store.prompts.listing import DEFAULT_PAGE
from prompt_store.prompts.registry import UNSET, Alias, Registry
from service.api.answers import errors, success
from service.api.callers import principal_of
from service.api.conditions import (
    IfMatch,
    IfNoneMatch,
    compared_with,
    etag,
    expected_or_none,
    expected_target,
    require_existing,
)
from service.api.prompt_shapes import AliasBody, AliasListBody, AliasMoveListBody, MoveBody, RollbackBody
from service.api.prompts import ETAG, IdempotencyKey, PageSize
from service.api.queries import require_known_query


class AliasController(Controller):
    """Movable names for a task's versions."""

    path = "/v1/prompts/{task:str}/aliases"
    tags = ("Prompts",)
    before_request = staticmethod(require_known_query)

    @get(sync_to_thread=True, responses=errors(400, 404, 500, 503))
    def list_aliases(self, task: FromPath[str], registry: NamedDependency[Registry]) -> AliasListBody:
        """Every alias of a task and where it points."""
        return AliasListBody(data=[AliasBody.of(alias) for alias in registry.aliases(task)])

    @get("/{alias:str}", sync_to_thread=True, response_headers=[ETAG], responses=errors(400, 404, 500, 503))
    def show_alias(
        self, task: FromPath[str], alias: FromPath[str], registry: NamedDependency[Registry]
    ) -> Response[AliasBody]:
        """Where an alias points; its ETag is what a move expects in If-Match."""
        return _answer(registry.alias(task, check_alias(alias)))

    @put(
        "/{alias:str}",
        sync_to_thread=True,
        response_headers=[ETAG],
        responses=success(201, AliasBody) | errors(400, 404, 409, 412, 413, 415, 422, 428, 500, 503),
    )
    def move_alias(
        self,
        request: Request[Any, Any, Any],
        task: FromPath[str],
        alias: FromPath[str],
        data: JSONBody[MoveBody],
        registry: NamedDependency[Registry],
        if_match: IfMatch = None,
        if_none_match: IfNoneMatch = None,
        idempotency_key: IdempotencyKey = None,
    ) -> Response[AliasBody]:
        """Point an alias at a version, where it still points where If-Match says; If-None-Match: * creates it.

        412 tells where it points instead, and who moved it there and when.
        """
        expected = expected_or_none(if_match, if_none_match)
        if expected is UNSET:
            require_existing(registry, task, check_alias(alias))
        with compared_with(expected):
            moved = registry.move_alias(
                task,
                alias,
                data.version,
                expected=expected,
                reason=data.reason,
                principal=principal_of(request),
                idempotency_key=idempotency_key,
            )
        return _answer(moved, status_code=201 if expected is None else 200)

    @delete("/{alias:str}", sync_to_thread=True, responses=errors(400, 404, 409, 412, 422, 428, 500, 503))
    def remove_alias(
        self,
        request: Request[Any, Any, Any],
        task: FromPath[str],
        alias: FromPath[str],
        registry: NamedDependency[Registry],
        reason: FromQuery[str] = "",
        if_match: IfMatch = None,
        idempotency_key: IdempotencyKey = None,
    ) -> None:
        """Remove an alias, where it still points where If-Match says. Its history stays."""
        expected = expected_target(if_match)
        with compared_with(expected):
            registry.remove_alias(
                task,
                check_alias(alias),
                expected=expected,
                reason=reason,
                principal=principal_of(request),
                idempotency_key=idempotency_key,
            )

    @post(
        "/{alias:str}/rollback",
        status_code=200,
        sync_to_thread=True,
        response_headers=[ETAG],
        responses=errors(400, 404, 409, 412, 413, 415, 422, 500, 503),
    )
    def roll_back(
        self,
        request: Request[Any, Any, Any],
        task: FromPath[str],
        alias: FromPath[str],
        data: JSONBody[RollbackBody],
        registry: NamedDependency[Registry],
        if_match: IfMatch = None,
        idempotency_key: IdempotencyKey = None,
    ) -> Response[AliasBody]:
        """Point an alias back at where it pointed before its last move, or the one before if that was taken back."""
        expected = expected_target(if_match) if if_match is not None else UNSET
        with compared_with(expected):
            moved = registry.rollback_alias(
                task,
                check_alias(alias),
                expected=expected,
                reason=data.reason,
                principal=principal_of(request),
                idempotency_key=idempotency_key,
            )
        return _answer(moved)

    @get("/{alias:str}/history", sync_to_thread=True, responses=errors(400, 404, 500, 503))
    def show_history(
        self,
        task: FromPath[str],
        alias: FromPath[str],
        registry: NamedDependency[Registry],
        after: FromQuery[str | None] = None,
        limit: PageSize = DEFAULT_PAGE,
    ) -> AliasMoveListBody:
        """Who moved an alias, when, from where to where and why; newest first, also after it was removed."""
        return AliasMoveListBody.of(registry.alias_moves(task, alias, after=after, limit=limit))


def _answer(alias: Alias, status_code: int = 200) -> Response[AliasBody]:
    return Response(AliasBody.of(alias), status_code=status_code, headers={"etag": etag(alias.version)})
