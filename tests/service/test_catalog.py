from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from datetime import date

import pytest
from sqlalchemy import update

from prompt_store.access import ANONYMOUS
from prompt_store.database import Database
from prompt_store.errors import (
    SchemaMismatch,
    StoreError,
    StoreUnavailable,
    UnknownAlias,
    UnknownVersion,
)
from prompt_store.prompts.registry import NewVersion, Registry, StoreSnapshot
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.version import EnsemblePayload, PromptVersion, RemoteModelPayload
from prompt_store.routing.calibrations import Calibration
from prompt_store.routing.routes import DirectRoute, TaskRoute, parse_task_route
from prompt_store.tables import route_revisions, versions
from service.catalog import Catalog
from service.engines.base import EngineStats, SoftPromptReference
from service.engines.base_model import BaseModel
from service.engines.errors import EngineUnavailable, GenerationFailed
from service.engines.scripted import ScriptedEngine
from service.routing.backends import Backend, Backends
from tests.conftest import random_prompt
from tests.postgresql import running_server
from tests.service.following import following
from tests.service.serving import COPY, INTENTS, Store, open_store, random_prefix


async def test_a_publish_elsewhere_is_warmed_and_then_served(store: Store) -> None:
    engine = ScriptedEngine()
    async with following(store, engine) as (catalog, refreshes):
        assert catalog.resolve("intents").target.label == "intents@v1"
        prompt = random_prompt(2, 4)
        store.publish("intents", prompt)
        await refreshes.until(lambda: catalog.resolve("intents").target.label == "intents@v2")
        assert engine.warmed == {prompt.digest}


async def test_a_request_in_flight_keeps_the_snapshot_it_started_with(store: Store) -> None:
    async with following(store, ScriptedEngine()) as (catalog, refreshes):
        before = catalog.snapshot
        target = catalog.resolve("intents").target
        assert target is not None
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
                served_while_warming.append(catalogs[0].resolve("intents").target.label)
            await super().warm(soft_prompt)

    catalogs: list[Catalog] = []
    async with following(store, Watching()) as (catalog, refreshes):
        catalogs.append(catalog)
        store.publish("intents", random_prompt(2, 4))
        await refreshes.until(lambda: catalog.resolve("intents").target.label == "intents@v2")
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
        assert catalog.resolve("intents").target.label == "intents@v1"


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
        assert (engine.refusals, catalog.resolve("intents").target.label) == (0, "intents@v2")


async def test_a_publish_does_not_wait_for_an_engine_that_is_away(store: Store) -> None:
    class Restarting(ScriptedEngine):
        """As the local engine: who wants something warmed while it restarts waits for it."""

        def __init__(self) -> None:
            super().__init__()
            self.back = asyncio.Event()
            self.back.set()

        async def warm(self, soft_prompt: SoftPromptReference) -> None:
            await self.back.wait()
            await super().warm(soft_prompt)

        def stats(self) -> EngineStats:
            return replace(super().stats(), ready=self.back.is_set())

    engine, prompt = Restarting(), random_prompt(2, 4)
    async with following(store, engine) as (catalog, refreshes):
        engine.back.clear()
        store.publish("intents", prompt)
        await refreshes.until(lambda: catalog.resolve("intents").target.label == "intents@v2")
        assert not catalog.settled
        engine.back.set()
        await refreshes.until(lambda: engine.warmed == {prompt.digest})
        await refreshes.until(lambda: catalog.settled)


async def test_a_publish_waits_for_one_prompt_of_the_backlog_at_most(store: Store) -> None:
    class Slow(ScriptedEngine):
        """What was there at the start is warmed one by one, as the test lets it."""

        def __init__(self) -> None:
            super().__init__()
            self.asked, self.go_on = 0, asyncio.Semaphore(0)

        async def warm(self, soft_prompt: SoftPromptReference) -> None:
            if soft_prompt.digest != new.digest:
                self.asked += 1
                await self.go_on.acquire()
            await super().warm(soft_prompt)

    for seed in range(2, 6):
        store.publish("intents", random_prompt(seed, 4), alias=f"alias-{seed}")
    engine, new = Slow(), random_prompt(9, 4)
    async with following(store, engine, settled=False) as (catalog, refreshes):
        await refreshes.until(lambda: engine.asked == 1)
        store.publish("intents", new)

        def served() -> bool:
            target = catalog.resolve("intents").target
            return target is not None and target.label == "intents@v6"

        # PostgreSQL's news may come a moment after the commit, when the next one was begun.
        for asked in (2, 3):
            engine.go_on.release()
            await refreshes.until(lambda asked=asked: served() or engine.asked == asked)
        await refreshes.until(served)
        assert (new.digest in engine.warmed, engine.asked <= 3, catalog.settled) == (True, True, False)


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
        assert catalog.resolve("intents").target.label == "intents@v1"
        flaky.broken = False
        await refreshes.until(lambda: catalog.resolve("intents").target.label == "intents@v2")
    assert caplog.text.count("the disk is away") == 1


