"""The official client as the oracle: what it sends for a call, and what it reads of an answer. No network."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import httpx2
import openai

CHUNKS = "text/event-stream"


def sent_by_client(call: Callable[[openai.OpenAI], object]) -> tuple[str, dict[str, Any]]:
    """The path under the base address, and the body, of the one request that `call` makes."""
    asked: list[httpx2.Request] = []

    def refuse(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(400, json={"error": {"message": "it is only looked at"}})

    with _client(refuse) as client, contextlib.suppress(openai.BadRequestError):  # the body is what is wanted
        call(client)
    (request,) = asked
    return request.url.path.removeprefix("/v1/"), json.loads(request.content)


def read_by_client(document: Any, endpoint: str = "chat/completions") -> Any:
    """A whole answer as the client gives it."""
    with _client(lambda _: httpx2.Response(200, json=document)) as client:
        if endpoint == "completions":
            return client.completions.create(model="m", prompt="p")
        return client.chat.completions.create(model="m", messages=[])


def streamed_by_client(documents: list[Any], endpoint: str = "chat/completions") -> list[Any]:
    """The chunks of a stream as the client gives them."""
    body = "".join(f"data: {json.dumps(document)}\n\n" for document in documents) + "data: [DONE]\n\n"
    with _client(lambda _: httpx2.Response(200, text=body, headers={"content-type": CHUNKS})) as client:
        if endpoint == "completions":
            return list(client.completions.create(model="m", prompt="p", stream=True))
        return list(client.chat.completions.create(model="m", messages=[], stream=True))


def _client(handler: Callable[[httpx2.Request], httpx2.Response]) -> openai.OpenAI:
    transport = openai.DefaultHttpx2Client(transport=httpx2.MockTransport(handler))
    return openai.OpenAI(api_key="none", base_url="http://provider.test/v1", max_retries=0, http_client=transport)
