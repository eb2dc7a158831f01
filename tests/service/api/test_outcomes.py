"""Outcomes over HTTP: whose they are, what is refused, and what the store has once they were acknowledged."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from litestar.testing import AsyncTestClient
from sqlalchemy import select

from prompt_store.tables import outcomes
from service.engines.scripted import ScriptedEngine
from service.generation_ids import GenerationTag, sign, unit_hash, verify
from tests.conftest import random_prompt
from tests.service.serving import COPY, INTENTS, Store, client_of

METRICS: list[dict[str, Any]] = [
    {"name": "helpful", "direction": "maximise", "type": "boolean"},
    {"name": "stars", "direction": "maximise"},
    {"name": "remark", "direction": "maximise", "type": "text"},
]


@pytest.fixture
def store(store: Store) -> Store:
    for document in (COPY, INTENTS):
        store.task({**document, "metrics": METRICS})
    return store


@pytest.fixture
async def client(store: Store, engine: ScriptedEngine) -> AsyncIterator[AsyncTestClient[Any]]:
    async with client_of(store, engine) as client:
        yield client


async def answered(client: AsyncTestClient[Any], task: str = "copy", unit: str = "user 7") -> str:
    inputs = {"copy": {"product": "mug", "colour": "red"}, "intents": {"message": "hi"}}[task]
    verb = "classify" if task == "intents" else "generate"
    answer = await client.post(f"/v1/tasks/{task}/{verb}", json={"inputs": inputs, "unit": unit})
    return str(answer.json()["id"])


async def report(client: AsyncTestClient[Any], generation: str, **body: Any) -> Any:
    return await client.post(f"/v1/generations/{generation}/outcomes", json=body)


def kept(store: Store) -> list[Any]:
    """What is in the store, once the service has stopped or written what it had."""
    with store.registry.database.read() as connection:
        return list(connection.execute(select(outcomes).order_by(outcomes.c.request, outcomes.c.metric)))


def values(store: Store) -> dict[str, float | str]:
    return {row.metric: row.text if row.value is None else row.value for row in kept(store)}


def refusal(response: Any) -> tuple[int, str, str | None, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"], error["message"]


async def test_what_was_acknowledged_is_in_the_store_with_what_the_id_says(store: Store) -> None:
    async with client_of(store, ScriptedEngine()) as client:
        generation = await answered(client)
        answer = await report(client, generation, metric="helpful", value=True, at="2099-01-01T00:00:00Z")
        assert answer.status_code == 400
        at = datetime.now(UTC).replace(microsecond=0)
        answer = await report(client, generation, metric="helpful", value=True, at=at.isoformat())
        assert answer.status_code == 202
    (taken,) = answer.json()["data"]
    assert (taken["generation"], taken["task"], taken["metric"]) == (generation, "copy", "helpful")
    assert taken["value"] is True
    assert datetime.fromisoformat(taken["at"]) == at
    key = store.registry.database.signing_key()
    tag = verify(generation, key)
    (row,) = kept(store)
    assert (row.request, row.task, row.version, row.generated_ms) == (tag.request, "copy", tag.version, tag.at_ms)
    assert (row.unit_hash, row.source, row.principal) == (unit_hash("user 7", key), "caller", "anonymous")
    assert (row.metric, row.value, row.at_ms) == ("helpful", 1.0, round(at.timestamp() * 1000))


async def test_the_experiment_and_arm_of_an_outcome_are_those_of_the_id(store: Store) -> None:
    tag = GenerationTag("copy", "", "b", "5" * 16, round(time.time() * 1000), "5f-1", "tone")
    async with client_of(store, ScriptedEngine()) as client:
        generation = sign(tag, store.registry.database.signing_key())
        assert (await report(client, f"chatcmpl-{generation}", metric="stars", value=4)).status_code == 202
    (row,) = kept(store)
    assert (row.request, row.experiment, row.arm, row.unit_hash) == ("5f-1", "tone", "b", "5" * 16)


async def test_the_same_twice_is_once_and_the_newest_holds_in_whatever_order_it_comes(store: Store) -> None:
    now = time.time()
    async with client_of(store, ScriptedEngine()) as client:
        generation = await answered(client)
        for stars, ago_s in ((4, 10), (4, 10), (5, 1), (2, 60)):
            sent = await report(client, generation, metric="stars", value=stars, at=now - ago_s)
            assert sent.status_code == 202
    assert values(store) == {"stars": 5.0}


async def test_bodies_of_another_shape_are_refused_in_our_words(client: AsyncTestClient[Any]) -> None:
    generation = await answered(client)
    for body, said in (
        ({"metric": "helpful"}, "the body: metric or value is missing; give both, or several outcomes"),
        ({"metric": "helpful", "value": [True]}, "value: give true or false, a number, or text"),
        ({"metric": "helpful", "value": True, "at": []}, "at: give an ISO time with its zone, or Unix seconds"),
    ):
        status, _, _, message = refusal(await report(client, generation, **body))
        assert (status, message.startswith(said)) == (400, True), message


async def test_several_outcomes_of_an_answer_are_taken_at_once(store: Store) -> None:
    several = [
        {"metric": "helpful", "value": False},
        {"metric": "stars", "value": 0.5},
        {"metric": "remark", "value": "too short"},
        {"metric": "demonstration", "value": "a red mug"},
    ]
    async with client_of(store, ScriptedEngine()) as client:
        answer = await report(client, await answered(client), outcomes=several)
        assert [taken["metric"] for taken in answer.json()["data"]] == [each["metric"] for each in several]
    assert values(store) == {"helpful": 0.0, "stars": 0.5, "remark": "too short", "demonstration": "a red mug"}


async def test_a_batch_is_of_several_answers(store: Store) -> None:
    async with client_of(store, ScriptedEngine()) as client:
        batch = [
            {"generation": await answered(client, task), "metric": "stars", "value": stars}
            for stars, task in enumerate(("copy", "intents", "copy"))
        ]
        answer = await client.post("/v1/outcomes", json={"outcomes": batch})
        assert (answer.status_code, len(answer.json()["data"])) == (202, 3)
    assert sorted((row.value, row.task) for row in kept(store)) == [(0.0, "copy"), (1.0, "intents"), (2.0, "copy")]


async def test_of_a_batch_with_problems_none_is_taken_and_each_is_named_by_its_place(store: Store) -> None:
    async with client_of(store, ScriptedEngine()) as client:
        mine, label = await answered(client), await answered(client, "intents")
        batch = [
            {"generation": mine, "metric": "stars", "value": 5},
            {"generation": "chatcmpl-forged.id", "metric": "stars", "value": 5},
            {"generation": mine, "metric": "star", "value": 5},
            {"generation": mine, "metric": "helpful", "value": 1},
            {"generation": label, "metric": "demonstration", "value": "track ordr"},
            {"generation": mine, "metric": "stars", "value": 5, "at": "yesterday"},
            {"generation": mine, "metric": "cost", "value": 5},
        ]
        answer = await client.post("/v1/outcomes", json={"outcomes": batch})
    status, code, parameter, message = refusal(answer)
    assert (status, code, parameter) == (400, "invalid_outcome", "outcomes[1].generation")
    assert "outcomes[1].generation: this generation id was not signed" in message
    assert "outcomes[2].metric: task 'copy' has no metric 'star'; did you mean 'stars'?" in message
    assert "outcomes[3].value: metric 'helpful' is true or false and was given a number" in message
    assert "outcomes[4].value: the demonstration is no label of task 'intents'; did you mean 'track order'?" in message
    assert "outcomes[5].at: it is no ISO time with a zone" in message
    assert "outcomes[6].value: 'cost' is measured by the service itself" in message
    assert kept(store) == []


async def test_an_id_that_was_not_signed_here_is_not_found(client: AsyncTestClient[Any]) -> None:
    generation = await answered(client)
    for wrong in (generation[:-1] + ("A" if generation[-1] != "A" else "B"), "nothing"):
        status, code, _, message = refusal(await report(client, wrong, metric="stars", value=5))
        assert (status, code) == (404, "generation_not_found")
        assert "send the id exactly as it was answered" in message


async def test_an_answer_of_no_task_has_no_metrics(client: AsyncTestClient[Any]) -> None:
    asked = {"model": "demo-base", "messages": [{"role": "user", "content": "hi"}]}
    generation = (await client.post("/v1/chat/completions", json=asked)).json()["id"]
    status, code, parameter, message = refusal(await report(client, generation, metric="stars", value=5))
    assert (status, code, parameter) == (400, "invalid_outcome", "metric")
    assert "ask a task" in message


async def test_a_metric_of_the_revision_that_answered_is_still_taken(store: Store) -> None:
    store.task({**COPY, "metrics": [{"name": "old", "direction": "minimise", "type": "boolean"}]})
    version = store.publish("copy", random_prompt(9, 4), alias=None)
    store.task({**COPY, "metrics": METRICS})
    async with client_of(store, ScriptedEngine()) as client:
        inputs = {"product": "mug", "colour": "red"}
        answer = await client.post("/v1/tasks/copy/generate", json={"inputs": inputs, "version": version.label})
        generation = answer.json()["id"]
        assert (await report(client, generation, metric="old", value=True)).status_code == 202
        assert (await report(client, generation, metric="stars", value=1)).status_code == 202
        assert (await report(client, await answered(client), metric="old", value=True)).status_code == 400
    assert values(store) == {"old": 1.0, "stars": 1.0}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"metric": "stars"},
        {"value": 5},
        {"metric": "stars", "value": None},
        {"metric": "stars", "value": [5]},
        {"metric": "stars", "value": 5, "at": True},
        {"metric": "stars", "value": 5, "when": 1},
        {"metric": "", "value": 5},
        {"outcomes": []},
        {"outcomes": [{"metric": "stars", "value": 5}], "metric": "stars", "value": 5},
        {"outcomes": [{"metric": "stars", "value": 5}] * 1001},
        {"outcomes": [{"metric": "stars", "value": {}}]},
    ],
)
async def test_a_body_of_another_shape_is_refused(client: AsyncTestClient[Any], body: dict[str, Any]) -> None:
    assert (await report(client, await answered(client), **body)).status_code == 400


async def test_a_value_of_no_type_is_refused_once_with_its_place(client: AsyncTestClient[Any]) -> None:
    body = {"outcomes": [{"metric": "stars", "value": {}}]}
    _, _, parameter, message = refusal(await report(client, await answered(client), **body))
    assert parameter == "outcomes.0.value"
    assert "give true or false, a number, or text" in message


@pytest.mark.parametrize("at", ["2026-05-01", "2026-05-01T12:00:00", "soon", "", "1700000000", 0, -5, 1e300])
async def test_a_time_that_cannot_be_meant_is_refused(client: AsyncTestClient[Any], at: str | float) -> None:
    answer = await report(client, await answered(client), metric="stars", value=5, at=at)
    assert refusal(answer)[:3] == (400, "invalid_outcome", "at")


async def test_an_outcome_that_cannot_be_journaled_is_not_acknowledged_until_it_can(store: Store) -> None:
    journal = store.registry.database.storage.journal
    async with client_of(store, ScriptedEngine()) as client:
        generation = await answered(client)
        shutil.rmtree(journal)
        journal.write_text("in its place")
        answer = await report(client, generation, metric="stars", value=5)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "journal_unavailable")
        assert answer.headers["retry-after"] == "2"
        journal.unlink()
        async with asyncio.timeout(30):
            while (await report(client, generation, metric="stars", value=5)).status_code != 202:  # noqa: ASYNC110
                await asyncio.sleep(0.001)  # the thread that makes the folder anew needs the interpreter
    assert values(store) == {"stars": 5.0}


async def test_clocks_may_be_minutes_apart(store: Store) -> None:
    async with client_of(store, ScriptedEngine()) as client:
        for metric, minutes in (("stars", 5), ("helpful", -5)):
            at = (datetime.now(UTC) + timedelta(minutes=minutes)).isoformat()
            value: Any = True if metric == "helpful" else 3
            assert (await report(client, await answered(client), metric=metric, value=value, at=at)).status_code == 202
        ahead = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        answer = await report(client, await answered(client), metric="stars", value=3, at=ahead)
    assert answer.status_code == 400
    assert "in the future" in refusal(answer)[3]
    assert values(store) == {"stars": 3.0, "helpful": 1.0}
