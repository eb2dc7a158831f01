"""A store with tasks and versions, and the application over it, for tests of the service."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from litestar.testing import AsyncTestClient

from prompt_store.access import ANONYMOUS
from prompt_store.database import Database
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import Task, parse_task
from prompt_store.prompts.version import PromptVersion, TextPayload
from service.app import create_app
from service.engines.base import Engine
from service.engines.base_model import BaseModel
from service.routing.backends import Backend
from service.settings import Settings, load_settings
from tests.conftest import BASE_FOLDER, random_prompt

INTENTS: dict[str, Any] = {
    "name": "intents",
    "kind": "classify",
    "inputs": ["message"],
    "labels": ["get refund", "track order", "greeting"],
    "messages": [{"role": "user", "content": "{message}"}],
    "sampling": {"max_tokens": 8},
}
COPY: dict[str, Any] = {
    "name": "copy",
    "kind": "generate",
    "inputs": ["product", "colour"],
    "messages": [{"role": "user", "content": "{colour} {product}"}],
    "sampling": {"max_tokens": 12, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"]},
}
QUERY: dict[str, Any] = {
    "name": "query",
    "kind": "extract",
    "inputs": ["question"],
    "messages": [{"role": "user", "content": "{question}"}],
    "json_schema": {"type": "object", "required": ["table"], "properties": {"table": {"type": "string"}}},
}


@dataclass
class Store:
    """A prompt store, as another process would write it."""

    location: str
    base: BaseModel
    registry: Registry

    def task(self, document: dict[str, Any]) -> Task:
        task = parse_task(document)
        self.registry.apply_task(task, ANONYMOUS)
        return task

    def publish(
        self, task: str, content: SoftPrompt | Prefix | TextPayload, alias: str | None = "production"
    ) -> PromptVersion:
        fingerprint = self.base.fingerprint if isinstance(content, SoftPrompt | Prefix) else None
        new = NewVersion(task=task, payload_content=content, base_fingerprint=fingerprint)
        return self.registry.publish(new, alias, "a test", ANONYMOUS).version

    def settings(
        self,
        *,
        fall_back: bool = False,
        backends: Mapping[str, Any] | None = None,
        retirements: Mapping[str, date] | None = None,
        **server: Any,
    ) -> Settings:
        """`backends` as in `[backends.NAME]`, `retirements` as in `[retirements]`, the rest as in `[server]`."""
        overrides: dict[str, dict[str, Any]] = {
            "backends": dict(backends or {}),
            "retirements": dict(retirements or {}),
            "store": {"url": self.location, "poll_s": 0.01, "fall_back_when_damaged": fall_back},
            "base": {"path": BASE_FOLDER, "name": "demo-base"},
            "server": {"drain_s": 1, **server},
        }
        return load_settings(None, {}, overrides)


def random_prefix(seed: int, *, length: int) -> Prefix:
    """Normal numbers [L, 2, KV heads, P, D] that fit the demo base and change what it says."""
    shape = (5, 2, 6, length, 32)
    values = np.random.default_rng(seed).normal(0.0, 1.0, shape).astype(np.float32)
    return Prefix("F32", shape, values.tobytes())


def open_store(location: str | Path, base: BaseModel) -> Store:
    """An empty store that knows the demo base."""
    registry = Registry(Database.open(location))
    registry.register_base(base.describe(), ANONYMOUS)
    return Store(str(location), base, registry)


def filled(location: str | Path, base: BaseModel) -> Store:
    """A store with the three tasks, each with one version in production."""
    store = open_store(location, base)
    for seed, document in enumerate((INTENTS, COPY, QUERY)):
        store.publish(store.task(document).name, random_prompt(seed, 4 + seed))
    return store


@asynccontextmanager
async def client_of(
    store: Store,
    engine: Engine,
    *,
    backends: Sequence[Backend] = (),
    remote: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[AsyncTestClient[Any]]:
    """The ready application, spoken to in this process; `remote` are backends of its settings, see `Store.settings`."""
    app = create_app(store.settings(backends=remote, **settings), engine=engine, backends=backends)
    async with AsyncTestClient(app, raise_server_exceptions=False) as client:
        async with asyncio.timeout(10):
            while not (await client.get("/health/ready")).json()["warm"]:  # noqa: ASYNC110 (it is asked for)
                await asyncio.sleep(0.001)  # the threads that are waited for need the interpreter
        yield client


def chunks(text: str) -> list[Any]:
    """What a stream of OpenAI's form says before its end."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@contextmanager
def listening(
    store: Store,
    engine: Engine,
    *,
    backends: Sequence[Backend] = (),
    remote: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[str]:
    """The address of the ready application under its real server, in a thread; the rest as `client_of`."""
    ready = threading.Event()
    app = create_app(
        store.settings(backends=remote, **settings), engine=engine, backends=backends, on_ready=lambda _: ready.set()
    )
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            assert ready.wait(30)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
