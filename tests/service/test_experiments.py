"""Experiments on live traffic: who sees which arm, what is written down of it, and when."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import httpx
import pytest
from litestar.testing import AsyncTestClient
from sqlalchemy import Table, select

from prompt_store.access import ANONYMOUS
from prompt_store.experiments.experiment import parse_experiment
from prompt_store.tables import answers, captures, exposures
from service.app import create_app
from service.engines.base import GenerationRequest
from service.engines.scripted import ScriptedEngine
from service.generation_ids import unit_hash, verify
from service.routing.backends import Backend
from service.settings import Settings, SettingsError, load_settings
from tests.conftest import random_prompt
from tests.service.routing.routed import LOST, Provider, fails, publish_remote, says, serving
from tests.service.serving import COPY, QUERY, Store, client_of, listening

KEY = "for testers alone"
ARMS = [{"name": "control", "weight": 0.5}, {"name": "candidate", "weight": 0.5, "version": "v2"}]


@pytest.fixture
def store(store: Store) -> Store:
    store.task({**COPY, "metrics": [{"name": "helpful", "direction": "maximise", "type": "boolean"}]})
    for seed, alias in ((1, "production"), (2, None)):
        store.publish("copy", random_prompt(seed, 4), alias)
    return store


def start(store: Store, **changes: Any) -> None:
    known = {"name": "tone", "task": "copy", "control": "control", "metric": "helpful", "arms": ARMS}
    described = [Backend("local", ScriptedEngine()), Backend("acme", Provider(), "openai_compatible", "acme")]
    backends = [backend.describe() for backend in described]
    store.registry.start_experiment(parse_experiment(known | changes), ANONYMOUS, backends=backends)


async def ask(client: AsyncTestClient[Any] | httpx.AsyncClient, unit: str = "", **more: Any) -> Any:
    body: dict[str, Any] = {"inputs": {"product": "mug", "colour": "red"}, **({"unit": unit} if unit else {}), **more}
    headers = body.pop("headers", {})
    return await client.post("/v1/tasks/copy/generate", json=body, headers=headers)


async def arms_of(client: AsyncTestClient[Any], units: list[str]) -> dict[str, str]:
    return {unit: (await ask(client, unit)).json()["softcue"]["arm"] for unit in units}


def rows(store: Store, table: Table) -> list[Mapping[str, Any]]:
    """What the store has once the service has stopped."""
    with store.registry.database.read() as connection:
        return list(connection.execute(select(table).order_by(table.c.at_ms, table.c.request)).mappings())


async def test_units_keep_their_arm_across_replicas_restarts_and_weights_and_all_is_written_down(store: Store) -> None:
    start(store)
    units = [f"user {number}" for number in range(40)]
    async with client_of(store, ScriptedEngine()) as one:
        first = await arms_of(one, units)
    async with client_of(store, ScriptedEngine()) as one, client_of(store, ScriptedEngine()) as other:
        assert await arms_of(one, units) == await arms_of(other, units) == first
    store.registry.reweight_experiment("tone", {"control": 0.3, "candidate": 0.7}, ANONYMOUS)
    async with client_of(store, ScriptedEngine()) as one:
        later = await arms_of(one, units)
    assert set(first.values()) == {"control", "candidate"}
    assert all(later[unit] == "candidate" for unit in units if first[unit] == "candidate")
    assert later != first
    shown = rows(store, exposures)
    key = store.registry.database.signing_key()
    assert len(shown) == len(rows(store, answers)) == 4 * len(units)
    for row in shown[: 3 * len(units)]:
        assert (row["allocation"], row["probability"], row["forced"]) == (1, 0.5, False)
    assert {(row["unit_hash"], row["arm"]) for row in shown[3 * len(units) :]} == {
        (unit_hash(unit, key), arm) for unit, arm in later.items()
    }
    assert {(row["allocation"], row["arm"], row["probability"]) for row in shown[3 * len(units) :]} == {
        (2, "control", 0.3),
        (2, "candidate", 0.7),
    }
    sums = store.registry.experiment_sums("tone", "copy", ["latency_ms"], missing="ignore", started_ms=0)
    assert sums.crossed == sum(first[unit] != later[unit] for unit in units)


async def test_an_exposure_is_on_disk_before_any_engine_is_asked(store: Store) -> None:
    start(store)
    seen: list[int] = []

    def script(_: GenerationRequest) -> list[Any]:
        folder = store.registry.database.storage.journal
        seen.append(sum(b"exposure" in file.read_bytes() for file in folder.rglob("*.segment")))
        return ["there"]

    async with client_of(store, ScriptedEngine(script)) as client:
        assert (await ask(client, "user 7")).json()["text"] == "there"
    assert seen
    assert seen[0] >= 1


async def test_what_a_fallback_answered_counts_for_the_intended_arm_and_is_seen_as_served(store: Store) -> None:
    publish_remote(store, "copy")
    candidate = {"kind": "fallback", "routes": [{"kind": "direct", "version": "v3"}, {"kind": "direct"}]}
    start(store, arms=[ARMS[0], {"name": "candidate", "weight": 0.5, "route": candidate}])
    async with serving(store, ScriptedEngine(says("here")), Provider(fails(LOST))) as client:
        units = [f"user {number}" for number in range(20)]
        arms = await arms_of(client, units)
    served = {(row["arm"], row["backend"], row["outcome"]) for row in rows(store, answers)}
    assert served == {("control", "local", "stop"), ("candidate", "local", "stop")}
    versions = {row["arm"]: row["version"] for row in rows(store, exposures)}
    v1, v3 = (store.registry.version("copy", label).digest for label in ("v1", "v3"))
    assert versions == {"control": v1, "candidate": v3}
    assert {row["version"] for row in rows(store, answers)} == {v1}
    sums = store.registry.experiment_sums("tone", "copy", ["latency_ms"], missing="ignore", started_ms=0)
    counts = Counter(dict.fromkeys(arms.values(), 0))
    for each in sums.metrics["latency_ms"]:
        counts[each.arm] += each.units
    assert counts == Counter(arms.values())


async def test_of_each_request_that_was_exposed_it_is_known_how_it_ended_whenever_its_caller_left(store: Store) -> None:
    start(store)
    begun = itertools.cycle([[], ["half an"]])
    slow = ScriptedEngine(lambda _: [*next(begun), asyncio.Event()])
    with listening(store, slow) as url:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:

            async def leave(number: int) -> None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(number / 1000):  # from before it was taken to after its first delta
                        await ask(client, f"user {number}", stream=number % 2 == 0)

            await asyncio.gather(*map(leave, range(60)))
            last = asyncio.create_task(ask(client, "the last"))
            async with asyncio.timeout(10):
                while not slow.running:  # noqa: ASYNC110 (another thread asks it)
                    await asyncio.sleep(0.001)
            last.cancel()
            await asyncio.gather(last, return_exceptions=True)
    shown, ended = ({row["request"] for row in rows(store, table)} for table in (exposures, answers))
    assert shown == ended
    assert shown
    assert {row["outcome"] for row in rows(store, answers)} == {"cancelled"}


async def test_held_out_and_untargeted_requests_get_the_control(store: Store) -> None:
    start(store, holdout=0.5, targeting={"country": ("de",)})
    async with client_of(store, ScriptedEngine()) as client:
        outside = (await ask(client, "user 7")).json()
        inside = [
            (await ask(client, f"user {number}", attributes={"country": "de"})).json()["softcue"]["arm"]
            for number in range(30)
        ]
    assert "arm" not in outside["softcue"]
    assert outside["version"] == "copy@v1"
    assert set(inside) == {"holdout", "control", "candidate"}
    assert sorted(row["arm"] for row in rows(store, exposures)) == sorted(inside)
    assert {row["probability"] for row in rows(store, exposures)} == {0.5}


async def test_the_unit_is_the_bodys_then_openais_then_the_headers(store: Store) -> None:
    start(store)
    key = store.registry.database.signing_key()
    chat: dict[str, Any] = {"model": "copy", "messages": [{"role": "user", "content": "hi"}]}
    sent: list[tuple[dict[str, Any], str]] = [
        ({"unit": "a", "metadata": {"unit": "b"}, "user": "c"}, "a"),
        ({"metadata": {"unit": "b"}, "safety_identifier": "s", "user": "c"}, "b"),
        ({"safety_identifier": "s", "user": "c"}, "s"),
        ({"user": "c"}, "c"),
        ({}, "h"),
    ]
    async with client_of(store, ScriptedEngine()) as client:
        for body, unit in sent:
            answer = await client.post("/v1/chat/completions", json=chat | body, headers={"x-softcue-unit": "h"})
            assert verify(answer.json()["id"], key).unit_hash == unit_hash(unit, key)
        alone = verify((await client.post("/v1/chat/completions", json=chat)).json()["id"], key)
    assert alone.unit_hash == unit_hash(alone.request, key)
    assert alone.experiment == "tone"


def with_key(store: Store, **captures: Any) -> Settings:
    settings = store.settings()
    return settings.model_copy(
        update={
            "experiments": load_settings(None, {}, {"experiments": {"force_key_env": "SOFTCUE_TESTERS"}}).experiments,
            "captures": load_settings(None, {}, {"captures": captures}).captures,
        }
    )


def opened(store: Store, **captures: Any) -> AbstractAsyncContextManager[AsyncTestClient[Any]]:
    app = create_app(with_key(store, **captures), engine=ScriptedEngine())
    return AsyncTestClient(app, raise_server_exceptions=False)


async def ready(client: AsyncTestClient[Any]) -> None:
    async with asyncio.timeout(10):
        while not (await client.get("/health/ready")).json()["warm"]:  # noqa: ASYNC110 (it is asked for)
            await asyncio.sleep(0.001)


async def test_an_arm_is_given_to_who_asks_with_the_key_of_testers_and_counts_for_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTCUE_TESTERS", KEY)
    start(store)
    bearer = {"authorization": f"Bearer {KEY}"}
    async with opened(store) as client:
        await ready(client)
        for arm in ("control", "candidate"):
            given = (await ask(client, "user 7", headers={**bearer, "x-softcue-arm": arm})).json()
            assert given["softcue"]["arm"] == arm
            assert verify(given["id"], store.registry.database.signing_key()).experiment == ""
        unknown = await ask(client, headers={**bearer, "x-softcue-arm": "candidat"})
        assert unknown.status_code == 400
        assert "it has candidate, control" in unknown.json()["error"]["message"]
        for headers in ({}, {"authorization": "Bearer wrong"}):
            refused = await ask(client, headers={**headers, "x-softcue-arm": "candidate"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert [row["forced"] for row in rows(store, exposures)] == [True, True]
    assert rows(store, answers) == []
    sums = store.registry.experiment_sums("tone", "copy", ["latency_ms"], missing="ignore", started_ms=0)
    assert (sums.forced, sums.exposures, list(sums.metrics["latency_ms"])) == (2, 0, [])


async def test_nothing_is_captured_unless_a_task_is_opted_in_and_then_as_its_hook_leaves_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTCUE_TESTERS", KEY)
    async with client_of(store, ScriptedEngine(says("a red mug"))) as client:
        await ask(client, "user 7")
    assert rows(store, captures) == rows(store, answers) == []
    async with opened(store, copy={"redact": "string:capwords", "retention_days": 2.0}) as client:
        await ready(client)
        told = (await ask(client, "user 7")).json()
        await client.post("/v1/tasks/intents/classify", json={"inputs": {"message": "hi"}})
        chat = {"model": "copy", "messages": [{"role": "user", "content": "tell me more"}]}
        await client.post("/v1/chat/completions", json=chat)
    task, conversation = rows(store, captures)
    assert task["inputs"] == '{"product": "Mug", "colour": "Red"}'
    assert task["answer"] == " ".join(word.capitalize() for word in told["text"].split())
    assert task["expires_ms"] - task["at_ms"] == 2 * 24 * 3600 * 1000
    assert conversation["inputs"] is None
    assert "Tell Me More" in conversation["prompt"] or "tell Me More" in conversation["prompt"]
    assert [row["experiment"] for row in rows(store, answers)] == ["", ""]


async def test_a_chat_of_one_turn_is_captured_as_the_only_input_of_its_task(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTCUE_TESTERS", KEY)
    asked = {"role": "user", "content": "hi there"}
    async with opened(store, intents={"redact": "string:capwords"}) as client:
        await ready(client)
        for messages in ([asked], [{"role": "system", "content": "be kind"}, asked]):
            sent = await client.post("/v1/chat/completions", json={"model": "intents", "messages": messages})
            assert sent.status_code == 200
    alone, longer = rows(store, captures)
    assert (alone["inputs"], alone["prompt"]) == ('{"message": "Hi There"}', "")
    assert longer["inputs"] is None
    assert "kind" in longer["prompt"].lower()


class Own(str):
    """As libraries have them."""


def faulty(text: str) -> object:
    """A hook with mistakes."""
    if text == "blue":
        raise ValueError(text)
    return {"red": None, "green": Own(text)}.get(text, text)


@pytest.mark.parametrize("colour", ["red", "green", "blue"])
async def test_a_redaction_that_gives_no_text_or_fails_keeps_nothing_and_holds_up_no_answer(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, colour: str
) -> None:
    monkeypatch.setenv("SOFTCUE_TESTERS", KEY)
    async with opened(store, copy={"redact": f"{__name__}:faulty"}) as client:
        await ready(client)
        for _ in range(2):
            assert (await ask(client, inputs={"product": "mug", "colour": colour})).status_code == 200
        assert 'softcue_captures_failed_total{task="copy"} 2.0' in (await client.get("/metrics")).text
    assert (rows(store, captures), len(rows(store, answers))) == ([], 2)
    assert caplog.text.count("the redaction of task 'copy' failed, so such requests are not captured") == 1


async def test_a_service_does_not_start_without_the_key_that_its_settings_name(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (None, ""):
        monkeypatch.delenv("SOFTCUE_TESTERS", raising=False)
        if value is not None:
            monkeypatch.setenv("SOFTCUE_TESTERS", value)
        with pytest.raises(SettingsError, match="names SOFTCUE_TESTERS, which is not set; set it to the testers' key"):
            create_app(with_key(store), engine=ScriptedEngine())


async def test_an_extract_tasks_json_is_checked_for_the_experiment(store: Store) -> None:
    store.task(QUERY)
    for seed, alias in ((1, "production"), (2, None)):
        store.publish("query", random_prompt(seed, 4), alias)
    start(store, name="forms", task="query", metric="valid_json")
    replies = iter(['{"table": "here"}', "no JSON"])
    async with client_of(store, ScriptedEngine(lambda _: [next(replies)])) as client:
        for unit in "ab":
            body = {"inputs": {"question": "q"}, "unit": unit, "constrained": False}
            assert (await client.post("/v1/tasks/query/generate", json=body)).status_code == 200
    assert [row["valid_json"] for row in rows(store, answers)] == [True, False]
