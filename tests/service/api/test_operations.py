"""What the service says of itself, and what clients meet while its store is away, damaged or partly unreadable."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from litestar.testing import AsyncTestClient
from sqlalchemy import update

from prompt_store.changes import ChangeWatcher
from prompt_store.tables import task_revisions, tensors, versions
from service.app import create_app
from service.engines.base import GenerationEvent, GenerationRequest
from service.engines.base_model import BaseModel
from service.engines.scripted import ScriptedEngine
from tests.conftest import random_prompt
from tests.postgresql import running_server
from tests.service.serving import Store, client_of, filled

COPY_INPUTS = {"inputs": {"product": "p", "colour": "c"}}


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask until the answer is yes."""
    async with asyncio.timeout(20):
        while not await holds():  # noqa: ASYNC110 (what is awaited happens elsewhere)
            await asyncio.sleep(0.01)


async def metric(client: AsyncTestClient[Any], name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


async def test_a_ready_service_says_so_of_store_writes_and_backends(client: AsyncTestClient[Any]) -> None:
    answer = await client.get("/health/ready")
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "ready", "store": True, "writes": "ready", "warm": True, "backends": {"local": True}},
    )
    writes = await client.get("/health/ready/writes")
    assert (writes.status_code, writes.json()) == (200, {"status": "ready"})
    assert await metric(client, "softcue_store_reachable") == 1.0


async def test_while_the_database_is_away_requests_are_answered_and_writes_are_not_ready(base: BaseModel) -> None:
    with running_server(own=True) as server:
        assert server.cluster is not None
        store = filled(server.create(), base)
        async with client_of(store, ScriptedEngine()) as client:
            await asyncio.to_thread(server.cluster.stop)

            async def writes_are(status: int) -> bool:
                return (await client.get("/health/ready/writes")).status_code == status

            await until(lambda: writes_are(503))
            answer = await client.get("/health/ready")
            assert (answer.status_code, answer.json()["store"], answer.json()["writes"]) == (200, False, "not ready")
            assert await metric(client, "softcue_store_reachable") == 0.0
            assert (await client.post("/v1/tasks/copy/generate", json=COPY_INPUTS)).status_code == 200
            await asyncio.to_thread(server.cluster.start)
            await asyncio.to_thread(store.publish, "copy", random_prompt(9, 4))

            async def publish_is_served() -> bool:
                asked = await client.post("/v1/tasks/copy/generate", json=COPY_INPUTS)
                return asked.headers["x-softcue-version"] == "copy@v2"

            await until(publish_is_served)
            assert await writes_are(200)
        store.registry.database.close()


def damage(store: Store, digest: str) -> None:
    with store.registry.database.write() as connection:
        connection.execute(update(tensors).where(tensors.c.digest == digest).values(data=b"\x00" * 16))


async def test_a_damaged_version_is_a_503_of_its_own_task_alone(store: Store, engine: ScriptedEngine) -> None:
    damage(store, random_prompt(1, 5).digest)
    async with client_of(store, engine) as client:
        refused = await client.post("/v1/tasks/copy/generate", json=COPY_INPUTS)
        error = refused.json()["error"]
        assert (refused.status_code, error["type"], error["code"]) == (503, "server_error", "damaged_version")
        assert "restore the store from a backup" in error["message"]
        asked = {"model": "intents", "messages": [{"role": "user", "content": "hello"}]}
        assert (await client.post("/v1/chat/completions", json=asked)).status_code == 200
        assert await metric(client, "softcue_damaged_versions") == 1.0


class LoadingEngine(ScriptedEngine):
    """Reads the tensor that a request brings, as an engine does that does not know it yet."""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        self.requests.append(request)
        assert request.soft_prompt is not None
        await self.warm(request.soft_prompt)
        async for event in super().generate(request):
            yield event


