"""Aliases: movable names for versions, moved by compare-and-set, with their whole history."""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Final

from sqlalchemy import Connection, insert, select, update

from prompt_store.access import Principal
from prompt_store.changes import record
from prompt_store.errors import Conflict, UnknownAlias
from prompt_store.names import check_alias
from prompt_store.prompts.lookup import find_digest
from prompt_store.prompts.revisions import require_task
from prompt_store.tables import alias_moves, aliases, versions


class Unset(Enum):
    """The type of UNSET: no expectation, unlike None, which expects that the alias does not exist."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


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
        expected=expected
        if expected is None or isinstance(expected, Unset)
        else find_digest(connection, task, expected),
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
    here = (aliases.c.task == task) & (aliases.c.name == alias)
    previous = connection.execute(select(aliases.c.version).where(here)).scalar_one_or_none()
    if not isinstance(expected, Unset) and expected != previous:
        raise Conflict(_lost(connection, task, alias, expected, previous), current=previous)
    if previous != target:
        row = {"version": target, "moved_at": at, "principal": principal.name}
        if previous is None:
            connection.execute(insert(aliases).values(task=task, name=alias, **row))
        else:
            connection.execute(update(aliases).where(here).values(**row))
        sequence = record(
            connection,
            "alias",
            action="alias.move",
            task=task,
            subject=alias,
            principal=principal,
            at=at,
            reason=reason,
            details={"previous": previous, "target": target},
        )
        connection.execute(
            insert(alias_moves).values(
                sequence=sequence,
                task=task,
                alias=alias,
                previous=previous,
                target=target,
                reason=reason,
                at=at,
                principal=principal.name,
            )
        )
    return next(entry for entry in read_aliases(connection, task) if entry.name == alias)


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
    """Every move of an alias, oldest first. Raises UnknownTask, or UnknownAlias when it never was."""
    require_task(connection, task)
    rows = connection.execute(
        select(alias_moves)
        .where(alias_moves.c.task == task, alias_moves.c.alias == alias)
        .order_by(alias_moves.c.sequence)
    ).all()
    if not rows:
        known = connection.execute(select(alias_moves.c.alias).where(alias_moves.c.task == task).distinct()).scalars()
        raise UnknownAlias(alias, known, where=f" of task {task!r}")
    return [AliasMove(**row._mapping) for row in rows]


def _lost(connection: Connection, task: str, alias: str, expected: str | None, current: str | None) -> str:
    def shown(digest: str | None) -> str:
        if digest is None:
            return "nothing"
        number = connection.execute(select(versions.c.number).where(versions.c.digest == digest)).scalar_one_or_none()
        return digest[:12] if number is None else f"v{number} ({digest[:12]})"

    last = connection.execute(
        select(alias_moves.c.principal, alias_moves.c.at)
        .where(alias_moves.c.task == task, alias_moves.c.alias == alias)
        .order_by(alias_moves.c.sequence.desc())
        .limit(1)
    ).one_or_none()
    by = f", moved there by {last.principal} at {last.at:%Y-%m-%d %H:%M:%S} UTC" if last is not None else ""
    return (
        f"alias {alias!r} of task {task!r} points at {shown(current)}{by}, not at {shown(expected)}; "
        "look at what changed and move it again"
    )
