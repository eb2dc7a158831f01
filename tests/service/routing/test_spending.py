from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from prompt_store.errors import StoreUnavailable
from service.routing.errors import CostCeilingReached
from service.routing.spending import Spending, Spent

TODAY = date(2026, 11, 24)
TOMORROW = date(2026, 11, 25)


class Clock:
    """Tells the time that it is set to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 24, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


class Ledger:
    """The store's side of it, shared by replicas: adds up what it is told, away while `away`."""

    def __init__(self) -> None:
        self.rows: defaultdict[tuple[date, str, str], float] = defaultdict(float)
        self.away = False
        self.batches: list[list[Spent]] = []
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def read(self, day: date) -> Mapping[tuple[str, str], float]:
        self._answer()
        return {(task, backend): amount for (when, task, backend), amount in self.rows.items() if when == day}

    def write(self, spent: Sequence[Spent]) -> None:
        self.entered.set()
        assert self.go_on.wait(10)
        self._answer()
        self.batches.append(list(spent))
        for day, task, backend, amount in spent:
            self.rows[day, task, backend] += amount

    def _answer(self) -> None:
        if self.away:
            raise StoreUnavailable("the store is away")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def spending(clock: Clock, ledger: Ledger) -> Spending:
    return Spending(clock, ledger.read, ledger.write)


def test_what_was_added_counts_at_once(spending: Spending, ledger: Ledger) -> None:
    spending.add("support", "openai", 0.25)
    spending.add("support", "azure", 0.5)
    spending.add("copy", "openai", 4.0)
    assert (spending.today("support"), spending.today("copy"), spending.today("other")) == (0.75, 4.0, 0.0)
    assert not ledger.batches


def test_a_flush_writes_each_sum_once_and_changes_no_total(spending: Spending, ledger: Ledger) -> None:
    for _ in range(4):
        spending.add("support", "openai", 0.25)
    spending.add("support", "azure", 0.5)
    for _ in range(3):
        spending.flush()
        assert spending.today("support") == 1.5
    assert ledger.batches == [[(TODAY, "support", "openai", 1.0), (TODAY, "support", "azure", 0.5)]]


def test_replicas_know_of_each_other_after_both_have_flushed(clock: Clock, ledger: Ledger) -> None:
    one, other = (Spending(clock, ledger.read, ledger.write) for _ in range(2))
    one.add("support", "openai", 1.0)
    other.add("support", "openai", 2.0)
    one.flush()
    assert (one.today("support"), other.today("support")) == (1.0, 2.0)
    other.flush()
    one.flush()
    assert (one.today("support"), other.today("support")) == (3.0, 3.0)


def test_a_restarted_service_knows_what_was_spent(clock: Clock, ledger: Ledger, spending: Spending) -> None:
    spending.add("support", "openai", 1.0)
    spending.close()
    again = Spending(clock, ledger.read, ledger.write)
    again.flush()
    assert again.today("support") == 1.0


