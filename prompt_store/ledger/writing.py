"""Taking entries in: in batches, in any order, and as often as they come."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Table, and_, func, or_, select

from prompt_store.database import insert_into
from prompt_store.ledger.entries import Answered, Captured, Entry, Exposure, Outcome
from prompt_store.names import storable_text
from prompt_store.tables import answers, captures, erased_units, exposures, outcomes

_ASKED_AT_ONCE = 500

# What of an outcome's rows holds: the newest, then text over number, then the greater. All that any order of arrival
# comes to the same by.
_Rank = tuple[int, bool, float, str]


def add_entries(connection: Connection, entries: Sequence[Entry]) -> None:
    """Keeps those that are not there yet, and of outcomes the newest. What erased units left before that goes."""
    erased = erased_ms(connection, {entry.unit_hash for entry in entries})
    kept = [entry for entry in entries if _happened_ms(entry) > erased.get(entry.unit_hash, -1)]
    for kind, table in ((Exposure, exposures), (Answered, answers), (Captured, captures)):
        _insert(connection, table, (entry for entry in kept if isinstance(entry, kind)))
    _add_outcomes(connection, [entry for entry in kept if isinstance(entry, Outcome)])


def erased_ms(connection: Connection, units: Collection[str]) -> dict[str, int]:
    """When which of these units was erased."""
    found: dict[str, int] = {}
    listed = sorted(units)
    for start in range(0, len(listed), _ASKED_AT_ONCE):
        asked = erased_units.c.unit_hash.in_(listed[start : start + _ASKED_AT_ONCE])
        for row in connection.execute(select(erased_units.c.unit_hash, erased_units.c.at_ms).where(asked)):
            found[row.unit_hash] = row.at_ms
    return found


def _happened_ms(entry: Entry) -> int:
    """When the unit did what the entry is of: an outcome that is told later is of the generation that it is about."""
    return entry.generated_ms if isinstance(entry, Outcome) else entry.at_ms


def _insert(connection: Connection, table: Table, entries: Iterable[Exposure | Answered | Captured]) -> None:
    rows = list({entry.request: _row(entry) for entry in entries}.values())
    if rows:
        connection.execute(insert_into(connection, table).on_conflict_do_nothing(index_elements=["request"]), rows)


def _add_outcomes(connection: Connection, entries: Sequence[Outcome]) -> None:
    newest: dict[tuple[str, str], Outcome] = {}
    for entry in entries:
        known = newest.get((entry.request, entry.metric))
        if known is None or _rank(entry) > _rank(known):
            newest[entry.request, entry.metric] = entry
    if not newest:
        return
    insert = insert_into(connection, outcomes)
    new, old = insert.excluded, outcomes.c
    said = func.coalesce(new.text, ""), func.coalesce(old.text, "")
    number = func.coalesce(new.value, 0.0), func.coalesce(old.value, 0.0)
    greater = or_(
        and_(new.text.is_not(None), old.text.is_(None)),
        and_(new.text.is_not(None), old.text.is_not(None), said[0] > said[1]),
        and_(new.text.is_(None), old.text.is_(None), number[0] > number[1]),
    )
    keys = ("request", "metric")
    changed = {column.name: new[column.name] for column in outcomes.c if column.name not in keys}
    upsert = insert.on_conflict_do_update(
        index_elements=list(keys),
        set_=changed,
        where=or_(new.at_ms > old.at_ms, and_(new.at_ms == old.at_ms, greater)),
    )
    connection.execute(upsert, [_row(entry) for entry in newest.values()])


def _rank(entry: Outcome) -> _Rank:
    if isinstance(entry.value, str):
        return entry.at_ms, True, 0.0, storable_text(entry.value)
    return entry.at_ms, False, float(entry.value), ""


def _row(entry: Entry) -> dict[str, Any]:
    """By column; what a database cannot hold of a text is replaced."""
    row = {name: getattr(entry, name) for name in entry.__struct_fields__}
    if isinstance(entry, Outcome):
        value = row.pop("value")
        is_text = isinstance(value, str)
        row |= {"value": None if is_text else float(value), "text": value if is_text else None}
    elif isinstance(entry, Captured) and entry.inputs is not None:
        row["inputs"] = json.dumps(entry.inputs, ensure_ascii=False)
    return {name: storable_text(value) if isinstance(value, str) else value for name, value in row.items()}
