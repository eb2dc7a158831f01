"""The way from the journal to the store: patience with a store that is away, and its end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from sqlalchemy import select

from prompt_store.database import Database
from prompt_store.ledger.entries import Entry
from prompt_store.prompts.registry import Registry
from prompt_store.tables import answers
from service.ledger.journal import Journal
from service.ledger.shipping import Shipper
from tests.processes import eventually
from tests.prompt_store.ledger.entered import answered
from tests.service.ledger.journalling import Store, exposure


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def journal(folder: Path) -> Journal:
    """With three entries; tests close it."""
    journal = Journal.open(folder)
    for number in range(3):
        journal.append(exposure(str(number)))
    return journal


def left(folder: Path) -> list[str]:
    """What the next process ships."""
    store = Store()
    shipper = Shipper(Journal.open(folder), store.write, every_s=60.0, pause_s=0.0)
    shipper.ship()
    shipper.close(60.0)
    return store.requests


def test_a_store_that_is_quick_has_all_when_the_shipper_is_closed(
    journal: Journal, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    Shipper(journal, store.write).close(60.0)
    assert store.requests == ["0", "1", "2"]
    assert [path.name for path in folder.iterdir()] == ["lock"]
    assert caplog.text == ""


def test_what_a_store_that_is_away_at_the_end_did_not_take_is_shipped_after_the_next_start(
    journal: Journal, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    store.away = True
    Shipper(journal, store.write).close(60.0)
    assert "so the journal is shipped after the next start: the store is away; wait" in caplog.text
    assert left(folder) == ["0", "1", "2"]


def test_a_store_that_does_not_answer_at_the_end_holds_up_no_longer_than_it_may(
    journal: Journal, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, answering = Store(), threading.Event()

    def write(entries: Sequence[Entry]) -> None:
        assert answering.wait(60.0)
        store.write(entries)

    Shipper(journal, write).close(0.01)
    assert "the store does not answer: what the journal holds is shipped after the next start" in caplog.text
    assert store.requests == []
    # The write that is under way ends well all the same, and then the journal is there for whoever comes.
    assert left(folder) == []
    answering.set()
    assert eventually(lambda: left(folder), bool) == store.requests == ["0", "1", "2"]


def test_when_time_is_up_at_the_end_the_rest_is_shipped_after_the_next_start(
    journal: Journal, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now, store = [0.0], Store()

    def write(entries: Sequence[Entry]) -> None:
        now[0] += 40.0
        store.write(entries)

    Shipper(journal, write, largest=1, clock=lambda: now[0]).close(60.0)
    assert store.requests == ["0", "1"]
    assert "time is up: what the journal still holds is shipped after the next start" in caplog.text
    assert left(folder) == ["0", "1", "2"]  # of its segment all is shipped again, which the store sees


def test_the_store_is_asked_less_and_less_while_it_is_away_and_at_once_when_it_is_back(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    now, store, asked_at = [0.0], Store(), list[float]()

    def write(entries: Sequence[Entry]) -> None:
        asked_at.append(now[0])
        store.write(entries)

    def waits(seconds: int) -> list[float]:
        asked_at.clear()
        for _ in range(seconds):
            shipper.ship()
            now[0] += 1.0
        return [later - earlier for earlier, later in pairwise(asked_at)]

    shipper = Shipper(journal, write, every_s=1.0, pause_s=0.0, clock=lambda: now[0])
    store.away = True
    assert waits(130) == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    store.away = False
    waits(30)
    assert store.requests == ["0", "1", "2"]
    store.away = True
    journal.append(exposure("3"))
    assert waits(8) == [1.0, 2.0, 4.0]
    assert caplog.text.count("cannot be shipped to the store, it is kept until it can") == 2
    assert caplog.text.count("can be shipped to the store again") == 1
    shipper.close(60.0)


def test_batches_grow_while_they_do_not_keep_up_and_are_small_again_after_that(folder: Path) -> None:
    journal = Journal.open(folder)
    now, sizes = [0.0], list[int]()

    def write(entries: Sequence[Entry]) -> None:
        sizes.append(len(entries))
        now[0] += 1.0

    shipper = Shipper(journal, write, every_s=1.0, pause_s=0.0, largest=256, clock=lambda: now[0])
    for number in range(1000):
        journal.append(exposure(str(number)))
    while shipper.ship():
        pass
    assert sizes == [64, 128, 256, 256, 256, 40]
    for number in range(100):
        journal.append(exposure(str(number)))
    shipper.ship()
    assert sizes[6:] == [64]
    shipper.close(60.0)
    assert sizes[6:] == [64, 36]


def test_of_many_entries_the_one_that_the_store_cannot_hold_is_set_aside_alone(location: str, folder: Path) -> None:
    journal = Journal.open(folder)
    for number in range(200):
        journal.append(answered(str(number), prompt_tokens=2**63 if number == 137 else number))
    with Database.open(location) as database:
        registry = Registry(database)
        shipper = Shipper(journal, registry.add_entries, every_s=60.0, pause_s=0.0)
        shipper.ship()
        shipper.close(60.0)
        with database.read() as connection:
            kept = set(connection.execute(select(answers.c.request)).scalars())
    assert kept == {str(number) for number in range(200) if number != 137}
    assert journal.stats.refused == 1
    (line,) = (folder / "refused.jsonl").read_text().splitlines()
    assert str(2**63) in line
    assert '"137"' in line
