"""How many requests run at once, and how many may wait for their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.engines.errors import DeadlineExceeded, QueueFull

_RETRY_AFTER_S = 1.0


class ConcurrencyLimit:
    """`concurrency` at once, in the order in which they came; `max_waiting` more wait, no longer than their deadline.

    The order, and that a waiter who is cancelled leaves no hole, are asyncio.Semaphore's own.
    """

    def __init__(self, concurrency: int, max_waiting: int, clock: Callable[[], float]) -> None:
        self._free = asyncio.Semaphore(concurrency)
        self._max_waiting = max_waiting
        self._clock = clock
        self.running = 0
        self.waiting = 0

    async def enter(self, ends_at: float | None) -> None:
        """Wait for a turn; `leave` gives it back. `ends_at` is on the clock.

        Raises QueueFull, and DeadlineExceeded for a turn that did not come in time.
        """
        if self._free.locked():
            await self._wait(ends_at)
        else:
            await self._free.acquire()
        self.running += 1

    def leave(self) -> None:
        self.running -= 1
        self._free.release()

    async def _wait(self, ends_at: float | None) -> None:
        if self.waiting >= self._max_waiting:
            raise QueueFull(self.waiting, _RETRY_AFTER_S)
        self.waiting += 1
        try:
            async with asyncio.timeout(None if ends_at is None else max(ends_at - self._clock(), 0.0)):
                await self._free.acquire()
        except TimeoutError:
            raise DeadlineExceeded(
                "the request's deadline passed while it waited for its turn at the provider; allow it more time, or "
                "the backend more concurrency"
            ) from None
        finally:
            self.waiting -= 1
