"""A task's routes as the store keeps them: numbered, with who applied each and why; the newest is in force."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection, Row, func, insert, select, tuple_

from prompt_store.access import Principal
from prompt_store.canonical import canonical_json
from prompt_store.changes import record
from prompt_store.errors import Conflict, SchemaMismatch
from prompt_store.experiments.keeping import RUNNING
from prompt_store.experiments.splits import allocate_splits, check_splits
from prompt_store.prompts.unreadable import Unreadable
from prompt_store.routing.routes import ROUTE, DirectRoute, TaskRoute, leaves
from prompt_store.tables import experiments, route_revisions


@dataclass(frozen=True, slots=True)
class RouteRevision:
    """One state of a task's route; the newest number is in force.

    `restores` is the revision that a rollback put in force again; it took back the one before its own number.
    """

    number: int
    route: TaskRoute
    created_at: datetime
    principal: str
    reason: str = ""
    restores: int | None = None


@dataclass(frozen=True, slots=True)
class AppliedRoute:
    """What is in force now. `changed` is False where it was in force already; `warnings` are of what will not last."""

    revision: RouteRevision
    warnings: tuple[str, ...]
    changed: bool


def write_route(
    connection: Connection,
    task: str,
    route: TaskRoute,
    principal: Principal,
    at: datetime,
    *,
    reason: str = "",
    restores: int | None = None,
) -> tuple[RouteRevision, bool]:
    """Puts a checked route in force for an existing task; the one in force already is not written again.

    Returns the revision in force, and whether it was written. Raises Conflict where a running experiment would lose
    its split.
    """
    current = _newest(connection, task)
    read = _read_row(current) if current is not None else None
    # One of another release cannot be compared: it is replaced.
    if read is not None and read.route == route:
        return read, False
    before = read.route.route if read is not None else None
    check_splits(connection, task, before, route.route)
    number = current.number + 1 if current is not None else 1
    connection.execute(
        insert(route_revisions).values(
            task=task,
            number=number,
            **_columns(route),
            reason=reason,
            restores=restores,
            created_at=at,
            principal=principal.name,
        )
    )
    details: dict[str, Any] = {"kind": route.route.kind}
    record(
        connection,
        "route",
        action="route.apply" if restores is None else "route.rollback",
        task=task,
        subject=str(number),
        principal=principal,
        at=at,
        reason=reason,
        details=details if restores is None else {**details, "restores": restores},
    )
    allocate_splits(connection, task, before, route.route, principal, at, reason)
    return RouteRevision(number, route, at, principal.name, reason, restores), True


def check_replaceable(connection: Connection, task: str, route: TaskRoute) -> None:
    """Raises Conflict where `write_route` would, for a running experiment or the name of one that has ended."""
    current = _newest(connection, task)
    read = _read_row(current) if current is not None else None
    if read is None or read.route != route:
        check_splits(connection, task, read.route.route if read is not None else None, route.route)


def check_expected(connection: Connection, task: str, expected: int | None) -> None:
    """Raises Conflict unless revision `expected` is in force, 0 for none; None expects nothing."""
    current = _newest(connection, task)
    number = current.number if current is not None else 0
    if expected is not None and expected != number:
        fact = f"is at revision {number}" if number else "was never applied"
        raise Conflict(
            f"the route of task {task!r} {fact}, and {expected or 'none'} was expected; look at it and apply again",
            current=str(number),
        )


def rollback_target(connection: Connection, task: str, to: int | None) -> RouteRevision:
    """The revision that a rollback puts in force again: `to`, else what was in force before, and before that.

    Raises Conflict where there is none, SchemaMismatch where this code cannot read it.
    """
    rows = connection.execute(
        select(route_revisions.c.number, route_revisions.c.restores).where(route_revisions.c.task == task)
    )
    # A rollback's revision stands for the one that it restored.
    stands_for = {row.number: row.restores or row.number for row in rows}
    if not stands_for:
        raise Conflict(
            f"task {task!r} has no route to roll back; `softcue routes apply FILE` gives it one", current="0"
        )
    current = max(stands_for)
    wanted = stands_for[current] - 1 if to is None else to
    if wanted not in stands_for:
        fact = f"no revision before {stands_for[current]}" if to is None else f"no revision {to}"
        raise Conflict(
            f"the route of task {task!r} has {fact} to roll back to; `softcue routes history {task}` lists them, and "
            "applying `route = {}` lets its alias production answer",
            current=str(current),
        )
    row = connection.execute(
        select(route_revisions).where(route_revisions.c.task == task, route_revisions.c.number == stands_for[wanted])
    ).one()
    return _to_route_revision(row)


def read_route(connection: Connection, task: str) -> RouteRevision | None:
    """The route in force, None where none was ever applied. Raises SchemaMismatch where this code cannot read it."""
    row = _newest(connection, task)
    return _to_route_revision(row) if row is not None else None


def read_numbered_route(connection: Connection, task: str, number: int) -> TaskRoute:
    """A revision's route; TaskRoute() for 0, when none was applied yet. Raises SchemaMismatch."""
    if number == 0:
        return TaskRoute()
    query = select(route_revisions).where(route_revisions.c.task == task, route_revisions.c.number == number)
    return _to_route_revision(connection.execute(query).one()).route


