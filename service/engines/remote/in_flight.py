"""Which requests an engine is answering, so that it can end without breaking them off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from service.engines.errors import EngineUnavailable


class InFlight:
    """Open from the start; closed it takes nothing new, until it is opened again."""

    def __init__(self) -> None:
        self._count = 0
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self) -> None:
        self._closing = False

    async def close(self, grace_s: float) -> None:
        """Take nothing new, and wait for what is in flight, at most `grace_s` seconds."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """One request. Raises EngineUnavailable once it is closed."""
        if self._closing:
            raise EngineUnavailable("the service is stopping; send the request again to another replica")
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()
