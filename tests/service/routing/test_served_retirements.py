"""A whole service and the days on which its models go away: told by a provider, and by the settings' table."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta

import httpx

from service.engines.scripted import ScriptedEngine
from tests.providers import Answer, Asked, ScriptedProvider, error_answer, json_answer
from tests.service.engines.remote.answers import chat, choice
from tests.service.routing.routed import FALLBACK, LOCAL, V2, apply, ask, outcomes, publish_remote, says
from tests.service.serving import Store, listening

DAY = datetime.now(UTC).date() + timedelta(days=40)
GONE = date(2020, 1, 1)


def play(asked: Asked) -> Answer:
    """A provider that takes one of its models away, and answers by all."""
    if asked.path == "/v1/models/ft:small:copy":
        return json_answer({"id": "ft:small:copy", "object": "model", "shutdown_date": DAY.isoformat()})
    return error_answer(404) if asked.method == "GET" else json_answer(chat(choice("remote answer")))


async def test_the_date_that_a_provider_tells_arrives_in_the_store_the_list_of_models_and_the_metrics(
    store: Store,
) -> None:
    apply(store, "copy", FALLBACK)
    name = 'softcue_model_shutdown_timestamp_seconds{backend="acme",task="copy",version="v2"}'
    async with ScriptedProvider(play) as provider:
        remote = {"acme": {"kind": "openai_compatible", "url": provider.url}}
        with listening(store, ScriptedEngine(), remote=remote) as url:
            async with httpx.AsyncClient(base_url=url, timeout=30) as client, asyncio.timeout(20):
                while name not in (scraped := (await client.get("/metrics")).text):  # noqa: ASYNC110 (it is asked for)
                    await asyncio.sleep(0.001)  # the threads that are waited for need the interpreter
                shown = (await client.get("/v1/models/copy@v2")).json()
    (value,) = (line.removeprefix(name) for line in scraped.splitlines() if line.startswith(name))
    assert datetime.fromtimestamp(float(value), UTC).date() == DAY
    assert shown["shutdown_date"] == DAY.isoformat()
    assert store.registry.version("copy", "v2").shutdown_date == DAY


async def test_past_a_date_of_the_settings_table_the_fallback_answers(store: Store) -> None:
    publish_remote(store, "query", "ft:old:query")
    for task, version in (("copy", V2), ("query", {"kind": "direct", "version": "v3"})):
        apply(store, task, {"kind": "fallback", "routes": [version, LOCAL]})
    async with ScriptedProvider(play) as provider:
        remote = {"acme": {"kind": "openai_compatible", "url": provider.url}}
        local = ScriptedEngine(says('{"table": "here"}'))
        with listening(store, local, remote=remote, retirements={"ft:old": GONE}) as url:
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                stays, goes = [(await ask(client, task)).json() for task in ("copy", "query")]
                refused = (await ask(client, "query", version="v3")).json()
            async with asyncio.timeout(20):
                while store.registry.version("query", "v3").shutdown_date != GONE:  # noqa: ASYNC110 (a thread writes)
                    await asyncio.sleep(0.001)  # the threads that are waited for need the interpreter
    assert (stays["text"], outcomes(stays)) == ("remote answer", [("acme", "answered")])
    assert (goes["text"], outcomes(goes)) == ('{"table": "here"}', [("acme", "failed"), ("local", "answered")])
    assert "2020-01-01" in goes["softcue"]["route"][0]["reason"]
    assert refused["error"]["code"] == "model_retired"
