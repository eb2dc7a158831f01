"""Aliases: movable names for versions, moved by compare-and-set, with their whole history."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from itertools import groupby
from typing import Final

from sqlalchemy import Connection, Row, delete, insert, select, update

from prompt_store.access import Principal
from prompt_store.changes import record
from prompt_store.errors import Conflict, UnknownAlias
from prompt_store.names import check_alias, is_digest
from prompt_store.prompts.lookup import find_digest
from prompt_store.prompts.revisions import require_task
from prompt_store.prompts.unreadable import readable
from prompt_store.routing.revisions import read_route, read_routes_behind
from prompt_store.routing.routes import DirectRoute, TaskRoute, route_selectors
from prompt_store.tables import alias_moves, aliases, audit, versions


class Unset(Enum):
    """The type of UNSET: no expectation, unlike None, which expects that the alias does not exist."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET

# The audit trail's word for a version that is gone; `details` hold its number.
VERSION_DELETED = "version.delete"


@dataclass(frozen=True, slots=True)
class Alias:
    """Where an alias points now: `version` is a digest, `number` that version's number."""

    task: str
    name: str
    version: str
    number: int
    moved_at: datetime
    principal: str


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One move: from `previous` to `target`, both digests; previous is None for the first, target for a removal.

    `undoes` is the sequence of the move that a rollback took back.
    """

    sequence: int
    task: str
    alias: str
    previous: str | None
    target: str | None
    reason: str
    undoes: int | None
    at: datetime
    principal: str


def move_alias(
    connection: Connection,
    task: str,
    alias: str,
    selector: str,
    *,
    expected: str | Unset | None = UNSET,
    reason: str,
    principal: Principal,
    at: datetime,
) -> Alias:
    """Points `alias` at the version that `selector` names; pointing it where it points already writes nothing.

    `expected` is a selector or digest of the version it must point at now, None when it must not exist yet.
    Raises Conflict when it does not, and as `find_digest` for unknown names.
    """
    check_alias(alias)
    target = find_digest(connection, task, selector)
    return set_alias(
        connection,
        task,
        alias,
        target,
        expected=_expected_digest(connection, task, expected),
        reason=reason,
        principal=principal,
        at=at,
    )


def set_alias(
    connection: Connection,
    task: str,
    alias: str,
    target: str,
    *,
    expected: str | Unset | None = UNSET,
    reason: str,
    principal: Principal,
    at: datetime,
) -> Alias:
    """As `move_alias`, with full digests of existing versions."""
    previous = _compare(connection, task, alias, expected)
    if previous != target:
        _write_move(connection, task, alias, previous, target, "alias.move", None, reason, principal, at)
    return _read_alias(connection, task, alias)


def rollback_alias(
    connection: Connection,
    task: str,
    alias: str,
    *,
    expected: str | Unset | None = UNSET,
    reason: str,
    principal: Principal,
    at: datetime,
) -> Alias:
    """Takes back the newest move that is no rollback and was not taken back yet, be it a removal.

    So two rollbacks go two targets back, not to and fro. `expected` is as for `move_alias`.
    Raises UnknownAlias when it never was, Conflict when `expected` does not hold, when there is nothing to return to,
    or when that version was deleted.
    """
    history = read_alias_history(connection, task, alias)
    previous = _compare(connection, task, alias, _expected_digest(connection, task, expected))
    move = _move_to_take_back(history)
    if move is None or move.previous is None:
        raise Conflict(
            f"alias {alias!r} of task {task!r} points at {_shown(connection, task, previous)} and has no earlier "
            "target to return to; move it to a version of your choice, or remove it",
            current=previous,
        )
    if connection.execute(select(versions.c.digest).where(versions.c.digest == move.previous)).one_or_none() is None:
        raise Conflict(
            f"alias {alias!r} of task {task!r} pointed at {_shown(connection, task, move.previous)} before, and that "
            f"version was deleted{_deleted_by(connection, task, move.previous)}; move it to another version "
            f"(`softcue prompts history {task} {alias}` shows earlier ones), or publish the deleted one again",
            current=previous,
        )
    _write_move(
        connection, task, alias, previous, move.previous, "alias.rollback", move.sequence, reason, principal, at
    )
    return _read_alias(connection, task, alias)


def remove_alias(
    connection: Connection,
    task: str,
    alias: str,
    *,
    expected: str | Unset | None = UNSET,
    reason: str,
    principal: Principal,
    at: datetime,
) -> None:
    """Takes the name away; its history stays, and a rollback brings it back. `expected` is as for `move_alias`.

    Raises UnknownAlias when it is not there, Conflict when `expected` does not hold or a route other than the default
    names it, be it that which a running experiment goes back to.
    """
    check_alias(alias)
    require_task(connection, task)
    previous = _compare(connection, task, alias, _expected_digest(connection, task, expected))
    if previous is None:
        raise UnknownAlias(alias, [known.name for known in read_aliases(connection, task)], where=f" of task {task!r}")
    applied = read_route(connection, task)
    if applied is not None and _names(applied.route, alias):
        raise Conflict(
            f"alias {alias!r} of task {task!r} is named by the task's route; apply a route without it first, or move "
            "the alias instead",
            current=previous,
        )
    for _, experiment, behind in read_routes_behind(connection, [task]):
        if _names(readable(behind), alias):
            raise Conflict(
                f"alias {alias!r} of task {task!r} is named by the route that experiment {experiment!r} goes back to; "
                f"end it first with `softcue experiments stop {experiment}`, or move the alias instead",
                current=previous,
            )
    _write_move(connection, task, alias, previous, None, "alias.remove", None, reason, principal, at)


def _names(route: TaskRoute, alias: str) -> bool:
    return route.route != DirectRoute() and alias in route_selectors(route.route)


def read_rollback_targets(connection: Connection, task: str | None = None) -> dict[tuple[str, str], str]:
    """What a rollback would return each alias to, by task and name: digests of versions that are there.

    Of all tasks or of one; an alias that has no such target has no entry, and neither has one that was removed.
    """
    query = (
        select(alias_moves)
        .join(aliases, (aliases.c.task == alias_moves.c.task) & (aliases.c.name == alias_moves.c.alias))
        .order_by(alias_moves.c.task, alias_moves.c.alias, alias_moves.c.sequence)
    )
    if task is not None:
        query = query.where(alias_moves.c.task == task)
    moves = (AliasMove(**row._mapping) for row in connection.execute(query))
    previous: dict[tuple[str, str], str] = {}
    for key, history in groupby(moves, key=lambda move: (move.task, move.alias)):
        move = _move_to_take_back(list(history))
        if move is not None and move.previous is not None:
            previous[key] = move.previous
    here = select(versions.c.digest) if task is None else select(versions.c.digest).where(versions.c.task == task)
    there = set(connection.execute(here).scalars())
    return {key: digest for key, digest in previous.items() if digest in there}


def read_aliases(connection: Connection, task: str) -> list[Alias]:
    """By name. Raises UnknownTask."""
    require_task(connection, task)
    rows = connection.execute(
        select(aliases, versions.c.number)
        .join(versions, versions.c.digest == aliases.c.version)
        .where(aliases.c.task == task)
        .order_by(aliases.c.name)
    )
    return [Alias(row.task, row.name, row.version, row.number, row.moved_at, row.principal) for row in rows]


def read_alias_history(connection: Connection, task: str, alias: str) -> list[AliasMove]:
    """Every move of an alias, oldest first. Raises UnknownTask, InvalidName, or UnknownAlias when it never was."""
    check_alias(alias)
    require_task(connection, task)
    rows = connection.execute(
        select(alias_moves)
        .where(alias_moves.c.task == task, alias_moves.c.alias == alias)
        .order_by(alias_moves.c.sequence)
    ).all()
    if not rows:
        raise no_such_alias(connection, task, alias)
    return [AliasMove(**row._mapping) for row in rows]


def _read_alias(connection: Connection, task: str, alias: str) -> Alias:
    return next(entry for entry in read_aliases(connection, task) if entry.name == alias)


def no_such_alias(connection: Connection, task: str, alias: str) -> UnknownAlias:
    known = connection.execute(select(alias_moves.c.alias).where(alias_moves.c.task == task).distinct()).scalars()
    return UnknownAlias(alias, known, where=f" of task {task!r}")


def _expected_digest(connection: Connection, task: str, expected: str | Unset | None) -> str | Unset | None:
    # A whole digest may be that of a version that was deleted since: then the comparison fails, not the search.
    if isinstance(expected, str) and not is_digest(expected):
        return find_digest(connection, task, expected)
    return expected


def _compare(connection: Connection, task: str, alias: str, expected: str | Unset | None) -> str | None:
    """Where the alias points. Raises Conflict when that is not `expected`."""
    here = (aliases.c.task == task) & (aliases.c.name == alias)
    current = connection.execute(select(aliases.c.version).where(here)).scalar_one_or_none()
    if not isinstance(expected, Unset) and expected != current:
        raise Conflict(_lost(connection, task, alias, expected, current), current=current)
    return current


def _write_move(
    connection: Connection,
    task: str,
    alias: str,
    previous: str | None,
    target: str | None,
    action: str,
    undoes: int | None,
    reason: str,
    principal: Principal,
    at: datetime,
) -> None:
    here = (aliases.c.task == task) & (aliases.c.name == alias)
    row = {"version": target, "moved_at": at, "principal": principal.name}
    if target is None:
        connection.execute(delete(aliases).where(here))
    elif previous is None:
        connection.execute(insert(aliases).values(task=task, name=alias, **row))
    else:
        connection.execute(update(aliases).where(here).values(**row))
    sequence = record(
        connection,
        "alias",
        action=action,
        task=task,
        subject=alias,
        principal=principal,
        at=at,
        reason=reason,
        details={"previous": previous, "target": target} | ({"undoes": undoes} if undoes is not None else {}),
    )
    connection.execute(
        insert(alias_moves).values(
            sequence=sequence,
            task=task,
            alias=alias,
            previous=previous,
            target=target,
            reason=reason,
            undoes=undoes,
            at=at,
            principal=principal.name,
        )
    )


def _move_to_take_back(history: Sequence[AliasMove]) -> AliasMove | None:
    """Of one alias's moves, oldest first, the one that a rollback takes back."""
    taken_back = {move.undoes for move in history}
    standing = [move for move in history if move.undoes is None and move.sequence not in taken_back]
    return standing[-1] if standing else None


