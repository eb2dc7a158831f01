"""A real server that is stopped, killed or cut off from its store while it is used: what it took is not lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from sqlalchemy import Column, select

from prompt_store.access import ANONYMOUS
from prompt_store.database import Database
from prompt_store.experiments.experiment import parse_experiment
from prompt_store.prompts.registry import NewVersion
from prompt_store.prompts.version import RemoteModelPayload
from prompt_store.tables import answers, exposures, outcomes
from service.engines.base_model import BaseModel
from service.generation_ids import verify
from service.routing.backends import Backend
from tests.postgresql import Server as PostgreSQL
from tests.processes import Server, eventually, running, softcue
from tests.providers import UNTIL_LEFT, Answer, Asked, ScriptedProvider, json_answer
from tests.service.routing.routed import Provider
from tests.service.serving import COPY, open_store

SETTINGS = """
[store]
url = "{location}"

[server]
drain_s = 0.5

[engine]
enabled = false

[journal]
folder = "journal"

[backends.acme]
kind = "openai_compatible"
url = "{provider}"
"""
ARMS = [{"name": "control", "weight": 0.5}, {"name": "candidate", "weight": 0.5, "version": "v2"}]
CALLERS = 4


def red(asked: Asked) -> Answer:
    """Of what is slow nothing is said."""
    if b"slow" in asked.body:
        return [UNTIL_LEFT]
    message = {"role": "assistant", "content": "a red mug", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    return json_answer(
        {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    )


@dataclass
class Used:
    """A server that callers ask without a pause and tell what came of each answer, until it is gone.

    `answered` and `reported` are the requests to which it said so.
    """

    arguments: list[str]
    folder: Path
    signing_key: bytes
    provider: ScriptedProvider
    answered: set[str] = field(default_factory=set)
    reported: set[str] = field(default_factory=set)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Server]:
        """Both, until the body has ended the server."""
        with running(self.arguments, self.folder / "log") as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client, asyncio.TaskGroup() as callers:
                for _ in range(CALLERS):
                    callers.create_task(self._call(client))
                yield server

    async def more(self) -> None:
        """Wait until a hundred more were reported."""
        wanted = len(self.reported) + 100
        async with asyncio.timeout(60):
            while len(self.reported) < wanted:  # noqa: ASYNC110 (callers count)
                await asyncio.sleep(0.001)

    @asynccontextmanager
    async def waiting(self, server: Server) -> AsyncIterator[None]:
        """Callers that are not answered until the server has ended."""
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client, asyncio.TaskGroup() as callers:
            for stream in (False, True):
                callers.create_task(self._wait(client, stream))
            async with asyncio.timeout(60):
                while sum(b"slow" in asked.body for asked in self.provider.requests) < 2:  # noqa: ASYNC110 (they count)
                    await asyncio.sleep(0.001)
            yield

    async def _wait(self, client: httpx.AsyncClient, stream: bool) -> None:
        body = {"inputs": {"product": "slow", "colour": "red"}, "stream": stream}
        with suppress(httpx.TransportError):
            assert (await client.post("/v1/tasks/copy/generate", json=body)).status_code != 200

    async def _call(self, client: httpx.AsyncClient) -> None:
        try:
            while True:
                body = {"inputs": {"product": "mug", "colour": "red"}}
                answer = await client.post("/v1/tasks/copy/generate", json=body)
                if answer.status_code != 200:
                    return
                generation = answer.json()["id"]
                request = verify(generation, self.signing_key).request
                self.answered.add(request)
                outcome = {"metric": "helpful", "value": True}
                taken = await client.post(f"/v1/generations/{generation}/outcomes", json=outcome)
                if taken.status_code != 202:
                    return
                self.reported.add(request)
        except httpx.TransportError:
            return  # it is gone


@asynccontextmanager
async def used(folder: Path, location: str, base: BaseModel) -> AsyncIterator[Used]:
    """A service over a store with a running experiment, whose one backend is a scripted provider."""
    store = open_store(location, base)
    store.task({**COPY, "metrics": [{"name": "helpful", "direction": "maximise", "type": "boolean"}]})
    for model, alias in (("small", "production"), ("large", None)):
        version = NewVersion(task="copy", payload_content=RemoteModelPayload(provider="acme", model=model))
        store.registry.publish(version, alias, "a test", ANONYMOUS)
    known = {"name": "tone", "task": "copy", "control": "control", "metric": "helpful", "arms": ARMS}
    described = Backend("acme", Provider(), "openai_compatible", "acme").describe()
    store.registry.start_experiment(parse_experiment(known), ANONYMOUS, backends=[described])
    key = store.registry.database.signing_key()
    store.registry.database.close()
    settings = folder / "softcue.toml"
    async with ScriptedProvider(red) as provider:
        settings.write_text(SETTINGS.format(location=location, provider=provider.url))
        yield Used(["serve", "--config", str(settings), "--port", "0"], folder, key, provider)


async def ended(server: Server) -> int:
    return await asyncio.to_thread(server.process.wait, 60)


def requests(location: str, column: Column[str]) -> set[str]:
    with Database.open(location) as database, database.read() as connection:
        return set(connection.execute(select(column)).scalars())


def assert_all_is_there(location: str, service: Used) -> None:
    assert len(service.reported) >= 100
    assert service.reported <= requests(location, outcomes.c.request)
    assert service.answered <= requests(location, exposures.c.request)
    assert service.answered <= requests(location, answers.c.request)


def segments(folder: Path) -> list[Path]:
    """Of a journal whose folders may be removed meanwhile."""
    return [Path(within, file) for within, _, files in os.walk(folder / "journal") for file in files if file != "lock"]


async def test_a_server_that_is_stopped_while_it_is_used_has_stored_all_that_it_took(
    location: str, tmp_path: Path, base: BaseModel
) -> None:
    async with used(tmp_path, location, base) as service, service.serving() as server:
        await service.more()
        async with service.waiting(server):
            server.process.send_signal(signal.SIGTERM)
            assert await ended(server) == 0
    assert segments(tmp_path) == []
    assert_all_is_there(location, service)
    # Also of requests that were cut off it is known how they ended.
    assert len(requests(location, answers.c.request)) >= len(service.answered) + 2
    assert requests(location, exposures.c.request) == requests(location, answers.c.request)


async def test_a_server_that_is_killed_has_all_that_it_took_stored_by_the_next(
    location: str, tmp_path: Path, base: BaseModel
) -> None:
    async with used(tmp_path, location, base) as service:
        for _ in range(2):
            async with service.serving() as server:
                await service.more()
                server.process.kill()
                await ended(server)
        with running(service.arguments, tmp_path / "last"):
            eventually(lambda: segments(tmp_path), lambda left: not left)
    assert_all_is_there(location, service)


async def test_what_a_server_took_while_its_store_was_away_is_on_disk_after_sigterm_and_stored_by_the_next(
    own_postgresql: PostgreSQL, tmp_path: Path, base: BaseModel
) -> None:
    cluster, location = own_postgresql.cluster, own_postgresql.create()
    assert cluster is not None
    async with used(tmp_path, location, base) as service:
        async with service.serving() as server:
            await service.more()
            await asyncio.to_thread(cluster.stop, mode="immediate")
            before = set(service.reported)
            await service.more()
            server.process.send_signal(signal.SIGTERM)
            assert await ended(server) == 0
        assert "shipped after the next start" in server.log.read_text()
        kept = b"".join(file.read_bytes() for file in segments(tmp_path))
        assert all(request.encode() in kept for request in service.reported - before)
        await asyncio.to_thread(cluster.start)
        with running(service.arguments, tmp_path / "last"):
            eventually(lambda: segments(tmp_path), lambda left: not left)
    assert_all_is_there(location, service)
    own_postgresql.drop(location)


def test_a_journal_that_cannot_be_opened_ends_the_start_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("in its place")
    settings = tmp_path / "softcue.toml"
    settings.write_text(SETTINGS.format(location=tmp_path / "store.db", provider="http://127.0.0.1:1"))
    said = softcue("serve", "--config", settings, "--port", "0", code=1)
    assert f"softcue: the journal {tmp_path / 'journal'} cannot be opened (" in said
    assert "name another as journal.folder" in said
    assert "Traceback" not in said
