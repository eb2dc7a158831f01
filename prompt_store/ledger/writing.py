"""Taking entries in: in batches, in any order, and as often as they come.

Whoever ships shares the interpreter's lock with requests, so rows go to the database by few calls and not one by one:
to SQLite as tuples, to PostgreSQL as one JSON document that the server takes apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Select, Table, Tuple, bindparam, cast, column, func, literal_column, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

from prompt_store.ledger.entries import Answered, Captured, Entry, Exposure, Outcome
from prompt_store.names import storable_text
from prompt_store.tables import answers, captures, erased_units, exposures, outcomes

# What of an outcome's rows holds: the newest, then text over number, then the greater. All that any order of arrival
# comes to the same by.
_Rank = tuple[int, bool, float, str, str, str]

_Row = tuple[Any, ...]

_encoder = msgspec.json.Encoder()


def add_entries(connection: Connection, entries: Sequence[Entry]) -> None:
    """Keeps those that are not there yet, and of outcomes the newest. What erased units left before that goes."""
    erased = erased_ms(connection, {entry.unit_hash for entry in entries})
    if erased:
        entries = [entry for entry in entries if _happened_ms(entry) > erased.get(entry.unit_hash, -1)]
    by_kind: dict[type[Entry], list[Entry]] = {}
    for entry in _storable(entries):
        by_kind.setdefault(type(entry), []).append(entry)
    for kind, kept in by_kind.items():
        table, rows = _KINDS[kind]
        _insert(connection, table, rows(kept))


def erased_ms(connection: Connection, units: Collection[str]) -> dict[str, int]:
    """When which of these units was erased."""
    query = _erased(connection.dialect.name)
    return {row.unit_hash: row.at_ms for row in connection.execute(query, {"units": json.dumps(sorted(units))})}


@cache
def _erased(dialect: str) -> Select[tuple[str, int]]:
    """Of the units in a JSON array, which is one parameter however many they are."""
    if dialect == "postgresql":
        asked = func.json_array_elements_text(cast(bindparam("units"), postgresql.JSON))
        names = asked.table_valued("value")
    else:
        names = func.json_each(bindparam("units")).table_valued("value")
    return select(erased_units.c.unit_hash, erased_units.c.at_ms).where(
        erased_units.c.unit_hash.in_(select(names.c.value))
    )


def _happened_ms(entry: Entry) -> int:
    """When the unit did what the entry is of: an outcome that is told later is of the generation that it is about."""
    return entry.generated_ms if isinstance(entry, Outcome) else entry.at_ms


def _storable(entries: Sequence[Entry]) -> Sequence[Entry]:
    """What a database cannot hold of a text is replaced; hardly ever is there any."""
    try:
        encoded = _encoder.encode(entries)
    except UnicodeEncodeError:
        return [_replaced(entry) for entry in entries]
    return [_replaced(entry) for entry in entries] if b"\\u0000" in encoded else entries


def _replaced(entry: Entry) -> Entry:
    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {storable_text(name): replaced(inner) for name, inner in value.items()}
        return storable_text(value) if isinstance(value, str) else value

    return msgspec.structs.replace(entry, **{name: replaced(getattr(entry, name)) for name in entry.__struct_fields__})


def _as_they_are(entries: Iterable[Any]) -> list[_Row]:
    return [msgspec.structs.astuple(entry) for entry in entries]


def _of_captures(entries: Iterable[Any]) -> list[_Row]:
    encoded = (
        entry
        if entry.inputs is None
        else msgspec.structs.replace(entry, inputs=json.dumps(entry.inputs, ensure_ascii=False))
        for entry in entries
    )
    return _as_they_are(encoded)


def _of_outcomes(entries: Iterable[Any]) -> list[_Row]:
    """The one of each generation's metric that holds: a statement changes no row twice."""
    newest: dict[tuple[str, str], Outcome] = {}
    for entry in entries:
        known = newest.get((entry.request, entry.metric))
        if known is None or _rank(entry) > _rank(known):
            newest[entry.request, entry.metric] = entry
    return [
        (*row[:_VALUE], None, row[_VALUE], *row[_VALUE + 1 :])
        if isinstance(row[_VALUE], str)
        else (*row[:_VALUE], float(row[_VALUE]), None, *row[_VALUE + 1 :])
        for row in _as_they_are(newest.values())
    ]


_VALUE = Outcome.__struct_fields__.index("value")

_KINDS: dict[type[Entry], tuple[Table, Callable[[Iterable[Any]], list[_Row]]]] = {
    Exposure: (exposures, _as_they_are),
    Answered: (answers, _as_they_are),
    Captured: (captures, _of_captures),
    Outcome: (outcomes, _of_outcomes),
}


def _rank(entry: Outcome) -> _Rank:
    text = isinstance(entry.value, str)
    value = (0.0, str(entry.value)) if text else (float(entry.value), "")
    return entry.at_ms, text, *value, entry.source, entry.principal


def _insert(connection: Connection, table: Table, rows: Sequence[_Row]) -> None:
    """Rows are by the table's columns, in their order."""
    if connection.dialect.name == "postgresql":
        names = table.c.keys()
        documents = [dict(zip(names, row, strict=True)) for row in rows]
        connection.execute(_from_json(table), {"rows": _encoder.encode(documents).decode()})
    else:
        connection.exec_driver_sql(_by_place(table), rows)


@cache
def _by_place(table: Table) -> str:
    return str(_kept(sqlite.insert(table), table, collation="BINARY").compile(dialect=sqlite.dialect()))


@cache
def _from_json(table: Table) -> postgresql.Insert:
    document = func.json_to_recordset(cast(bindparam("rows"), postgresql.JSON))
    rows = document.table_valued(*(column(each.name, each.type) for each in table.c)).render_derived(with_types=True)
    return _kept(postgresql.insert(table).from_select(table.c.keys(), select(*rows.c)), table, collation="C")


_Insert = TypeVar("_Insert", postgresql.Insert, sqlite.Insert)


def _kept(insert: _Insert, table: Table, *, collation: str) -> _Insert:
    """Of rows that are there already, the first holds; of outcomes, the one of the highest rank as `_rank` has it."""
    keys = [key.name for key in table.primary_key]
    if table is not outcomes:
        return insert.on_conflict_do_nothing(index_elements=keys)
    return insert.on_conflict_do_update(
        index_elements=keys,
        set_={each.name: insert.excluded[each.name] for each in table.c if each.name not in keys},
        where=_rank_of_row(insert.excluded, collation) > _rank_of_row(outcomes.c, collation),
    )


def _rank_of_row(columns: Any, collation: str) -> Tuple:
    """As `_rank`. Python orders text by code points, which is the order of its UTF-8 bytes."""
    said, number = (
        func.coalesce(columns.text, literal_column("''")),
        func.coalesce(columns.value, literal_column("0.0")),
    )
    texts = (each.collate(collation) for each in (said, columns.source, columns.principal))
    return tuple_(columns.at_ms, columns.text.is_not(None), number, *texts)
