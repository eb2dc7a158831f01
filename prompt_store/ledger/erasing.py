"""What goes: all that one unit left, and what is older than it may be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, Table, delete

from prompt_store.access import Principal
from prompt_store.changes import record
from prompt_store.database import insert_into
from prompt_store.tables import answers, captures, erased_units, exposures, outcomes, shadow_answers


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


def forget(connection: Connection, before_ms: int, now_ms: int) -> Forgotten:
    """Removes exposures, answers and outcomes from before then, and captures whose time is over.

    Erasures from before then go too: nothing that old is taken in any more.
    """
    _delete(connection, erased_units, erased_units.c.at_ms < before_ms)
    return Forgotten(
        _delete(connection, exposures, exposures.c.at_ms < before_ms),
        _delete(connection, answers, answers.c.at_ms < before_ms),
        _delete(connection, outcomes, outcomes.c.generated_ms < before_ms),
        _delete(connection, captures, captures.c.expires_ms <= now_ms),
    )


def _delete(connection: Connection, table: Table, where: ColumnElement[bool]) -> int:
    return connection.execute(delete(table).where(where)).rowcount
