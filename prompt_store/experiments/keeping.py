"""Experiments as the store keeps them: rows with a state and a revision, and their history in the audit trail."""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection, Row, insert, select, update

from prompt_store.access import Principal
from prompt_store.canonical import canonical_json
from prompt_store.changes import record
from prompt_store.errors import Conflict, SchemaMismatch, UnknownExperiment
from prompt_store.experiments.allocating import read_allocations
from prompt_store.experiments.experiment import Experiment
from prompt_store.experiments.records import ExperimentEvent, ExperimentRecord, NumberedAllocation, State
from prompt_store.prompts.unreadable import Unreadable, readable
from prompt_store.tables import audit, experiments

RUNNING: State = "running"

_IN_WORDS = {"stopped": "was stopped", "promoted": "ended with a promotion", "rolled_back": "was rolled back"}


def read_running(
    connection: Connection, tasks: Collection[str] | None = None
) -> defaultdict[str, dict[str, Experiment | Unreadable]]:
    """The running experiments by task and name, or those of `tasks`."""
    query = select(experiments).where(experiments.c.state == RUNNING)
    if tasks is not None:
        query = query.where(experiments.c.task.in_(tasks))
    found: defaultdict[str, dict[str, Experiment | Unreadable]] = defaultdict(dict)
    for row in connection.execute(query):
        try:
            found[row.task][row.name] = to_experiment(row)
        except SchemaMismatch as error:
            found[row.task][row.name] = Unreadable(str(error))
    return found


def running_names(connection: Connection) -> list[str]:
    """Also of those whose document this code cannot read."""
    query = select(experiments.c.name).where(experiments.c.state == RUNNING).order_by(experiments.c.name)
    return list(connection.execute(query).scalars())


def read_records(connection: Connection, task: str | None = None) -> list[ExperimentRecord]:
    """All, or those of one task; those that started last first. Raises SchemaMismatch."""
    query = select(experiments).order_by(experiments.c.started_at.desc(), experiments.c.name)
    if task is not None:
        query = query.where(experiments.c.task == task)
    stored = read_allocations(connection, None if task is None else [task])
    return [_to_record(row, stored[row.task][row.name]) for row in connection.execute(query)]


def read_record(connection: Connection, name: str) -> ExperimentRecord:
    """Raises UnknownExperiment, SchemaMismatch."""
    row = find_row(connection, name)
    return _to_record(row, read_allocations(connection, [row.task])[row.task][name])


def read_history(connection: Connection, name: str) -> list[ExperimentEvent]:
    """Newest first. Raises UnknownExperiment."""
    row = find_row(connection, name)
    query = (
        select(audit)
        .where(audit.c.task == row.task, audit.c.subject == name, audit.c.action.startswith("experiment."))
        .order_by(audit.c.sequence.desc())
    )
    return [
        ExperimentEvent(
            entry.sequence, entry.action, entry.reason, json.loads(entry.details), entry.at, entry.principal
        )
        for entry in connection.execute(query)
    ]


def find_row(connection: Connection, name: str) -> Row[Any]:
    """Raises UnknownExperiment."""
    row = connection.execute(select(experiments).where(experiments.c.name == name)).one_or_none()
    if row is None:
        raise UnknownExperiment(name, connection.execute(select(experiments.c.name)).scalars())
    return row


def running_row(connection: Connection, name: str, expected: int | None) -> Row[Any]:
    """The row of an experiment that is to be changed: it must run, and be at revision `expected` unless that is None.

    Raises UnknownExperiment, Conflict.
    """
    row = find_row(connection, name)
    if row.state != RUNNING:
        raise Conflict(
            f"experiment {name!r} {ended_in_words(row)}, so nothing about it changes any more; look at it with "
            f"`softcue experiments show {name}`, or start another one",
            current=str(row.revision),
        )
    if expected is not None and row.revision != expected:
        raise Conflict(
            f"experiment {name!r} is at revision {row.revision}, and {expected} was expected; look at what changed "
            f"with `softcue experiments show {name}` and decide again",
            current=str(row.revision),
        )
    return row


def ended_in_words(row: Row[Any]) -> str:
    """How an experiment ended, by whom and when: the rest of a sentence."""
    how = _IN_WORDS.get(row.state, f"is {row.state}")
    return f"{how} by {row.ended_by} at {row.ended_at:%Y-%m-%d %H:%M:%S} UTC"


def insert_record(
    connection: Connection,
    experiment: Experiment,
    versions: Mapping[str, Sequence[str]],
    route_before: int,
    principal: Principal,
    at: datetime,
) -> None:
    """Writes a new experiment as running, at revision 1; the caller records the change."""
    connection.execute(
        insert(experiments).values(
            name=experiment.name,
            task=experiment.task,
            document=canonical_json(experiment.document()).decode(),
            state=RUNNING,
            revision=1,
            # Pairs, which keep the order of the arms.
            versions=canonical_json([[arm, list(labels)] for arm, labels in versions.items()]).decode(),
            route_before=route_before,
            started_at=at,
            started_by=principal.name,
            ended_by="",
            reason="",
        )
    )


def write_change(
    connection: Connection,
    row: Row[Any],
    action: str,
    principal: Principal,
    at: datetime,
    *,
    reason: str,
    details: Mapping[str, Any],
    columns: Mapping[str, Any] | None = None,
) -> None:
    """Gives an experiment its next revision, with new values in `columns`, and records what was done."""
    key = experiments.c.name == row.name
    values = {**(columns or {}), "revision": row.revision + 1}
    connection.execute(update(experiments).where(key).values(values))
    record(
        connection,
        "experiment",
        action=f"experiment.{action}",
        task=row.task,
        subject=row.name,
        principal=principal,
        at=at,
        reason=reason,
        details=details,
    )


def to_experiment(row: Row[Any]) -> Experiment:
    """A row's document. Raises SchemaMismatch."""
    try:
        return Experiment.model_validate_json(row.document)
    except ValidationError as error:
        raise SchemaMismatch(
            f"experiment {row.name!r} was written by another release of Softcue, or is damaged, and cannot be read; "
            "upgrade Softcue or restore a backup"
        ) from error


def pinned_versions(row: Row[Any]) -> dict[str, tuple[str, ...]]:
    """By arm, in the order that the split had: the labels that its leaves were pinned to."""
    return {arm: tuple(labels) for arm, labels in json.loads(row.versions)}


def _to_record(row: Row[Any], newest: NumberedAllocation | Unreadable) -> ExperimentRecord:
    weights = readable(newest).allocation.weights
    experiment = to_experiment(row)
    versions = pinned_versions(row)
    order = sorted(versions, key=lambda arm: arm != experiment.control)
    return ExperimentRecord(
        experiment=experiment,
        state=row.state,
        revision=row.revision,
        weights={arm: weights[arm] for arm in order},
        versions={arm: versions[arm] for arm in order},
        started_at=row.started_at,
        started_by=row.started_by,
        ended_at=row.ended_at,
        ended_by=row.ended_by,
        reason=row.reason,
        winner=row.winner,
    )