async def test_moving_an_alias_back_brings_the_old_version_back(store: Store) -> None:
    engine = ScriptedEngine()
    async with following(store, engine) as (catalog, refreshes):
        store.publish("intents", random_prompt(2, 4))
        await refreshes.until(lambda: catalog.resolve("intents").target.label == "intents@v2")
        store.registry.move_alias("intents", "production", "v1", reason="back", principal=ANONYMOUS)
        await refreshes.until(lambda: catalog.resolve("intents").target.label == "intents@v1")
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
        database, Registry(database), Backends([]), base_name="b", base_fingerprint="f", poll_s=1,
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


async def test_a_database_that_tells_of_a_publish_need_not_be_asked(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.registry.database.storage.kind == "postgresql":
        # Longer than anybody waits here: only a notification can be in time.
        monkeypatch.setattr("prompt_store.postgresql.FALLBACK_POLL_S", 600.0)
        monkeypatch.setattr("service.catalog._LONGEST_WAIT_S", 600.0)
    async with following(store, ScriptedEngine()) as (catalog, refreshes):
        for number in (2, 3):
            await asyncio.to_thread(store.publish, "intents", random_prompt(number, 4))
            await refreshes.until(lambda label=f"intents@v{number}": catalog.resolve("intents").target.label == label)


async def test_closing_ends_the_thread_that_waits_for_the_store(store: Store) -> None:
    async with following(store, ScriptedEngine(), poll_s=1.0):
        pass
    for thread in threading.enumerate():
        if thread.name.startswith("softcue-catalog"):
            await asyncio.to_thread(thread.join, 5)
            assert not thread.is_alive()


async def test_a_database_that_restarts_is_caught_up_with_and_serves_meanwhile(
    base: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    with running_server(own=True) as server:
        assert server.cluster is not None
        store = open_store(server.create(), base)
        store.task(INTENTS)
        store.publish("intents", random_prompt(1, 4))
        async with following(store, ScriptedEngine()) as (catalog, refreshes):
            assert catalog.store_reachable
            await asyncio.to_thread(server.cluster.stop)
            await refreshes.until(lambda: refreshes.failures > 2)
            assert not catalog.store_reachable
            assert catalog.resolve("intents").target.label == "intents@v1"
            await asyncio.to_thread(server.cluster.start)
            await asyncio.to_thread(store.publish, "intents", random_prompt(2, 4))
            await refreshes.until(lambda: catalog.resolve("intents").target.label == "intents@v2")
            assert catalog.store_reachable
        store.registry.database.close()
    assert caplog.text.count("serving what is known") == 1
    assert caplog.text.count("the store can be read again") == 1


async def test_what_another_release_wrote_refuses_itself_alone(store: Store) -> None:
    store.task(COPY)
    store.publish("copy", random_prompt(5, 4))
    store.publish("intents", random_prompt(2, 4), alias="candidate")
    store.registry.apply_route("copy", TaskRoute(route=DirectRoute()), ANONYMOUS)
    with store.registry.database.write() as connection:
        connection.execute(update(versions).where(versions.c.number == 2).values(payload='{"kind": "hologram"}'))
        connection.execute(update(route_revisions).values(document='{"kind": "lottery"}'))
    async with following(store, ScriptedEngine()) as (catalog, _):
        assert catalog.resolve("intents").target.label == "intents@v1"
        for name in ("intents@candidate", "intents@v2"):
            with pytest.raises(SchemaMismatch, match=r"v2 of task 'intents'.*upgrade Softcue"):
                catalog.resolve(name)
        with pytest.raises(SchemaMismatch, match="the route of task 'copy'"):
            catalog.resolve("copy")
        assert catalog.resolve("copy@production").target.label == "copy@v1"


async def test_a_route_of_several_leaves_is_left_to_whoever_follows_it(store: Store) -> None:
    leaves = [{"kind": "direct"}, {"kind": "direct", "version": "v1"}]
    backends = [Backend("local", ScriptedEngine()).describe()]
    route = parse_task_route({"route": {"kind": "fallback", "routes": leaves}, "deadline_s": 3})
    store.registry.apply_route("intents", route, ANONYMOUS, backends=backends)
    async with following(store, ScriptedEngine()) as (catalog, _):
        plan = catalog.resolve("intents")
        assert (plan.target, plan.route, plan.deadline_s) == (None, route.route, 3)
        named = catalog.resolve("intents@v1")
        assert (named.target.label, named.deadline_s) == ("intents@v1", 3)


async def test_a_prefix_is_warmed_and_referred_to_like_a_soft_prompt(store: Store) -> None:
    prefix = random_prefix(3, length=6)
    version = store.publish("intents", prefix)
    engine = ScriptedEngine()
    async with following(store, engine) as (catalog, _):
        target = catalog.resolve("intents").target
        assert target is not None
        assert (target.label, engine.warmed) == ("intents@v2", {prefix.digest})
        (reference,) = catalog.references(catalog.task(version.task), version)
        assert (reference.digest, reference.length, reference.load()) == (prefix.digest, 6, prefix)


async def test_what_a_route_names_is_warmed_though_no_alias_points_at_it(store: Store) -> None:
    prompt = random_prompt(2, 4)
    store.publish("intents", prompt, alias=None)
    engine = ScriptedEngine()
    backend = Backend("local", engine).describe()
    route = parse_task_route({"kind": "fallback", "routes": [{"kind": "direct"}, {"kind": "direct", "version": "v2"}]})
    store.registry.apply_route("intents", route, ANONYMOUS, backends=[backend])
    async with following(store, engine) as (_, refreshes):
        assert engine.warmed == {random_prompt(1, 4).digest, prompt.digest}
        store.registry.apply_route("intents", parse_task_route({"kind": "direct"}), ANONYMOUS, backends=[backend])
        await refreshes.until(lambda: engine.warmed == {random_prompt(1, 4).digest})


async def test_an_ensemble_in_flight_keeps_members_that_are_deleted_meanwhile(store: Store) -> None:
    members = tuple(store.publish("intents", random_prompt(seed, 4), alias=None).digest for seed in (2, 3))
    payload = EnsemblePayload(members=members, base_fingerprint=store.base.fingerprint)
    store.registry.publish(NewVersion("intents", payload), None, "", ANONYMOUS)
    async with following(store, ScriptedEngine()) as (catalog, refreshes):
        plan = catalog.resolve("intents@v4")
        for label in ("v4", "v3", "v2"):
            store.registry.delete_version("intents", label, reason="old", principal=ANONYMOUS)
        await refreshes.until(lambda: len(catalog.task("intents").versions) == 1)
        assert plan.task is not None
        assert plan.target is not None
        assert plan.target.version is not None
        assert len(catalog.references(plan.task, plan.target.version)) == 2


async def test_what_is_learnt_of_a_version_later_reaches_whoever_serves_it(store: Store) -> None:
    registry, model = store.registry, RemoteModelPayload(provider="acme", model="large")
    digest = registry.publish(NewVersion("intents", model), None, "", ANONYMOUS).version.digest
    async with following(store, ScriptedEngine()) as (catalog, refreshes):

        def shutdown() -> date | None:
            version = catalog.snapshot.tasks["intents"].versions[digest]
            return version.shutdown_date if isinstance(version, PromptVersion) else None

        for day in (date(2031, 1, 2), date(2031, 2, 3), None):
            registry.note_shutdown("intents", digest, day, ANONYMOUS)
            await refreshes.until(lambda day=day: shutdown() == day)  # type: ignore[misc]
        for threshold in (-0.5, -0.25):
            measured = {"measure": "mean_logprob", "threshold": threshold, "target": 0.9}
            found = Calibration(**measured, version=digest, accuracy=0.9, accepted_share=0.5, rows=20)  # type: ignore[arg-type]
            registry.calibrate(found, ANONYMOUS)
            await refreshes.until(
                lambda found=found: catalog.snapshot.tasks["intents"].calibrations == {(digest, "mean_logprob"): found}  # type: ignore[misc]
            )
