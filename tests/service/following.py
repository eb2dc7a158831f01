"""A catalog that follows a store, for tests of what it serves when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from service.catalog import Catalog
from service.engines.scripted import ScriptedEngine
from service.routing.backends import Backend, Backends
from tests.service.serving import Store


class Refreshes:
    """Waits for the catalog to have served a change."""

    def __init__(self) -> None:
        self.sequence = 0
        self.failures = 0

    def refreshed(self, sequence: int) -> None:
        self.sequence = sequence

    def failed(self) -> None:
        self.failures += 1

    async def until(self, condition: Callable[[], bool], within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110 (warming goes on after the news)
                await asyncio.sleep(0.001)  # the threads that are waited for need the interpreter


@asynccontextmanager
async def following(
    store: Store,
    engine: ScriptedEngine,
    registry: Registry | None = None,
    *,
    poll_s: float = 0.01,
    fall_back: bool = False,
    settled: bool = True,
) -> AsyncIterator[tuple[Catalog, Refreshes]]:
    registry = registry or Registry(Database.open(store.location))
    refreshes = Refreshes()
    catalog = Catalog(
        registry.database,
        registry,
        Backends([Backend("local", engine)]),
        base_name="demo-base",
        base_fingerprint=store.base.fingerprint,
        poll_s=poll_s,
        fall_back_when_damaged=fall_back,
        on_refresh=refreshes.refreshed,
        on_failure=refreshes.failed,
    )
    await engine.start()
    await catalog.load()
    task = asyncio.create_task(catalog.follow())
    try:
        async with asyncio.timeout(10):
            while catalog.settled is not settled:  # noqa: ASYNC110 (it is asked for)
                await asyncio.sleep(0.001)  # the threads that are waited for need the interpreter
        yield catalog, refreshes
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        catalog.close()
        registry.database.close()
