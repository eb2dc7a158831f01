"""Captured requests come out once each, oldest first, with what came of them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from prompt_store.database import Database
from prompt_store.errors import UnknownTask
from prompt_store.ledger.captured import CapturedRow
from prompt_store.prompts.registry import Registry
from tests.prompt_store.building import ANNA, task
from tests.prompt_store.ledger.entered import START_MS, answered, captured, outcome


@pytest.fixture
def registry(location: str) -> Iterator[Registry]:
    with Database.open(location) as database:
        registry = Registry(database, now=lambda: datetime.fromtimestamp(START_MS / 1000, UTC))
        for name in ("support", "orders"):
            registry.apply_task(task(name), ANNA)
        yield registry


@pytest.mark.parametrize("number", [500, 1001])
def test_every_request_comes_once_and_the_oldest_first_over_all_pages(registry: Registry, number: int) -> None:
    entries = [captured(f"{place:04}", at_ms=START_MS + place // 300) for place in range(number)]  # many at one time
    registry.add_entries(entries[::-1])
    assert [row.entry for row in registry.captured("support")] == entries


def test_a_request_comes_with_its_outcomes_and_what_was_measured_of_it(registry: Registry) -> None:
    entry = captured("1", inputs=None, prompt="hello")
    registry.add_entries(
        [
            entry,
            answered("1", first_token_ms=20.0, refused=True, outcome="length", cost=0.5, completion_tokens=None),
            outcome("1", True),
            outcome("1", 0.25, metric="accuracy"),
            outcome("1", "refund", metric="demonstration"),
            outcome("2", False),
        ]
    )
    facts = {
        "latency_ms": 100.0, "first_token_ms": 20.0, "cost": 0.5, "prompt_tokens": 3.0, "error": 0.0, "refused": 1.0,
        "cut_off": 1.0,
    }  # fmt: skip
    said: dict[str, float | str] = {"helpful": 1.0, "accuracy": 0.25, "demonstration": "refund"}
    assert list(registry.captured("support")) == [CapturedRow(entry, said, facts, "tone", "a")]


def test_a_request_of_which_nothing_else_is_known_comes_too(registry: Registry) -> None:
    registry.add_entries([captured("1")])
    assert list(registry.captured("support")) == [CapturedRow(captured("1"), {}, {}, "", "")]


def test_requests_whose_time_is_over_and_those_of_other_tasks_do_not_come(registry: Registry) -> None:
    registry.add_entries(
        [
            captured("1", expires_ms=START_MS), captured("2", expires_ms=START_MS + 1), captured("3", task="orders"),
            outcome("3", True, task="orders"),
        ]
    )  # fmt: skip
    assert [row.entry.request for row in registry.captured("support")] == ["2"]
    assert [(row.entry.request, row.outcomes) for row in registry.captured("orders")] == [("3", {"helpful": 1.0})]


def test_an_unknown_task_is_refused(registry: Registry) -> None:
    with pytest.raises(UnknownTask):
        list(registry.captured("nothing"))
