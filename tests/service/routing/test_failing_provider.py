"""Many requests against a provider that fails in every way it can, behind a route with a fallback.

SOFTCUE_REQUESTS says how many; `make slow-failing-provider` asks 10,000.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from prompt_store.access import ANONYMOUS
from prompt_store.routing.routes import parse_task_route
from service.engines.base import GenerationRequest, Messages
from service.engines.base_model import BaseModel
from service.engines.scripted import ScriptedEngine
from tests.providers import (
    DONE,
    HALF_CLOSE,
    HANG_UP,
    RESET,
    STREAM_END,
    UNTIL_LEFT,
    Answer,
    Asked,
    ScriptedProvider,
    error_answer,
    event,
    json_answer,
    stream_head,
    text_answer,
    whole,
)
from tests.service.routing.routed import LOCAL, V2, apply, publish_remote
from tests.service.serving import filled, listening

REQUESTS = int(os.environ.get("SOFTCUE_REQUESTS", "600"))
AT_ONCE = 32
FAILING = 0.3
KINDS = (
    "500", "429", "429 without a wait", "hang up", "reset", "silent", "falls silent", "no json", "html", "cut off",
    "half closed", "refused",
)  # fmt: skip
V3 = {"kind": "direct", "version": "v3"}
ENDS = {"cut off": HANG_UP, "half closed": HALF_CLOSE, "falls silent": UNTIL_LEFT}


async def test_every_request_ends_in_exactly_one_way(tmp_path: Path, base: BaseModel) -> None:
    draw = random.Random(5)
    played: Counter[str] = Counter()

    def play(asked: Asked) -> Answer:
        if asked.method == "GET":  # when the model goes away, it is asked
            return error_answer(404)
        kind = draw.choice(KINDS) if draw.random() < FAILING else "answer"
        played[kind] += 1
        return answer(asked, kind)

    store = filled(tmp_path / "softcue.db", base)
    publish_remote(store, "copy")
    publish_remote(store, "copy", provider="impostor")
    async with ScriptedProvider(play) as provider, ScriptedProvider(play, tls=True) as impostor:
        settings = {
            "kind": "openai_compatible",
            "url": provider.url,
            "first_byte_s": 0.3,
            "between_bytes_s": 0.3,
            "retries": {"attempts": 2, "first_backoff_s": 0.001, "max_retry_after_s": 0.001},
            "breaker": {"consecutive": 1000, "failure_share": 1.0},
        }
        remote = {"acme": settings, "impostor": {**settings, "url": impostor.url}}
        with listening(store, ScriptedEngine(near), remote=remote) as url:
            route = parse_task_route({"route": {"kind": "fallback", "routes": [V2, V3, LOCAL]}, "deadline_s": 20})
            store.registry.apply_route("copy", route, ANONYMOUS)
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                await until_routed(client)
                before = await ended(client)
                turns = asyncio.Semaphore(AT_ONCE)

                async def one(number: int) -> str:
                    async with turns:
                        return await ask(client, number, stream=number % 2 == 0)

                ends = Counter(await asyncio.gather(*map(one, range(REQUESTS))))
                counted = await ended(client) - before
                metrics = (await client.get("/metrics")).text
    store.registry.database.close()
    assert 'softcue_route_steps_total{backend="impostor",outcome="failed",task="copy",version="v3"}' in metrics
    assert impostor.requests == []  # its certificate is not trusted
    assert ends.total() == REQUESTS
    assert set(ends) <= {"far", "near", "broke off"}
    assert min(ends["far"], ends["near"], ends["broke off"]) > 0
    assert counted == Counter({"stop": ends["far"] + ends["near"], "error": ends["broke off"]})
    assert played.total() == sum(asked.method == "POST" for asked in provider.requests)
    assert set(played) == {"answer", *KINDS}


async def test_a_provider_that_hangs_is_left_in_time_for_the_next(tmp_path: Path, base: BaseModel) -> None:
    store = filled(tmp_path / "softcue.db", base)
    publish_remote(store, "copy")
    async with ScriptedProvider([[UNTIL_LEFT]]) as provider:
        remote = {"acme": {"kind": "openai_compatible", "url": provider.url}}
        apply(store, "copy", {"kind": "fallback", "routes": [V2, LOCAL]}, deadline_s=0.6)
        with listening(store, ScriptedEngine(near), remote=remote) as url:
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                assert [await ask(client, 7, stream=stream) for stream in (False, True)] == ["near", "near"]
        async with asyncio.timeout(10):
            for asked in provider.requests:
                await asked.left.wait()
    store.registry.database.close()
    assert [asked.method for asked in provider.requests].count("POST") == 2


async def until_routed(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(20):
        while await ask(client, 0, stream=False) != "far":  # noqa: ASYNC110 (the route is on its way)
            await asyncio.sleep(0.001)  # the threads that are waited for need the interpreter


async def ask(client: httpx.AsyncClient, number: int, *, stream: bool) -> str:
    """How a request ended: all of one backend's answer, or its beginning and an error. Fails on anything else."""
    body = {"model": "copy", "messages": [{"role": "user", "content": f"{number}"}], "stream": stream}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    if not stream:
        text = response.json()["choices"][0]["message"]["content"]
    else:
        *events, last = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        documents = [json.loads(each) for each in events]
        text = "".join(
            choice["delta"].get("content") or "" for document in documents for choice in document.get("choices", ())
        )
        if last != "[DONE]":
            error = json.loads(last)["error"]
            assert error["code"] in ("provider_misbehaved", "provider_unavailable")
            assert f"request id is req-{number})" in error["message"]
            assert f"far {number} an answer".startswith(text)
            return "broke off"
    backend = response.headers["x-softcue-backend"]
    assert text == {"acme": f"far {number} an answer", "local": f"near {number}"}[backend]
    return {"acme": "far", "local": "near"}[backend]


