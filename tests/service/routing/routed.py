"""A service with a local engine and a provider, both scripted, and the routes over them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from litestar.testing import AsyncTestClient

from prompt_store.access import ANONYMOUS
from prompt_store.prompts.registry import NewVersion
from prompt_store.prompts.version import PromptVersion, RemoteModelPayload
from prompt_store.routing.calibrations import Calibration
from prompt_store.routing.routes import parse_task_route
from service.engines.base import GenerationRequest
from service.engines.errors import EngineError, ProviderUnavailable
from service.engines.scripted import FEATURES, ScriptedEngine
from service.routing.backends import Backend
from tests.service.serving import Store, client_of

REMOTE = frozenset({"remote_model"})
REMOTE_FEATURES = FEATURES | {"remote_model", "follow_up", "tools", "rich_messages", "provider_options"}

Said = Callable[[GenerationRequest], Iterable[Any]]


class Provider(ScriptedEngine):
    """A scripted engine that plays remote models."""

    def __init__(self, script: Said | None = None, **more: Any) -> None:
        super().__init__(script or says("remote answer"), features=REMOTE_FEATURES, payload_kinds=REMOTE, **more)


class PriceOf:
    """What a token costs, so that costs are whole numbers where that is wanted."""

    def __init__(self, input: float, output: float, cached_input: float | None = None) -> None:
        self.input, self.output = input * 1_000_000, output * 1_000_000
        self.cached_input = None if cached_input is None else cached_input * 1_000_000


def publish_remote(store: Store, task: str, model: str | None = None, provider: str = "acme") -> PromptVersion:
    """Under no alias."""
    payload = RemoteModelPayload(provider=provider, model=model or f"ft:small:{task}")
    new = NewVersion(task=task, payload_content=payload)
    return store.registry.publish(new, None, "a test", ANONYMOUS).version


def apply(store: Store, task: str, route: dict[str, Any], **limits: Any) -> None:
    known = [Backend("local", ScriptedEngine()), Backend("acme", Provider(), "openai_compatible", "acme")]
    document = parse_task_route({"route": route, **limits})
    store.registry.apply_route(task, document, ANONYMOUS, backends=[backend.describe() for backend in known])


@asynccontextmanager
async def serving(
    store: Store, local: ScriptedEngine, provider: ScriptedEngine | None = None, **more: Any
) -> AsyncIterator[AsyncTestClient[Any]]:
    """A service with backends `local` and `acme`."""
    acme = Backend("acme", provider or Provider(), "openai_compatible", "acme", **more)
    async with client_of(store, local, backends=[acme]) as client:
        yield client


def says(*texts: Any) -> Said:
    return lambda _: texts


def fails(error: EngineError) -> Said:
    return lambda _: [error]


LOCAL = {"kind": "direct", "backend": "local"}
V2 = {"kind": "direct", "version": "v2"}
FALLBACK = {"kind": "fallback", "routes": [LOCAL, V2]}
LOST = ProviderUnavailable("it is gone; wait", status=502, request_id="req-7")


async def ask(client: AsyncTestClient[Any] | httpx.AsyncClient, task: str = "copy", **body: Any) -> Any:
    inputs = {"copy": {"product": "mug", "colour": "red"}, "intents": {"message": "hi"}, "query": {"question": "q"}}
    verb = "classify" if task == "intents" else "generate"
    return await client.post(f"/v1/tasks/{task}/{verb}", json={"inputs": inputs[task], **body})


def outcomes(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(step["backend"], step["outcome"]) for step in body["softcue"]["route"]]


def calibrate(store: Store, task: str, label: str, measure: str, threshold: float) -> None:
    store.registry.calibrate(
        Calibration(
            version=store.registry.version(task, label).digest, measure=measure, threshold=threshold, target=0.9,
            accuracy=0.95, accepted_share=0.5, rows=100, dataset="rows",
        ),
        ANONYMOUS,
    )  # fmt: skip


def cascade(store: Store, task: str, measure: str, threshold: float, **limits: Any) -> None:
    """`local` first, `acme` where that is not sure enough."""
    calibrate(store, task, "v1", measure, threshold)
    apply(store, task, {"kind": "cascade", "measure": measure, "first": LOCAL, "second": V2}, **limits)


async def counted(client: AsyncTestClient[Any], line: str) -> None:
    """Wait until the metrics have this line."""
    async with asyncio.timeout(10):
        while line not in (await client.get("/metrics")).text:  # noqa: ASYNC110 (it is asked for)
            await asyncio.sleep(0.001)  # the threads that are waited for need the interpreter
