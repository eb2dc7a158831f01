"""Tensors that the store can no longer give back whole, met by a catalog that follows it."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import delete, select, update

from prompt_store.access import ANONYMOUS
from prompt_store.errors import DamagedArtifact
from prompt_store.prompts.registry import NewVersion
from prompt_store.prompts.version import EnsemblePayload, PromptVersion, payload_tensors
from prompt_store.routing.routes import DirectRoute, TaskRoute
from prompt_store.tables import tensors, version_tensors
from service.engines.scripted import ScriptedEngine
from tests.conftest import random_prompt
from tests.service.following import following
from tests.service.serving import COPY, Store


def flip(store: Store, version: PromptVersion) -> None:
    """Flips a bit of a version's tensor, behind the store's back; the second time, back again."""
    (digest,) = payload_tensors(version.payload).values()
    here = tensors.c.digest == digest
    with store.registry.database.write() as connection:
        data = bytearray(connection.execute(select(tensors.c.data).where(here)).scalar_one())
        data[5] ^= 1
        connection.execute(update(tensors).where(here).values(data=bytes(data)))


async def test_a_damaged_version_is_refused_alone_and_tried_again(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.task(COPY)
    store.publish("copy", random_prompt(5, 4))
    damaged = store.publish("intents", random_prompt(2, 4))
    flip(store, damaged)
    async with following(store, ScriptedEngine()) as (catalog, refreshes):
        for name in ("intents", "intents@production", "intents@v2", f"intents@{damaged.digest}"):
            with pytest.raises(DamagedArtifact, match="is damaged on disk"):
                catalog.resolve(name)
        assert catalog.resolve("intents@v1").target.label == "intents@v1"
        assert catalog.resolve("copy").target.label == "copy@v1"
        assert (refreshes.failures, catalog.damage.versions, catalog.damage.fallen_back) == (1, 1, 0)
        store.publish("copy", random_prompt(6, 4))
        await refreshes.until(lambda: catalog.resolve("copy").target.label == "copy@v2")
        with pytest.raises(DamagedArtifact):
            catalog.resolve("intents")
        flip(store, damaged)
        store.publish("copy", random_prompt(7, 4))
        await refreshes.until(lambda: catalog.resolve("copy").target.label == "copy@v3")
        assert catalog.resolve("intents").target.label == "intents@v2"
        assert catalog.damage.versions == 0
    assert caplog.text.count("intents@v2 is refused") == 1
    assert caplog.text.count("intents@v2 can be read again") == 1


async def test_a_damaged_version_that_nobody_warmed_is_noticed_when_it_is_first_read(store: Store) -> None:
    damaged = store.publish("intents", random_prompt(2, 4), alias=None)
    flip(store, damaged)
    async with following(store, ScriptedEngine()) as (catalog, _):
        target = catalog.resolve("intents@v2").target
        assert target is not None
        assert target.version is not None
        (reference,) = catalog.references(catalog.task(target.version.task), target.version)
        with pytest.raises(DamagedArtifact, match="is damaged on disk"):
            await asyncio.to_thread(reference.load)
        with pytest.raises(DamagedArtifact, match="is damaged on disk"):
            catalog.resolve("intents@v2")


async def test_a_lost_tensor_is_damage_too(store: Store) -> None:
    with store.registry.database.write() as connection:
        connection.execute(delete(version_tensors))
    async with following(store, ScriptedEngine()) as (catalog, _):
        with pytest.raises(DamagedArtifact, match="is missing; restore the store from a backup"):
            catalog.resolve("intents")


async def test_an_alias_falls_back_to_its_newest_whole_target_where_that_is_wanted(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    second, third = (store.publish("intents", random_prompt(seed, 4)) for seed in (2, 3))
    for version in (second, third):
        flip(store, version)
    engine = ScriptedEngine()
    async with following(store, engine, fall_back=True) as (catalog, refreshes):
        for name in ("intents", "intents@production"):
            assert catalog.resolve(name).target.label == "intents@v1"
        assert engine.warmed == {random_prompt(1, 4).digest}
        assert (catalog.damage.versions, catalog.damage.fallen_back) == (2, 1)
        for name in ("intents@v3", f"intents@{third.digest[:12]}"):
            with pytest.raises(DamagedArtifact):
                catalog.resolve(name)
        flip(store, second)
        store.registry.apply_route("intents", TaskRoute(route=DirectRoute(version="production")), ANONYMOUS)
        await refreshes.until(lambda: catalog.resolve("intents").target.label == "intents@v2")
        flip(store, third)
        store.task(COPY)
        await refreshes.until(lambda: catalog.resolve("intents").target.label == "intents@v3")
        await refreshes.until(lambda: catalog.damage.fallen_back == 0)
        await refreshes.until(lambda: engine.warmed == {random_prompt(3, 4).digest})
    for number in (1, 2):
        said = f"intents@production is answered by v{number} because v3 is damaged"
        assert caplog.text.count(said) == 1


async def test_damage_that_is_noticed_between_refreshes_makes_an_alias_fall_back(store: Store) -> None:
    damaged = store.publish("intents", random_prompt(2, 4))
    async with following(store, ScriptedEngine(), fall_back=True) as (catalog, refreshes):
        assert catalog.resolve("intents").target.label == "intents@v2"
        flip(store, damaged)
        with pytest.raises(DamagedArtifact):
            await asyncio.to_thread(catalog.reference(damaged).load)
        await refreshes.until(lambda: catalog.damage.fallen_back == 1)
        assert catalog.resolve("intents").target.label == "intents@v1"


async def test_an_ensemble_with_a_damaged_member_is_refused(store: Store) -> None:
    members = [store.publish("intents", random_prompt(seed, 4), alias=None) for seed in (2, 3)]
    payload = EnsemblePayload(members=[m.digest for m in members], base_fingerprint=store.base.fingerprint)
    store.registry.publish(NewVersion("intents", payload), "production", "", ANONYMOUS)
    flip(store, members[1])
    async with following(store, ScriptedEngine()) as (catalog, _):
        with pytest.raises(DamagedArtifact):
            catalog.resolve("intents")
        assert catalog.resolve("intents@v2").target.label == "intents@v2"
