from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from sqlalchemy import select

from prompt_store.database import Database
from prompt_store.ledger.entries import Entry
from prompt_store.prompts.registry import Registry
from prompt_store.tables import answers, audit, captures, exposures, outcomes
from tests.prompt_store.building import ANNA
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


def test_the_newest_outcome_holds_in_whatever_order_they_come(registry: Registry) -> None:
    told = [
        outcome("1", True, at_ms=START_MS + 1),
        outcome("1", False, at_ms=START_MS + 3),
        outcome("1", 0.5, at_ms=START_MS + 3),
        outcome("1", "late", at_ms=START_MS + 2, metric="demonstration"),
        outcome("1", "early", at_ms=START_MS + 1, metric="demonstration"),
        outcome("1", "zebra", at_ms=START_MS + 2, metric="demonstration"),
    ]
    for place, order in enumerate(itertools.permutations(told)):
        moved = [_renamed(entry, f"r{place}") for entry in order]
        if place % 2:
            registry.add_entries(moved)
        else:
            for entry in moved:
                registry.add_entries([entry])
    with registry.database.read() as connection:
        kept = connection.execute(select(outcomes.c.metric, outcomes.c.value, outcomes.c.text).distinct()).all()
    assert sorted(map(tuple, kept), key=repr) == [("demonstration", None, "zebra"), ("helpful", 0.5, None)]


def _renamed(entry: Any, request: str) -> Any:
    return msgspec.structs.replace(entry, request=request)


def test_a_boolean_is_kept_as_a_number_and_a_text_as_text(registry: Registry) -> None:
    registry.add_entries([outcome("1", True), outcome("2", False), outcome("3", 0.25), outcome("4", "nul\0")])
    with registry.database.read() as connection:
        kept = connection.execute(select(outcomes.c.value, outcomes.c.text).order_by(outcomes.c.request)).all()
    assert [tuple(row) for row in kept] == [(1.0, None), (0.0, None), (0.25, None), (None, "nul\ufffd")]


def test_what_an_erased_unit_left_before_is_gone_and_stays_out_and_what_it_does_later_is_kept(
    registry: Registry,
) -> None:
    old: list[Entry] = [exposure("1"), answered("1"), outcome("1"), captured("1")]
    registry.add_entries([*old, exposure("2")])
    erased = registry.erase_unit("u1", ANNA)
    assert (erased.exposures, erased.answers, erased.outcomes, erased.captures, erased.shadow_answers) == (
        1,
        1,
        1,
        1,
        0,
    )
    later_ms = 4_000_000_000_000
    registry.add_entries([*old, outcome("1", at_ms=later_ms), exposure("3", unit_hash="u1", at_ms=later_ms)])
    assert [len(found) for found in rows(registry)] == [2, 0, 0, 0]
    with registry.database.read() as connection:
        entry = connection.execute(select(audit).where(audit.c.action == "unit.erase")).one()
    assert "u1" not in f"{entry.subject}{entry.details}{entry.reason}"


def test_what_is_too_old_is_forgotten(registry: Registry) -> None:
    registry.add_entries(
        [
            exposure("1"), exposure("2", at_ms=START_MS + 10), answered("1"), outcome("1"),
            outcome("2", generated_ms=START_MS + 10), captured("1", expires_ms=1), captured("2"),
        ]
    )  # fmt: skip
    forgotten = registry.forget(START_MS + 5)
    assert (forgotten.exposures, forgotten.answers, forgotten.outcomes, forgotten.captures) == (1, 1, 1, 1)
    assert [len(found) for found in rows(registry)] == [1, 0, 1, 1]