async def test_a_damaged_version_that_a_request_meets_first_is_a_503_too(store: Store) -> None:
    loading = LoadingEngine()
    store.publish("copy", random_prompt(8, 5), alias=None)
    damage(store, random_prompt(8, 5).digest)
    async with client_of(store, loading) as client:
        for _ in range(2):
            refused = await client.post("/v1/tasks/copy/generate", json={**COPY_INPUTS, "version": "v2"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "damaged_version")
        assert len(loading.requests) == 1
        assert (await client.post("/v1/tasks/copy/generate", json=COPY_INPUTS)).status_code == 200


async def test_where_it_is_wanted_an_earlier_version_answers_and_says_so(store: Store, engine: ScriptedEngine) -> None:
    store.publish("copy", random_prompt(8, 5))
    damage(store, random_prompt(8, 5).digest)
    async with client_of(store, engine, fall_back=True) as client:
        answer = await client.post("/v1/tasks/copy/generate", json=COPY_INPUTS)
        assert (answer.status_code, answer.headers["x-softcue-version"]) == (200, "copy@v1")
        refused = await client.post("/v1/tasks/copy/generate", json={**COPY_INPUTS, "version": "v2"})
        assert refused.status_code == 503
        assert await metric(client, "softcue_aliases_fallen_back") == 1.0


async def test_lists_show_what_cannot_be_read_and_asking_for_it_says_why(store: Store, engine: ScriptedEngine) -> None:
    store.publish("copy", random_prompt(8, 5), alias="candidate")
    with store.registry.database.write() as connection:
        connection.execute(update(versions).where(versions.c.number == 2).values(payload='{"kind": "hologram"}'))
        connection.execute(update(task_revisions).where(task_revisions.c.task == "query").values(document="{}"))
    async with client_of(store, engine) as client:
        models = {entry["id"]: entry for entry in (await client.get("/v1/models")).json()["data"]}
        assert "v2 of task 'copy'" in models["copy@v2"]["unreadable"]
        assert "unreadable" not in models["copy@v1"]
        assert models["copy"]["root"] == "copy@v1"
        tasks = {entry["name"]: entry for entry in (await client.get("/v1/tasks")).json()["data"]}
        assert (tasks["copy"]["versions"], tasks["copy"]["aliases"]["candidate"]) == (["v1", "v2"], "v2")
        assert "revision 1 of task 'query'" in tasks["query"]["unreadable"]
        for path in ("/v1/prompts?task=copy", "/v1/prompts/copy/versions"):
            unread, whole = (await client.get(path)).json()["data"]
            assert "v2 of task 'copy'" in unread["unreadable"]
            assert (unread["version"], unread["aliases"], whole["version"]) == ("v2", ["candidate"], "v1")
        for path in (
            "/v1/models/copy@v2", "/v1/models/copy@candidate", "/v1/tasks/query",
            "/v1/prompts/copy/versions/v2", "/v1/prompts/copy/versions/v2/tensor", "/v1/prompts/query",
        ):  # fmt: skip
            refused = await client.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (500, "schema_mismatch")
        asked = {"model": "query@v1", "messages": [{"role": "user", "content": "hello"}]}
        assert (await client.post("/v1/chat/completions", json=asked)).status_code == 500
        assert (await client.post("/v1/tasks/copy/generate", json=COPY_INPUTS)).status_code == 200


async def test_a_stop_does_not_hold_up_what_still_runs_while_the_store_keeps_silent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher may be connecting to a store that is away; whoever closes it waits for that."""
    others_run = threading.Event()
    seen: list[bool] = []
    close = ChangeWatcher.close

    def close_slowly(watcher: ChangeWatcher) -> None:
        seen.append(others_run.wait(20))
        close(watcher)

    monkeypatch.setattr(ChangeWatcher, "close", close_slowly)
    async with create_app(store.settings(), engine=ScriptedEngine()).lifespan():
        pinging = asyncio.create_task(_set_later(others_run))
    await pinging
    assert seen == [True]


async def _set_later(event: threading.Event) -> None:
    """When the stop has begun, or before: only an event loop that is held up comes to it too late."""
    await asyncio.sleep(0.05)
    event.set()


async def test_the_description_says_what_each_operation_does_and_answers(client: AsyncTestClient[Any]) -> None:
    paths = (await client.get("/schema/openapi.json")).json()["paths"]
    operations = {(method, path): operation for path, known in paths.items() for method, operation in known.items()}
    assert [place for place, operation in operations.items() if not operation.get("description")] == []
    alias = "/v1/prompts/{task}/aliases/{alias}"
    assert "etag" in operations["get", alias]["responses"]["200"]["headers"]
    assert {"200", "201", "409", "412", "428", "503"} <= operations["put", alias]["responses"].keys()
    assert "503" in operations["get", "/health/ready/writes"]["responses"]
