"""What goes: all that one unit left, and what is older than it may be."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import Column, ColumnElement, Connection, Table, delete, select, tuple_

from prompt_store.access import Principal
from prompt_store.changes import record
from prompt_store.database import Database, insert_into
from prompt_store.tables import answers, captures, erased_units, exposures, outcomes, shadow_answers

_SLICE_ROWS = 10_000
_PAUSE_S = 0.1  # SQLite lets nobody queue: who waits to write looks again after that long at most


@dataclass(frozen=True, slots=True)
class Erased:
    """How many rows went, by table."""

    exposures: int
    answers: int
    outcomes: int
    captures: int
    shadow_answers: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """How many rows were too old, by table."""

    exposures: int
    answers: int
    outcomes: int
    captures: int


def erase_unit(connection: Connection, unit_hash: str, principal: Principal, at: datetime) -> Erased:
    """Removes what a unit left, and has what journals still hold of it from before now not taken in.

    The audit says that a unit was erased and what that took, not which.
    """
    at_ms = round(at.timestamp() * 1000)
    tables = (exposures, answers, outcomes, captures, shadow_answers)
    erased = Erased(*(_delete(connection, table, table.c.unit_hash == unit_hash) for table in tables))
    insert = insert_into(connection, erased_units).values(unit_hash=unit_hash, at_ms=at_ms, principal=principal.name)
    # The clocks of two replicas may differ; the later of two erasures holds.
    later = {"at_ms": insert.excluded.at_ms, "principal": insert.excluded.principal}
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=["unit_hash"], set_=later, where=insert.excluded.at_ms > erased_units.c.at_ms
        )
    )
    record(
        connection, "unit", action="unit.erase", task=None, subject="", principal=principal, at=at,
        details=asdict(erased),
    )  # fmt: skip
    return erased


def forget(database: Database, before_ms: int, now_ms: int, *, slice_rows: int = _SLICE_ROWS) -> Forgotten:
    """Removes exposures, answers and outcomes from before then, and captures whose time is over.

    In slices, each a transaction of its own, so that nobody waits long to write. Erasures are kept for good, a hash and
    a time each: a journal may ship what is older than anything here.
    """

    def forgotten(table: Table, moment: Column[int], end_ms: int) -> int:
        keys = table.primary_key.columns
        oldest = select(*keys).where(moment < end_ms).order_by(moment).limit(slice_rows)
        total = 0
        while True:
            with database.write(announced=False) as connection:
                deleted = _delete(connection, table, tuple_(*keys).in_(oldest))
            total += deleted
            if deleted < slice_rows:
                return total
            time.sleep(_PAUSE_S)

    return Forgotten(
        forgotten(exposures, exposures.c.at_ms, before_ms),
        forgotten(answers, answers.c.at_ms, before_ms),
        forgotten(outcomes, outcomes.c.generated_ms, before_ms),
        forgotten(captures, captures.c.expires_ms, now_ms + 1),
    )


def _delete(connection: Connection, table: Table, where: ColumnElement[bool]) -> int:
    return connection.execute(delete(table).where(where)).rowcount
