"""Recorded answers of shadow routes: what answered a request, what another version said to it, how far they agree.

Replicas ship them in batches; the store deduplicates by id. They hold texts, so they are kept only as long as whoever
runs the service wants to compare.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, func, select

from prompt_store.database import insert_into
from prompt_store.ledger.writing import erased_ms
from prompt_store.names import storable_text
from prompt_store.tables import shadow_answers


@dataclass(frozen=True, slots=True)
class ShadowAnswer:
    """One request's two answers; versions by digest and label (`task@v2`), times in milliseconds.

    Of `shadow_text` and `shadow_error` one is None. `agreement` is from 0 to 1, None where it cannot be said.
    """

    id: str
    generation_id: str
    task: str
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
    unit_hash: str | None = None


@dataclass(frozen=True, slots=True)
class ShadowSummary:
    """Of a task's recorded answers by one shadow version on one backend: how many, how many failed, how far they agree.

    `agreement` is the mean where it could be said, None where it never could.
    """

    shadow_version: str
    shadow_label: str
    shadow_backend: str
    count: int
    failed: int
    agreement: float | None
    primary_ms: float
    shadow_ms: float


def add_shadow_answers(connection: Connection, answers: Iterable[ShadowAnswer]) -> None:
    """Keeps those whose id is not there yet, but of erased units what came since alone.

    What a database cannot hold of a text is replaced.
    """
    found = {answer.id: answer for answer in answers}.values()
    erased = erased_ms(connection, {answer.unit_hash for answer in found if answer.unit_hash is not None})
    rows = [
        {name: storable_text(value) if isinstance(value, str) else value for name, value in asdict(answer).items()}
        for answer in found
        if answer.at.timestamp() * 1000 > erased.get(answer.unit_hash or "", -1)
    ]
    if not rows:
        return
    connection.execute(insert_into(connection, shadow_answers).on_conflict_do_nothing(index_elements=["id"]), rows)


def read_shadow_answers(connection: Connection, task: str, limit: int) -> list[ShadowAnswer]:
    """The newest first, `limit` at most."""
    newest = shadow_answers.c.at.desc(), shadow_answers.c.id
    query = select(shadow_answers).where(shadow_answers.c.task == task).order_by(*newest).limit(limit)
    return [ShadowAnswer(**row._mapping) for row in connection.execute(query)]


def summarise_shadow_answers(connection: Connection, task: str) -> list[ShadowSummary]:
    """One summary a shadow version and backend, those with most answers first."""
    who = shadow_answers.c.shadow_version, shadow_answers.c.shadow_label, shadow_answers.c.shadow_backend
    count = func.count()
    query = (
        select(
            *who,
            count.label("count"),
            func.count(shadow_answers.c.shadow_error).label("failed"),
            func.avg(shadow_answers.c.agreement).label("agreement"),
            func.avg(shadow_answers.c.primary_ms).label("primary_ms"),
            func.avg(shadow_answers.c.shadow_ms).label("shadow_ms"),
        )
        .where(shadow_answers.c.task == task)
        .group_by(*who)
        .order_by(count.desc(), *who)
    )
    return [ShadowSummary(**row._mapping) for row in connection.execute(query)]


def delete_shadow_answers(connection: Connection, before: datetime) -> int:
    """Removes those that were recorded earlier; returns how many."""
    return connection.execute(delete(shadow_answers).where(shadow_answers.c.at < before)).rowcount