def _lost(connection: Connection, task: str, alias: str, expected: str | None, current: str | None) -> str:
    last = connection.execute(
        select(alias_moves.c.principal, alias_moves.c.at, alias_moves.c.reason)
        .where(alias_moves.c.task == task, alias_moves.c.alias == alias)
        .order_by(alias_moves.c.sequence.desc())
        .limit(1)
    ).one_or_none()
    by = ""
    if last is not None:
        by = f", {'removed' if current is None else 'moved there'} by {last.principal} at {_moment(last.at)}"
        by += f" ({last.reason})" if last.reason else ""
    return (
        f"alias {alias!r} of task {task!r} points at {_shown(connection, task, current)}{by}, "
        f"not at {_shown(connection, task, expected)}; look at what changed and try again"
    )


def _shown(connection: Connection, task: str, digest: str | None) -> str:
    if digest is None:
        return "nothing"
    number = connection.execute(select(versions.c.number).where(versions.c.digest == digest)).scalar_one_or_none()
    if number is None:
        deletion = _deletion(connection, task, digest)
        number = json.loads(deletion.details)["number"] if deletion is not None else None
    return digest[:12] if number is None else f"v{number} ({digest[:12]})"


def _deleted_by(connection: Connection, task: str, digest: str) -> str:
    deletion = _deletion(connection, task, digest)
    if deletion is None:
        return ""
    why = f" ({deletion.reason})" if deletion.reason else ""
    return f" by {deletion.principal} at {_moment(deletion.at)}{why}"


def _deletion(connection: Connection, task: str, digest: str) -> Row[tuple[object, ...]] | None:
    """The newest audit entry of the version's deletion; its details hold the number."""
    return connection.execute(
        select(audit)
        .where(audit.c.task == task, audit.c.action == VERSION_DELETED, audit.c.subject == digest)
        .order_by(audit.c.sequence.desc())
        .limit(1)
    ).one_or_none()


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"
