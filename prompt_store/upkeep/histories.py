"""Checking histories: aliases and their moves, routes, the change log and the audit trail."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Row, Table, func, or_, select

from prompt_store.names import AliasSelector, DigestSelector, NumberSelector, parse_selector
from prompt_store.routing.revisions import read_document
from prompt_store.routing.routes import Route, route_selectors
from prompt_store.tables import alias_moves, aliases, audit, change_counter, changes, route_revisions
from prompt_store.upkeep.problems import RESTORE, Checked, Problem, Reader, refused_document


def check_aliases(reader: Reader, checked: Checked) -> Iterator[Problem]:
    """Each alias's target, and its history, which is continuous and ends where the alias points."""
    targets = {(row.task, row.name): row.version for row in reader.rows(select(aliases))}
    checked.aliases += len(targets)
    for (task, alias), version in sorted(targets.items()):
        if reader.numbers.get(version, ("", 0))[0] != task:
            text = f"it points at {version[:12]}, which is no version of its task"
            yield Problem("missing", _alias(task, alias), text, "move it to another version")
    query = select(alias_moves).order_by(alias_moves.c.task, alias_moves.c.alias, alias_moves.c.sequence)
    unseen = set(targets)
    for key, moves in groupby(reader.rows(query), key=lambda move: (move.task, move.alias)):
        unseen.discard(key)
        for fault in _history_faults(list(moves), targets.get(key)):
            yield Problem("contradictory", _alias(*key), fault, RESTORE)
    for task, alias in sorted(unseen):
        yield Problem("contradictory", _alias(task, alias), "no move of it is in its history", RESTORE)


def check_routes(reader: Reader, _: Checked) -> Iterator[Problem]:
    """Every route can be read, and the one in force names versions that are there."""
    by_task = reader.rows(select(route_revisions).order_by(route_revisions.c.task, route_revisions.c.number))
    for task, found in groupby(by_task, key=lambda row: row.task):
        revisions = list(found)
        for row in revisions:
            where = f"route {row.number} of task {task!r}"
            try:
                route = read_document(row).route
            except ValidationError as error:
                yield refused_document(where, "its document", error)
                continue
            if row.number == revisions[-1].number:
                for text in _dangling(reader, task, route):
                    yield Problem("missing", where, f"it names {text}, which is not there", "apply another route")


def check_log(reader: Reader, checked: Checked) -> Iterator[Problem]:
    """The change log and the audit trail: gapless up to the counter, and in step with each other and with moves."""
    counter = reader.row(select(change_counter.c.sequence))
    if counter is None:
        yield Problem("missing", "the change log", "its counter is gone", RESTORE)
        return
    checked.changes += counter.sequence
    for table, name in ((changes, "the change log"), (audit, "the audit trail")):
        fault = _gap(reader, table, counter.sequence)
        if fault is not None:
            yield Problem("contradictory", name, fault, RESTORE)
    apart = (
        select(changes.c.sequence)
        .join(audit, audit.c.sequence == changes.c.sequence)
        .where(
            or_(
                changes.c.task.is_distinct_from(audit.c.task),
                changes.c.subject != audit.c.subject,
                changes.c.principal != audit.c.principal,
                changes.c.at != audit.c.at,
            )
        )
    )
    for row in reader.rows(apart.order_by(changes.c.sequence)):
        yield Problem("contradictory", f"change {row.sequence}", "log and audit trail tell it differently", RESTORE)
    unlogged = (
        select(alias_moves.c.task, alias_moves.c.alias, alias_moves.c.sequence)
        .outerjoin(changes, changes.c.sequence == alias_moves.c.sequence)
        .where(
            or_(
                changes.c.sequence.is_(None),
                changes.c.kind != "alias",
                changes.c.task.is_distinct_from(alias_moves.c.task),
                changes.c.subject != alias_moves.c.alias,
            )
        )
    )
    for row in reader.rows(unlogged.order_by(alias_moves.c.sequence)):
        text = f"its move {row.sequence} is not in the change log"
        yield Problem("contradictory", _alias(row.task, row.alias), text, RESTORE)


def _alias(task: str, alias: str) -> str:
    return f"alias {alias!r} of task {task!r}"


def _history_faults(moves: Sequence[Row[Any]], target: str | None) -> Iterator[str]:
    """What is wrong with one alias's moves, oldest first, where it points at `target` now."""
    at: str | None = None
    standing: dict[int, Row[Any]] = {}
    for move in moves:
        if move.previous != at:
            yield f"its move {move.sequence} leaves {_short(move.previous)}, but the one before went to {_short(at)}"
        if move.undoes is None:
            standing[move.sequence] = move
        else:
            undone = standing.pop(move.undoes, None)
            if undone is None or undone.previous != move.target:
                yield f"its move {move.sequence} takes back move {move.undoes}, which it cannot"
        at = move.target
    if at != target:
        yield f"it points at {_short(target)}, but its last move went to {_short(at)}"


def _short(digest: str | None) -> str:
    return "nothing" if digest is None else digest[:12]


def _dangling(reader: Reader, task: str, route: Route) -> Iterator[str]:
    """Numbers and digests that a route names and the task does not have; an alias may come later."""
    here = {digest: number for digest, (owner, number) in reader.numbers.items() if owner == task}
    for text in sorted(route_selectors(route)):
        match parse_selector(text):
            case NumberSelector(number):
                there = number in here.values()
            case DigestSelector(prefix):
                there = any(digest.startswith(prefix) for digest in here)
            case AliasSelector():
                there = True
        if not there:
            yield text


def _gap(reader: Reader, table: Table, last: int) -> str | None:
    """Where the table's sequence numbers are not exactly 1 to `last`."""
    sequence = table.c.sequence
    found = reader.row(select(func.count(), func.coalesce(func.max(sequence), 0), func.coalesce(func.min(sequence), 1)))
    assert found is not None, "an aggregate has a row"
    count, highest, lowest = tuple(found)
    if highest > last:
        return f"it goes on to {highest}, above the counter's {last}"
    if (count, highest, lowest) == (last, last, 1):
        return None
    successor = table.alias()
    before_gap = select(func.min(sequence)).where(
        sequence < last, ~select(successor.c.sequence).where(successor.c.sequence == sequence + 1).exists()
    )
    row = reader.row(before_gap)
    first = 1 if lowest > 1 or count == 0 else (row[0] if row is not None else 0) + 1
    return f"entry {first} of {last} is missing"
