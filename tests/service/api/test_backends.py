"""Backends over HTTP: what is shown of them, addresses drained, and when the models behind them go away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import date
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from referencing import Registry

from prompt_store.access import ANONYMOUS
from prompt_store.prompts.registry import NewVersion
from prompt_store.prompts.version import RemoteModelPayload
from service.engines.remote.flavours import FLAVOURS
from service.engines.remote.openai_compatible import OpenAICompatibleEngine
from service.engines.remote.options import TransportOptions
from service.engines.remote.provider import Provider
from service.engines.scripted import ScriptedEngine
from service.routing.backends import Backend
from tests.openai_contract import check
from tests.providers import ScriptedProvider, error_answer, json_answer
from tests.service.serving import Store, listening

KEY = "sk-not-to-be-seen"


def answer(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


@pytest.fixture
async def addresses() -> AsyncIterator[list[ScriptedProvider]]:
    async with (
        ScriptedProvider([json_answer(answer("first"))]) as first,
        ScriptedProvider([json_answer(answer("second"))]) as second,
    ):
        yield [first, second]


@pytest.fixture
async def client(
    store: Store, engine: ScriptedEngine, addresses: list[ScriptedProvider]
) -> AsyncIterator[httpx.AsyncClient]:
    """The application with a backend at two addresses beside its own engine, and a version of a model there."""
    new = NewVersion(
        task="copy",
        payload_content=RemoteModelPayload(provider="openai", model="ft:gpt-4o-mini:acme::x"),
        shutdown_date=date(2027, 1, 6),
    )
    store.registry.publish(new, "tuned", "", ANONYMOUS)
    options = TransportOptions(tuple(one.url for one in addresses), key=SecretStr(KEY))
    provider = Provider(options)
    remote = OpenAICompatibleEngine(provider, FLAVOURS["openai"], default_model="gpt-5-mini")
    away = Backend(
        "away", remote, "openai_compatible", provider="openai", default_model="gpt-5-mini", transport=provider
    )
    with listening(store, engine, backends=[away]) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            yield client


async def ask(client: httpx.AsyncClient) -> str:
    body = {"model": "copy@tuned", "messages": [{"role": "user", "content": "hi"}]}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


async def shown(client: httpx.AsyncClient) -> dict[str, Any]:
    response = await client.get("/v1/backends")
    assert KEY not in response.text
    return {backend["name"]: backend for backend in response.json()["data"]}


async def drain(client: httpx.AsyncClient, url: str, drained: bool = True, name: str = "away") -> Any:
    return await client.post(f"/v1/backends/{name}/replicas", json={"url": url, "drained": drained})


async def test_backends_say_what_they_serve_and_how_they_fare(
    client: httpx.AsyncClient, addresses: list[ScriptedProvider]
) -> None:
    backends = await shown(client)
    assert list(backends) == ["local", "away"]
    local, away = backends.values()
    assert (local["kind"], local["replicas"], local["ready"]) == ("local", [], True)
    assert local["payload_kinds"] == ["prefix", "soft_prompt", "text"]
    assert (away["kind"], away["provider"], away["default_model"]) == ("openai_compatible", "openai", "gpt-5-mini")
    assert away["payload_kinds"] == ["remote_model", "text"]
    assert {"tools", "rich_messages", "provider_options"} <= set(away["features"])
    assert (away["breaker"], away["retries"], away["failures"]) == ("closed", 0, 0)
    assert away["replicas"] == [
        {"url": address.url, "healthy": True, "drained": False, "running": 0} for address in addresses
    ]


async def test_failed_attempts_are_counted(client: httpx.AsyncClient, addresses: list[ScriptedProvider]) -> None:
    for address in addresses:
        address.script = lambda _: error_answer(400)
    body = {"model": "copy@tuned", "messages": [{"role": "user", "content": "hi"}]}
    refused = await client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert (await shown(client))["away"]["failures"] == 1


async def test_a_drained_address_gets_nothing_until_it_is_put_back(
    client: httpx.AsyncClient, addresses: list[ScriptedProvider]
) -> None:
    first, second = addresses
    drained = (await drain(client, first.url)).json()
    assert [(one["drained"], one["healthy"]) for one in drained["replicas"]] == [(True, False), (False, True)]
    assert [await ask(client) for _ in range(3)] == ["second"] * 3
    assert first.requests == []
    await drain(client, first.url, drained=False)
    await drain(client, second.url)
    assert await ask(client) == "first"
    await drain(client, first.url)
    body = {"model": "copy@tuned", "messages": [{"role": "user", "content": "hi"}]}
    refused = await client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 503
    assert "every address of the backend is drained" in refused.json()["error"]["message"]


async def test_only_what_is_there_is_drained(client: httpx.AsyncClient, addresses: list[ScriptedProvider]) -> None:
    cases = [
        (await drain(client, "http://127.0.0.1:1/v1"), "replica_not_found", addresses[0].url),
        (await drain(client, addresses[0].url, name="local"), "replica_not_found", "it runs on this machine"),
        (await drain(client, addresses[0].url, name="awya"), "backend_not_found", "did you mean 'away'?"),
    ]
    for response, code, said in cases:
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, code)
        assert said in error["message"]
    assert not any(one["drained"] for one in (await shown(client))["away"]["replicas"])


async def test_models_at_a_provider_say_when_they_go_away(contract: Registry[Any], client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    check(contract, "ListModelsResponse", listed)
    dates = {entry["id"]: entry["shutdown_date"] for entry in listed["data"] if "shutdown_date" in entry}
    assert dates == {"copy@v2": "2027-01-06"}
    named = (await client.get("/v1/models/copy@tuned")).json()
    assert named["shutdown_date"] == "2027-01-06"
    assert named["parent"] == "ft:gpt-4o-mini:acme::x"
    check(contract, "Model", named)