async def ended(client: httpx.AsyncClient) -> Counter[str]:
    """What the service has counted, by outcome."""
    found: Counter[str] = Counter()
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith("softcue_requests_total{"):
            labels, value = line.rsplit(" ", 1)
            found[labels.partition('outcome="')[2].partition('"')[0]] += int(float(value))
    return found


def near(request: GenerationRequest) -> list[str]:
    assert isinstance(request.prompt, Messages)
    return [f"near {request.prompt.messages[-1].content}"]


def answer(asked: Asked, kind: str) -> Answer:
    body = asked.document()
    number = body["messages"][-1]["content"]
    texts = [f"far {number}", " an", " answer"]
    match kind:
        case "500":
            return error_answer(500)
        case "429":
            return error_answer(429, headers={"retry-after": "7"})
        case "429 without a wait":
            return error_answer(429)
        case "silent":
            return [UNTIL_LEFT]
        case "hang up":
            return [HANG_UP]
        case "reset":
            return [RESET]
        case "no json":
            return [whole(b'{"choices": [', content_type="application/json")]
        case "html":
            return text_answer("<html>Bad gateway</html>")
        case "refused":
            return error_answer(400, "no", kind="invalid_request_error")
    if body.get("stream"):
        pieces = [stream_head({"x-request-id": f"req-{number}"}), *(event(chunk(text)) for text in texts)]
        if kind == "answer":
            last: dict[str, Any] = {
                "choices": [],
                "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
            }
            return [*pieces, event(chunk(None, "stop")), event(last), DONE, STREAM_END]
        return [*pieces[:3], ENDS[kind]]
    message = {"role": "assistant", "content": "".join(texts), "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    document = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    if kind == "answer":
        return json_answer(document)
    encoded = whole(json.dumps(document).encode())
    return [encoded[: len(encoded) // 2], ENDS[kind]]


def chunk(text: str | None, reason: str | None = None) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
