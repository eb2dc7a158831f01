from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy import text as sql

from prompt_store.database import Database
from prompt_store.errors import StoreUnavailable
from prompt_store.ledger.entries import Entry, Outcome
from prompt_store.prompts.registry import Registry
from prompt_store.tables import answers, captures, exposures, outcomes
from tests.prompt_store.ledger.entered import START_MS, answered, captured, exposure, outcome


@pytest.fixture
def registry(location: str) -> Iterator[Registry]:
    with Database.open(location) as database:
        yield Registry(database)


def rows(registry: Registry) -> list[Any]:
    """All that the ledger holds."""
    with registry.database.read() as connection:
        tables = (exposures, answers, outcomes, captures)
        return [sorted(map(tuple, connection.execute(select(table)).all()), key=repr) for table in tables]


def test_the_same_twice_is_once_in_one_batch_or_in_two(registry: Registry) -> None:
    entries: list[Entry] = [exposure("1"), answered("1"), outcome("1"), captured("1"), exposure("2")]
    registry.add_entries([*entries, *entries])
    once = rows(registry)
    assert [len(found) for found in once] == [2, 1, 1, 1]
    registry.add_entries(entries)
    assert rows(registry) == once


def test_the_first_of_one_request_is_kept_in_one_batch_or_in_two(registry: Registry) -> None:
    registry.add_entries([exposure("1", arm="a"), exposure("1", arm="b")])
    registry.add_entries([exposure("1", arm="c")])
    with registry.database.read() as connection:
        assert connection.execute(select(exposures.c.arm)).scalars().all() == ["a"]


told = st.builds(
    outcome,
    st.sampled_from(["1", "2"]),
    st.booleans() | st.floats(-1, 1, width=16) | st.text("aZé\uffff\U0001f600\0", max_size=2),
    metric=st.sampled_from(["helpful", "demonstration"]),
    at_ms=st.integers(START_MS, START_MS + 2),
    source=st.sampled_from(["caller", "judge"]),
    principal=st.sampled_from(["anna", "Ben", "Émile"]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(told, max_size=6), max_size=4))
def test_the_same_outcome_holds_in_whatever_order_and_batches_they_come(
    registry: Registry, batches: list[list[Outcome]]
) -> None:
    with registry.database.write() as connection:
        connection.execute(outcomes.delete())
    for batch in batches:
        registry.add_entries(batch)
    greatest: dict[tuple[str, str], Any] = {}
    for entry in itertools.chain(*batches):
        value = entry.value.replace("\0", "\ufffd") if isinstance(entry.value, str) else float(entry.value)
        said = (value.encode(),) if isinstance(value, str) else ()
        number = 0.0 if isinstance(value, str) else value
        # Newest, then text over number, then the greater by its bytes, then who told it.
        rank = entry.at_ms, len(said), number, said, entry.source, entry.principal.encode()
        found = rank, value, entry.source, entry.principal
        key = entry.request, entry.metric
        greatest[key] = max(greatest.get(key, found), found, key=lambda each: each[0])
    columns = outcomes.c.request, outcomes.c.metric, outcomes.c.at_ms, outcomes.c.value, outcomes.c.text
    with registry.database.read() as connection:
        kept = connection.execute(select(*columns, outcomes.c.source, outcomes.c.principal)).all()
    assert {
        (row.request, row.metric): (row.at_ms, row.value if row.text is None else row.text, row.source, row.principal)
        for row in kept
    } == {key: (rank[0], *found) for key, (rank, *found) in greatest.items()}


def test_a_database_that_orders_text_as_a_language_does_keeps_the_same_outcomes(postgresql_location: str) -> None:
    told = [outcome("1", text, metric="demonstration") for text in ("Z", "b")]
    with Database.open(postgresql_location) as database:
        with database.write() as connection:
            for column in ("text", "principal", "source"):
                connection.execute(sql(f'ALTER TABLE outcomes ALTER COLUMN "{column}" TYPE text COLLATE "en-x-icu"'))
        registry = Registry(database)
        for place, order in enumerate((told, told[::-1])):
            for entry in order:
                registry.add_entries([msgspec.structs.replace(entry, request=str(place))])
        with database.read() as connection:
            assert connection.execute(select(outcomes.c.text)).scalars().all() == ["b", "b"]


def test_a_boolean_is_kept_as_a_number_and_a_text_as_text(registry: Registry) -> None:
    registry.add_entries([outcome("1", True), outcome("2", False), outcome("3", 0.25), outcome("4", "nul\0")])
    with registry.database.read() as connection:
        kept = connection.execute(select(outcomes.c.value, outcomes.c.text).order_by(outcomes.c.request)).all()
    assert [tuple(row) for row in kept] == [(1.0, None), (0.0, None), (0.25, None), (None, "nul\ufffd")]


def test_tables_that_are_not_as_they_should_be_are_the_stores_fault_and_no_entrys(registry: Registry) -> None:
    with registry.database.write() as connection:
        connection.execute(sql("ALTER TABLE outcomes RENAME TO elsewhere"))
    with pytest.raises(StoreUnavailable, match=r"(cannot take the ledger in|cannot be used now): .*outcomes"):
        registry.add_entries([exposure("1"), outcome("1")])
    with registry.database.write() as connection:
        connection.execute(sql("ALTER TABLE elsewhere RENAME TO outcomes"))
    registry.add_entries([exposure("1"), outcome("1")])
    assert [len(found) for found in rows(registry)] == [1, 0, 1, 0]
