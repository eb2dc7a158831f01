"""What one unit left goes and stays away, and what is older than it may be goes a slice at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import event, func, select

from prompt_store.database import Database
from prompt_store.ledger import erasing
from prompt_store.ledger.entries import Entry
from prompt_store.ledger.erasing import Forgotten
from prompt_store.prompts.registry import Registry
from prompt_store.tables import answers, audit, captures, exposures, outcomes
from tests.prompt_store.building import ANNA
from tests.prompt_store.ledger.entered import START_MS, answered, captured, exposure, outcome

LATER_MS = 4_000_000_000_000
LEFT: list[Entry] = [exposure("1"), answered("1"), outcome("1"), captured("1")]


@pytest.fixture
def registry(location: str) -> Iterator[Registry]:
    with Database.open(location) as database:
        yield Registry(database)


def counts(registry: Registry) -> list[int]:
    """How many exposures, answers, outcomes and captures there are."""
    with registry.database.read() as connection:
        tables = (exposures, answers, outcomes, captures)
        return [connection.execute(select(func.count()).select_from(table)).scalar_one() for table in tables]


def test_what_an_erased_unit_left_before_is_gone_and_stays_out_and_what_it_does_later_is_kept(
    registry: Registry,
) -> None:
    registry.add_entries([*LEFT, exposure("2")])
    erased = registry.erase_unit("u1", ANNA)
    assert (erased.exposures, erased.answers, erased.outcomes, erased.captures) == (1, 1, 1, 1)
    registry.add_entries([*LEFT, outcome("1", at_ms=LATER_MS), exposure("3", unit_hash="u1", at_ms=LATER_MS)])
    assert counts(registry) == [2, 0, 0, 0]
    with registry.database.read() as connection:
        entry = connection.execute(select(audit).where(audit.c.action == "unit.erase")).one()
    assert "u1" not in f"{entry.subject}{entry.details}{entry.reason}"


def test_the_later_of_two_erasures_holds(location: str) -> None:
    with Database.open(location) as database:
        for at_ms in (START_MS + 10, START_MS - 10):
            clock = datetime.fromtimestamp(at_ms / 1000, UTC)
            Registry(database, now=lambda clock=clock: clock).erase_unit("u1", ANNA)  # type: ignore[misc]
        registry = Registry(database)
        registry.add_entries(LEFT)
        assert counts(registry) == [0, 0, 0, 0]


def test_what_is_shipped_while_its_unit_is_erased_stays_out(registry: Registry) -> None:
    waits = threading.Event()
    shipping = threading.Thread(target=registry.add_entries, args=(LEFT,))

    def about_to_run(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if threading.current_thread() is shipping and ("IMMEDIATE" in statement or "FOR UPDATE" in statement):
            waits.set()

    event.listen(registry.database.storage.engine, "before_cursor_execute", about_to_run)
    with registry.database.write() as connection:
        shipping.start()
        assert waits.wait(10)
        erasing.erase_unit(connection, "u1", ANNA, datetime.now(UTC))
    shipping.join()
    assert counts(registry) == [0, 0, 0, 0]


def test_what_is_too_old_is_forgotten(registry: Registry) -> None:
    registry.add_entries(
        [
            exposure("1"), exposure("2", at_ms=START_MS + 10), answered("1"), answered("2", at_ms=START_MS + 10),
            outcome("1"), outcome("2", generated_ms=START_MS + 10), captured("1", expires_ms=1), captured("2"),
        ]
    )  # fmt: skip
    assert registry.forget(START_MS + 10) == Forgotten(1, 1, 1, 1)
    assert counts(registry) == [1, 1, 1, 1]


def test_what_is_too_old_goes_in_slices_so_that_others_can_write_in_between(registry: Registry) -> None:
    registry.add_entries(
        [
            *(exposure(str(place)) for place in range(5)),
            *(outcome("1", metric=metric) for metric in ("helpful", "kind", "short")),
            exposure("new", at_ms=START_MS + 10),
        ]
    )
    commits: list[Any] = []
    event.listen(registry.database.storage.engine, "commit", commits.append)
    assert erasing.forget(registry.database, START_MS + 5, 0, slice_rows=2) == Forgotten(5, 0, 3, 0)
    assert len(commits) == 3 + 1 + 2 + 1  # the last slice of each table is not full
    assert counts(registry) == [1, 0, 0, 0]


def test_what_is_shipped_after_it_would_have_been_forgotten_stays_out_of_an_erased_unit(registry: Registry) -> None:
    registry.erase_unit("u1", ANNA)
    registry.forget(LATER_MS)
    registry.add_entries([*LEFT, exposure("2")])
    assert counts(registry) == [1, 0, 0, 0]