def read_route_history(connection: Connection, task: str) -> list[RouteRevision]:
    """Every route a task had, newest first. Raises SchemaMismatch."""
    query = select(route_revisions).where(route_revisions.c.task == task).order_by(route_revisions.c.number.desc())
    return [_to_route_revision(row) for row in connection.execute(query)]


def read_routes(connection: Connection, tasks: Collection[str] | None = None) -> dict[str, TaskRoute | Unreadable]:
    """The route in force of every task that has one, or of those among `tasks`."""
    newest = select(route_revisions.c.task, func.max(route_revisions.c.number)).group_by(route_revisions.c.task)
    if tasks is not None:
        newest = newest.where(route_revisions.c.task.in_(tasks))
    key = tuple_(route_revisions.c.task, route_revisions.c.number)
    query = select(route_revisions).where(key.in_(newest))
    return {row.task: _readable_route(row) for row in connection.execute(query)}


def read_routes_behind(
    connection: Connection, tasks: Collection[str] | None = None
) -> list[tuple[str, str, TaskRoute | Unreadable]]:
    """What running experiments go back to when they are stopped: task, experiment, and the route from before.

    Without those that started where none was applied.
    """
    before = (route_revisions.c.task == experiments.c.task) & (route_revisions.c.number == experiments.c.route_before)
    query = select(route_revisions, experiments.c.name.label("experiment")).join(experiments, before)
    query = query.where(experiments.c.state == RUNNING)
    if tasks is not None:
        query = query.where(experiments.c.task.in_(tasks))
    return [(row.task, row.experiment, _readable_route(row)) for row in connection.execute(query)]


def _readable_route(row: Row[Any]) -> TaskRoute | Unreadable:
    try:
        return _to_route_revision(row).route
    except SchemaMismatch as error:
        return Unreadable(str(error))


def _to_route_revision(row: Row[Any]) -> RouteRevision:
    """Raises SchemaMismatch, caused by what pydantic says, for a document that this code cannot read."""
    try:
        route = read_document(row)
    except ValidationError as error:
        raise SchemaMismatch(
            f"the route of task {row.task!r} was written by another release of Softcue and cannot be read by this one; "
            "upgrade Softcue, or apply the route again"
        ) from error
    return RouteRevision(row.number, route, row.created_at, row.principal, row.reason or "", row.restores)


def read_document(row: Row[Any]) -> TaskRoute:
    """The route of a row, which an earlier release may have written. Raises pydantic's ValidationError."""
    if row.whole is not None:
        return TaskRoute.model_validate_json(row.whole)
    return TaskRoute(route=ROUTE.validate_json(row.document))


def _columns(route: TaskRoute) -> dict[str, str | None]:
    """`document`, which code of schema 0001 reads, and `whole` where that does not say everything.

    That code cannot take up a store with a document that it does not know. So it gets a direct route without the
    limits, and in place of any other a fallback over its leaves, which it refuses to serve for that task alone.
    """
    document = route.route.model_dump(mode="json", exclude_none=True)
    if route == TaskRoute(route=route.route) and isinstance(route.route, DirectRoute):
        return {"document": canonical_json(document).decode(), "whole": None}
    if not isinstance(route.route, DirectRoute):
        named = [leaf.model_dump(mode="json", exclude_none=True) for _, leaf in leaves(route.route)]
        document = {"kind": "fallback", "routes": named}
    return {"document": canonical_json(document).decode(), "whole": route.model_dump_json(exclude_none=True)}


def _newest(connection: Connection, task: str) -> Row[Any] | None:
    query = select(route_revisions).where(route_revisions.c.task == task).order_by(route_revisions.c.number.desc())
    return connection.execute(query.limit(1)).one_or_none()


def _read_row(row: Row[Any]) -> RouteRevision | None:
    try:
        return _to_route_revision(row)
    except SchemaMismatch:
        return None
