"""What each task has cost today, over all replicas of the service, and whether that is too much.

Days are UTC. A request only adds to a sum in memory and looks at one: the store is written and read by `flush`, which a
thread runs every few seconds. Two things follow. A process that dies loses what it added since its last flush, so the
day's sum is too low by so much. And what other replicas spend is known with the same delay, so a ceiling can be passed
by what all of them spend within it, and by the requests that were running when it was reached.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta

from prompt_store.errors import StoreError
from service.routing.errors import CostCeilingReached

log = logging.getLogger(__name__)

Spent = tuple[date, str, str, float]
"""Day, task, backend, amount."""


class Spending:
    """The day's sums. Any thread may call it; `now` gives the time in UTC.

    `read` gives what a day's answers cost by task and backend, over all replicas; `write` adds to that, all of it or
    nothing. Both may block and raise StoreError. Flush once before the first request: a restarted service then knows
    what was spent before.
    """

    def __init__(
        self,
        now: Callable[[], datetime],
        read: Callable[[date], Mapping[tuple[str, str], float]],
        write: Callable[[Sequence[Spent]], object],
    ) -> None:
        self._now = now
        self._read = read
        self._write = write
        self._sums = threading.Lock()  # held for moments: requests wait for it
        self._flushing = threading.Lock()
        self._day = now().astimezone(UTC).date()
        self._stored: dict[str, float] = {}  # of that day, by task
        self._writing = _Amounts()
        self._unwritten = _Amounts()
        self._failing = False

    def add(self, task: str, backend: str, amount: float) -> None:
        """Count what an answer cost, on the day that it is added."""
        assert math.isfinite(amount), f"an answer cannot cost {amount}"
        assert amount >= 0.0, f"an answer cannot cost {amount}"
        if amount:
            day = self._today()
            with self._sums:
                self._unwritten.add(day, task, backend, amount)

    def today(self, task: str) -> float:
        """What the task has cost today: what the store last said of all replicas, and what it has not heard of yet."""
        day = self._today()
        with self._sums:
            stored = self._stored.get(task, 0.0) if day == self._day else 0.0
            return stored + self._writing.of(day, task) + self._unwritten.of(day, task)

    def exceeded(self, task: str, ceiling: float | None) -> bool:
        """Whether the task has cost as much today as it may; never without a ceiling."""
        return ceiling is not None and self.today(task) >= ceiling

    def check(self, task: str, ceiling: float | None) -> None:
        """Raises CostCeilingReached where `exceeded`."""
        if ceiling is not None and self.exceeded(task, ceiling):
            raise CostCeilingReached(task, ceiling, _until_midnight_s(self._now()))

    def flush(self) -> None:
        """Write what was added, and read what all replicas spent today. Blocks.

        What cannot be written is kept, and written by a later flush with what came since. Where the store took it and
        could not say so, it is counted twice: the ceiling is then reached too early, never too late.
        """
        with self._flushing:
            try:
                self._write_added()
                self._read_today()
            except StoreError as error:
                if not self._failing:
                    log.warning("what answers cost cannot be written or read, it is kept until it can: %s", error)
                self._failing = True
            else:
                if self._failing:
                    log.warning("what answers cost can be written again")
                self._failing = False

    def close(self) -> None:
        """Write what was added since the last flush. Blocks; says in the log what could not be written and is lost."""
        self.flush()
        with self._sums:
            lost = list(self._unwritten)
        if lost:
            total = math.fsum(amount for *_, amount in lost)
            log.error("the store never heard of %.6g that %d sums of task and backend cost", total, len(lost))

    def _write_added(self) -> None:
        with self._sums:
            self._writing, self._unwritten = self._unwritten, _Amounts()
        written = False
        try:
            if amounts := list(self._writing):
                self._write(amounts)
            written = True
        finally:
            today = self._today()
            with self._sums:
                if today != self._day:
                    self._day, self._stored = today, {}
                for day, task, backend, amount in self._writing:
                    if not written:
                        self._unwritten.add(day, task, backend, amount)
                    elif day == today:
                        self._stored[task] = self._stored.get(task, 0.0) + amount
                self._writing = _Amounts()

    def _read_today(self) -> None:
        day = self._today()
        sums: defaultdict[str, float] = defaultdict(float)
        for (task, _), amount in self._read(day).items():
            sums[task] += amount
        with self._sums:
            self._day, self._stored = day, sums

    def _today(self) -> date:
        return self._now().astimezone(UTC).date()


class _Amounts:
    """Sums by day, task and backend."""

    def __init__(self) -> None:
        self._by_day: dict[date, dict[str, dict[str, float]]] = {}

    def add(self, day: date, task: str, backend: str, amount: float) -> None:
        backends = self._by_day.setdefault(day, {}).setdefault(task, {})
        backends[backend] = backends.get(backend, 0.0) + amount

    def of(self, day: date, task: str) -> float:
        return sum(self._by_day.get(day, {}).get(task, {}).values())

    def __iter__(self) -> Iterator[Spent]:
        for day, tasks in self._by_day.items():
            for task, backends in tasks.items():
                for backend, amount in backends.items():
                    yield day, task, backend, amount


def _until_midnight_s(now: datetime) -> float:
    here = now.astimezone(UTC)
    midnight = datetime.combine(here.date() + timedelta(days=1), datetime.min.time(), UTC)
    return (midnight - here).total_seconds()
