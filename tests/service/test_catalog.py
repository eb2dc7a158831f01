from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from prompt_store.access import ANONYMOUS
from prompt_store.database import Database
from prompt_store.errors import StoreError, StoreUnavailable, UnknownAlias, UnknownVersion
from prompt_store.prompts.registry import Registry, StoreSnapshot
from prompt_store.prompts.soft_prompt import SoftPrompt
from service.catalog import Catalog
from service.engines.base import SoftPromptReference
from service.engines.base_model import BaseModel
from service.engines.errors import EngineUnavailable, GenerationFailed
from service.engines.scripted import ScriptedEngine
from tests.conftest import random_prompt
from tests.service.serving import INTENTS, Store, open_store


@pytest.fixture
def store(location: str, base: BaseModel) -> Iterator[Store]:
    """On SQLite and on PostgreSQL."""
    store = open_store(location, base)
    store.task(INTENTS)
    store.publish("intents", random_prompt(1, 4))
    yield store
    store.registry.database.close()


class Refreshes:
    """Waits for the catalog to have served a change."""

    def __init__(self) -> None:
        self.sequence = 0
        self.failures = 0
        self._news = asyncio.Event()

    def refreshed(self, sequence: int) -> None:
        self.sequence = sequence
        self._news.set()

    def failed(self) -> None:
        self.failures += 1
        self._news.set()

    async def until(self, condition: Callable[[], bool], within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while not condition():
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def following(
    store: Store,
    engine: ScriptedEngine,
    registry: Registry | None = None,
    *,
    poll_s: float = 0.01,
    fall_back: bool = False,
) -> AsyncIterator[tuple[Catalog, Refreshes]]:
    registry = registry or Registry(Database.open(store.location))
    refreshes = Refreshes()
    catalog = Catalog(
        registry.database,
        registry,
        engine,
        base_name="demo-base",
        base_fingerprint=store.base.fingerprint,
        poll_s=poll_s,
        fall_back_when_damaged=fall_back,
        on_refresh=refreshes.refreshed,
        on_failure=refreshes.failed,
    )
    await catalog.load()
    task = asyncio.create_task(catalog.follow())
    try:
        yield catalog, refreshes
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        catalog.close()
        registry.database.close()


async def test_a_publish_elsewhere_is_warmed_and_then_served(store: Store) -> None:
    engine = ScriptedEngine()
    async with following(store, engine) as (catalog, refreshes):
        assert catalog.resolve("intents").label == "intents@v1"
        prompt = random_prompt(2, 4)
        store.publish("intents", prompt)
        await refreshes.until(lambda: catalog.resolve("intents").label == "intents@v2")
        assert engine.warmed == {prompt.digest}


async def test_a_request_in_flight_keeps_the_snapshot_it_started_with(store: Store) -> None:
    async with following(store, ScriptedEngine()) as (catalog, refreshes):
        before = catalog.snapshot
        target = catalog.resolve("intents")
        store.publish("intents", random_prompt(2, 4))
        await refreshes.until(lambda: catalog.snapshot is not before)
        assert target.label == "intents@v1"
        assert target.version is not None
        assert catalog.reference(target.version).load() == random_prompt(1, 4)


async def test_the_new_version_is_warm_before_any_request_can_meet_it(store: Store) -> None:
    served_while_warming: list[str] = []

    class Watching(ScriptedEngine):
        async def warm(self, soft_prompt: SoftPromptReference) -> None:
            if catalogs:
                served_while_warming.append(catalogs[0].resolve("intents").label)
            await super().warm(soft_prompt)

    catalogs: list[Catalog] = []
    async with following(store, Watching()) as (catalog, refreshes):
        catalogs.append(catalog)
        store.publish("intents", random_prompt(2, 4))
        await refreshes.until(lambda: catalog.resolve("intents").label == "intents@v2")
    assert served_while_warming == ["intents@v1"]


async def test_a_version_that_cannot_be_warmed_is_counted_and_others_are_served(store: Store) -> None:
    bad = random_prompt(9, 4)

    class Choosy(ScriptedEngine):
        async def warm(self, soft_prompt: SoftPromptReference) -> None:
            if soft_prompt.digest == bad.digest:
                raise GenerationFailed("no")
            await super().warm(soft_prompt)

    async with following(store, Choosy()) as (catalog, refreshes):
        store.publish("intents", bad, alias="candidate")
        await refreshes.until(lambda: "candidate" in catalog.snapshot.tasks["intents"].aliases)
        assert refreshes.failures == 1
        assert catalog.resolve("intents").label == "intents@v1"


async def test_what_an_absent_engine_could_not_warm_is_warmed_when_it_is_back(store: Store) -> None:
    class Away(ScriptedEngine):
        refusals = 2

        async def warm(self, soft_prompt: SoftPromptReference) -> None:
            if catalogs and self.refusals:
                self.refusals -= 1
                raise EngineUnavailable("restarting")
            await super().warm(soft_prompt)

    catalogs: list[Catalog] = []
    engine, prompt = Away(), random_prompt(2, 4)
    async with following(store, engine) as (catalog, refreshes):
        catalogs.append(catalog)
        store.publish("intents", prompt)
        await refreshes.until(lambda: engine.warmed == {prompt.digest})
        assert (engine.refusals, catalog.resolve("intents").label) == (0, "intents@v2")


async def test_a_store_that_cannot_be_read_leaves_the_last_snapshot_and_is_tried_again(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    class Flaky(Registry):
        broken = False

        def snapshot(self, previous: StoreSnapshot | None = None) -> StoreSnapshot:
            if self.broken:
                raise StoreUnavailable("the disk is away")
            return super().snapshot(previous)

    flaky = Flaky(Database.open(store.location))
    async with following(store, ScriptedEngine(), flaky) as (catalog, refreshes):
        flaky.broken = True
        store.publish("intents", random_prompt(2, 4))
        await refreshes.until(lambda: refreshes.failures > 0)
        assert catalog.resolve("intents").label == "intents@v1"
        flaky.broken = False
        await refreshes.until(lambda: catalog.resolve("intents").label == "intents@v2")
    assert caplog.text.count("the disk is away") == 1


async def test_moving_an_alias_back_brings_the_old_version_back(store: Store) -> None:
    engine = ScriptedEngine()
    async with following(store, engine) as (catalog, refreshes):
        store.publish("intents", random_prompt(2, 4))
        await refreshes.until(lambda: catalog.resolve("intents").label == "intents@v2")
        store.registry.move_alias("intents", "production", "v1", reason="back", principal=ANONYMOUS)
        await refreshes.until(lambda: catalog.resolve("intents").label == "intents@v1")
        await refreshes.until(lambda: engine.warmed == {random_prompt(1, 4).digest})


async def test_names_that_are_not_there_name_the_nearest(store: Store) -> None:
    async with following(store, ScriptedEngine()) as (catalog, _):
        with pytest.raises(UnknownVersion, match="did you mean 'v1'"):
            catalog.resolve("intents@v2")
        with pytest.raises(UnknownAlias, match="did you mean 'production'"):
            catalog.resolve("intents@productoin")
        with pytest.raises(UnknownVersion, match="no version 'abcdef0123'"):
            catalog.resolve("intents@abcdef0123")


def test_before_the_first_load_requests_are_told_to_come_back(store: Store) -> None:
    database = Database.open(store.location)
    catalog = Catalog(
        database, Registry(database), ScriptedEngine(), base_name="b", base_fingerprint="f", poll_s=1,
        on_refresh=lambda _: None, on_failure=lambda: None,
    )  # fmt: skip
    with pytest.raises(EngineUnavailable, match="starting"):
        catalog.resolve("intents")
    catalog.close()
    database.close()


def test_a_soft_prompt_that_does_not_fit_is_refused_at_publish_and_nothing_is_stored(store: Store) -> None:
    def count() -> int:
        return len(store.registry.versions("intents"))

    nan = SoftPrompt("F32", (1, 192), b"\x00\x00\xc0\x7f" * 192)
    for wrong, said in (
        (random_prompt(1, 4, 64), "H=64 but base 'demo-base' has H=192"),
        (nan, "NaN or infinite"),
        (SoftPrompt("F32", (4, 192), b"\x00" * 100), "bytes"),
        (random_prompt(1, 1024), "1024"),
    ):
        with pytest.raises(StoreError, match=said):
            store.publish("intents", wrong)
        assert count() == 1