def test_what_cannot_be_written_is_kept_and_written_later(
    spending: Spending, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.away = True
    for _ in range(3):
        spending.add("support", "openai", 1.0)
        spending.flush()
    assert spending.today("support") == 3.0
    ledger.away = False
    spending.flush()
    assert spending.today("support") == 3.0
    assert ledger.batches == [[(TODAY, "support", "openai", 3.0)]]
    assert caplog.text.count("kept until it can") == 1
    assert caplog.text.count("can be written again") == 1


def test_an_error_that_nobody_expected_loses_nothing(clock: Clock, ledger: Ledger) -> None:
    failures = [ZeroDivisionError("a defect")]

    def write(spent: Sequence[Spent]) -> None:
        if failures:
            raise failures.pop()
        ledger.write(spent)

    spending = Spending(clock, ledger.read, write)
    spending.add("support", "openai", 1.0)
    with pytest.raises(ZeroDivisionError):
        spending.flush()
    assert spending.today("support") == 1.0
    spending.flush()
    assert ledger.rows[TODAY, "support", "openai"] == 1.0


def test_what_is_added_during_a_flush_counts_and_is_written_by_the_next(spending: Spending, ledger: Ledger) -> None:
    spending.add("support", "openai", 1.0)
    ledger.go_on.clear()
    flushing = threading.Thread(target=spending.flush)
    flushing.start()
    assert ledger.entered.wait(10)
    assert spending.today("support") == 1.0
    spending.add("support", "openai", 2.0)
    assert spending.today("support") == 3.0
    ledger.go_on.set()
    flushing.join(10)
    assert spending.today("support") == 3.0
    assert ledger.rows[TODAY, "support", "openai"] == 1.0
    spending.flush()
    assert ledger.rows[TODAY, "support", "openai"] == 3.0


async def test_a_flush_whose_caller_leaves_is_neither_lost_nor_written_twice(
    spending: Spending, ledger: Ledger
) -> None:
    spending.add("support", "openai", 1.0)
    ledger.go_on.clear()
    flushing = asyncio.create_task(asyncio.to_thread(spending.flush))
    assert await asyncio.to_thread(ledger.entered.wait, 10)
    flushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    spending.add("support", "openai", 2.0)
    closing = asyncio.create_task(asyncio.to_thread(spending.close))
    ledger.go_on.set()
    await closing
    assert ledger.rows[TODAY, "support", "openai"] == 3.0


def test_threads_lose_no_amount(spending: Spending, ledger: Ledger) -> None:
    def work() -> None:
        for _ in range(500):
            spending.add("support", "openai", 1.0)
        spending.flush()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    spending.flush()
    assert spending.today("support") == ledger.rows[TODAY, "support", "openai"] == 2000.0


def test_a_new_day_begins_at_midnight_utc_with_nothing_spent(spending: Spending, clock: Clock, ledger: Ledger) -> None:
    spending.add("support", "openai", 1.0)
    spending.flush()
    spending.add("support", "openai", 2.0)
    clock.now = datetime(2026, 11, 24, 23, 59, 59, tzinfo=UTC)
    assert spending.today("support") == 3.0
    clock.now += timedelta(seconds=1)
    assert spending.today("support") == 0.0
    spending.add("support", "openai", 4.0)
    assert spending.today("support") == 4.0
    spending.flush()
    assert spending.today("support") == 4.0
    assert ledger.rows == {(TODAY, "support", "openai"): 3.0, (TOMORROW, "support", "openai"): 4.0}


def test_a_day_that_cannot_be_read_yet_has_cost_what_was_written(clock: Clock, ledger: Ledger) -> None:
    def read(_: date) -> Mapping[tuple[str, str], float]:
        raise StoreUnavailable("the store is away")

    spending = Spending(clock, read, ledger.write)
    clock.now += timedelta(days=1)
    spending.add("support", "openai", 1.0)
    spending.flush()
    assert ledger.rows == {(TOMORROW, "support", "openai"): 1.0}
    assert spending.today("support") == 1.0


def test_the_day_is_utc_wherever_the_clock_stands(clock: Clock, ledger: Ledger) -> None:
    clock.now = datetime(2026, 11, 24, 23, 30, tzinfo=timezone(timedelta(hours=-5)))
    spending = Spending(clock, ledger.read, ledger.write)
    spending.add("support", "openai", 1.0)
    spending.flush()
    assert list(ledger.rows) == [(TOMORROW, "support", "openai")]


def test_a_ceiling_is_exceeded_when_it_is_reached(spending: Spending) -> None:
    spending.add("support", "openai", 1.0)
    assert spending.exceeded("support", 1.0)
    assert not spending.exceeded("support", 1.5)
    assert not spending.exceeded("support", None)
    assert not spending.exceeded("copy", 1.0)


def test_who_is_over_the_ceiling_is_told_when_the_day_ends(spending: Spending, clock: Clock) -> None:
    clock.now = datetime(2026, 11, 24, 22, 30, tzinfo=UTC)
    spending.add("support", "openai", 1.0)
    spending.check("support", 2.0)
    spending.check("support", None)
    with pytest.raises(CostCeilingReached, match="daily ceiling of 1; try again after midnight UTC") as refused:
        spending.check("support", 1.0)
    assert refused.value.retry_after_s == 5400.0


def test_closing_says_what_is_lost(spending: Spending, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    ledger.away = True
    spending.add("support", "openai", 1.25)
    spending.close()
    assert "never heard of 1.25" in caplog.text


@pytest.mark.parametrize("amount", [-1.0, float("nan"), float("inf")])
def test_no_answer_costs_less_than_nothing(spending: Spending, amount: float) -> None:
    with pytest.raises(AssertionError, match="cannot cost"):
        spending.add("support", "openai", amount)
