"""A provider that hangs or asks for patience behind a fallback: what it costs the requests, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from prompt_store.access import ANONYMOUS
from prompt_store.routing.routes import parse_task_route
from service.engines.base_model import BaseModel
from service.engines.scripted import ScriptedEngine
from tests.providers import UNTIL_LEFT, Answer, Asked, ScriptedProvider, error_answer
from tests.service.routing.routed import FALLBACK, LOCAL, V2, ask, publish_remote, says
from tests.service.serving import Store, filled, listening

REMOTE_FIRST = {**FALLBACK, "routes": [V2, LOCAL]}


@pytest.fixture
def store(tmp_path: Path, base: BaseModel) -> Iterator[Store]:
    store = filled(tmp_path / "softcue.db", base)
    yield store
    store.registry.database.close()


@asynccontextmanager
async def serving(
    store: Store, task: str, play: Callable[[], Answer], deadline_s: float | None, **backend: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedProvider]]:
    """A service whose provider answers questions as played, in front of the local engine."""

    def answer(asked: Asked) -> Answer:
        return play() if asked.method == "POST" else error_answer(404)  # when the model goes away, it is asked

    publish_remote(store, task)
    async with ScriptedProvider(answer) as provider:
        settings = {"kind": "openai_compatible", "url": provider.url, **backend}
        with listening(store, ScriptedEngine(says("near")), remote={"acme": settings}) as url:
            limits = {} if deadline_s is None else {"deadline_s": deadline_s}
            store.registry.apply_route(task, parse_task_route({"route": REMOTE_FIRST, **limits}), ANONYMOUS)
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                async with asyncio.timeout(20):
                    while "fallback" not in (await client.get("/v1/routes")).text:  # noqa: ASYNC110 (it is asked for)
                        await asyncio.sleep(0.001)  # the threads that are waited for need the interpreter
                yield client, provider


def posts(provider: ScriptedProvider) -> int:
    return sum(asked.method == "POST" for asked in provider.requests)


@pytest.mark.parametrize(("task", "body"), [("copy", {}), ("copy", {"stream": True}), ("intents", {})])
async def test_a_provider_that_hangs_is_left_alone_though_a_fallback_answers(
    store: Store, task: str, body: dict[str, Any]
) -> None:
    breaker = {"consecutive": 2, "open_s": 600}
    async with serving(store, task, lambda: [UNTIL_LEFT], 2.4, breaker=breaker) as (client, provider):
        for answer in await asyncio.gather(*(ask(client, task, **body) for _ in range(2))):
            assert (answer.status_code, answer.headers["x-softcue-backend"]) == (200, "local")
        hung = posts(provider)
        (acme,) = [each for each in (await client.get("/v1/backends")).json()["data"] if each["name"] == "acme"]
        assert acme["breaker"] == "open"
        answer = await ask(client, task, **body)
        assert (answer.status_code, answer.headers["x-softcue-backend"]) == (200, "local")
        assert posts(provider) == hung == 2


@pytest.mark.parametrize(("task", "body"), [("copy", {}), ("copy", {"stream": True}), ("intents", {})])
@pytest.mark.parametrize("deadline_s", [None, 600.0])
async def test_a_provider_that_asks_for_patience_is_not_waited_for_where_another_follows(
    store: Store, task: str, body: dict[str, Any], deadline_s: float | None
) -> None:
    limited = error_answer(429, headers={"retry-after": "20"})
    async with serving(store, task, lambda: limited, deadline_s) as (client, provider):
        async with asyncio.timeout(15):
            answer = await ask(client, task, **body)
        assert (answer.status_code, answer.headers["x-softcue-backend"]) == (200, "local")
        assert posts(provider) == 1
