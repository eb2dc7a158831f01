"""Tasks as the store keeps them: immutable revisions, and which one is current."""

import json
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError
from sqlalchemy import Connection, Row, func, insert, select, update

from prompt_store.access import Principal
from prompt_store.changes import record
from prompt_store.errors import SchemaMismatch, UnknownTask, UnknownVersion
from prompt_store.names import check_task_name, is_digest
from prompt_store.prompts.task import Task
from prompt_store.tables import task_revisions, tasks


@dataclass(frozen=True, slots=True)
class TaskRevision:
    """One state of a task; `digest` is `task.digest`, `number` counts the task's distinct revisions from 1."""

    number: int
    digest: str
    task: Task
    created_at: datetime
    principal: str


def apply_task(connection: Connection, task: Task, principal: Principal, at: datetime) -> TaskRevision:
    """Makes `task` the current revision of its name.

    Equal to the current revision: nothing is written. Equal to an older one: that revision, with its old number,
    becomes current again; versions made for it answer it once more, and no second revision of equal content exists.
    """
    known = connection.execute(select(task_revisions).where(task_revisions.c.digest == task.digest)).one_or_none()
    row = connection.execute(select(tasks.c.current_revision).where(tasks.c.name == task.name)).one_or_none()
    # A current revision that was lost is stored again.
    if row is not None and known is not None and row.current_revision == task.digest:
        return to_revision(known)
    if row is None:
        connection.execute(
            insert(tasks).values(
                name=task.name, current_revision=task.digest, last_version=0, created_at=at, principal=principal.name
            )
        )
    else:
        connection.execute(update(tasks).where(tasks.c.name == task.name).values(current_revision=task.digest))
    if known is None:
        _insert_revision(connection, task, principal, at)
    revision = read_revision(connection, task.digest)
    record(
        connection,
        "task",
        action="task.apply",
        task=task.name,
        subject=task.digest,
        principal=principal,
        at=at,
        details={"revision": revision.number, "previous": row.current_revision if row is not None else None},
    )
    return revision


def add_task_revision(connection: Connection, task: Task, principal: Principal, at: datetime) -> TaskRevision:
    """Stores `task` as a revision of its name, so that versions may answer it; which one is current stays.

    A task that the store does not know is made, with this revision as its current one. A revision that is stored
    already is returned, and nothing is written.
    """
    known = connection.execute(select(task_revisions).where(task_revisions.c.digest == task.digest)).one_or_none()
    if known is not None:
        return to_revision(known)
    current = connection.execute(select(tasks.c.current_revision).where(tasks.c.name == task.name)).scalar_one_or_none()
    if current is None:
        return apply_task(connection, task, principal, at)
    _insert_revision(connection, task, principal, at)
    revision = read_revision(connection, task.digest)
    record(
        connection,
        "task",
        action="task.add",
        task=task.name,
        subject=task.digest,
        principal=principal,
        at=at,
        details={"revision": revision.number, "current": current},
    )
    return revision


def current_revision(connection: Connection, task: str) -> TaskRevision:
    """Raises UnknownTask naming the nearest, or InvalidName."""
    check_task_name(task)
    row = connection.execute(
        select(task_revisions)
        .join(tasks, tasks.c.current_revision == task_revisions.c.digest)
        .where(tasks.c.name == task)
    ).one_or_none()
    if row is None:
        raise unknown_task(connection, task)
    return to_revision(row)


def current_revisions(connection: Connection) -> list[TaskRevision]:
    """The current revision of every task, by name."""
    rows = connection.execute(
        select(task_revisions)
        .join(tasks, tasks.c.current_revision == task_revisions.c.digest)
        .order_by(task_revisions.c.task)
    )
    return [to_revision(row) for row in rows]


def read_revision(connection: Connection, digest: str) -> TaskRevision:
    """Raises UnknownVersion when no task has a revision of that digest."""
    query = select(task_revisions).where(task_revisions.c.digest == digest)
    row = connection.execute(query).one_or_none() if is_digest(digest) else None
    if row is None:
        raise UnknownVersion(digest, where=" of any task's revisions", remedy="apply the task it belongs to first")
    return to_revision(row)


def unknown_task(connection: Connection, task: str) -> UnknownTask:
    return UnknownTask(task, connection.execute(select(tasks.c.name)).scalars())


def require_task(connection: Connection, task: str) -> None:
    """Raises UnknownTask naming the nearest, or InvalidName."""
    check_task_name(task)
    if connection.execute(select(tasks.c.name).where(tasks.c.name == task)).one_or_none() is None:
        raise unknown_task(connection, task)


def to_revision(row: Row[tuple[object, ...]]) -> TaskRevision:
    """Raises SchemaMismatch for a document that this code cannot read."""
    try:
        task = Task.model_validate_json(row.document)
    except ValidationError as error:
        raise SchemaMismatch(
            f"revision {row.number} of task {row.task!r} was written by another release of Softcue and cannot be read "
            f"by this one; upgrade Softcue ({error.error_count()} differences)"
        ) from error
    return TaskRevision(row.number, row.digest, task, row.created_at, row.principal)


def _insert_revision(connection: Connection, task: Task, principal: Principal, at: datetime) -> None:
    highest = select(func.coalesce(func.max(task_revisions.c.number), 0)).where(task_revisions.c.task == task.name)
    connection.execute(
        insert(task_revisions).values(
            digest=task.digest,
            task=task.name,
            number=int(connection.execute(highest).scalar_one()) + 1,
            # In the author's order, unlike the digest: answers have a JSON schema's properties in that order.
            document=json.dumps(task.document(), ensure_ascii=False, separators=(",", ":")),
            created_at=at,
            principal=principal.name,
        )
    )
