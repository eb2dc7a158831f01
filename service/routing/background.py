"""What is done after an answer and is in nobody's way: bounded, begun at once or left out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Background:
    """Coroutines that nobody waits for, `at_once` of them at most."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._closed = False
        self._running: set[asyncio.Task[None]] = set()

    def has_room(self) -> bool:
        """Whether one more would be begun."""
        return not self._closed and len(self._running) < self._at_once

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin it, for which there must be room. It must end its errors itself."""
        assert self.has_room()
        running = asyncio.create_task(work)
        self._running.add(running)
        running.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Cancel those that are under way, wait until they have ended, and begin no others."""
        self._closed = True
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
