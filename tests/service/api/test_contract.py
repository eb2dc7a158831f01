"""Our answers held against OpenAI's own API description."""

from __future__ import annotations

from typing import Any

from litestar.testing import AsyncTestClient
from referencing import Registry

from tests.openai_contract import check
from tests.service.serving import chunks

ASKED: dict[str, Any] = {"model": "intents", "messages": [{"role": "user", "content": "hello you"}]}


async def test_answers_have_openais_shapes(contract: Registry[Any], client: AsyncTestClient[Any]) -> None:
    chat = await client.post("/v1/chat/completions", json=ASKED)
    check(contract, "CreateChatCompletionResponse", chat.json())
    text = await client.post("/v1/completions", json={"model": "copy", "prompt": "a b"})
    check(contract, "CreateCompletionResponse", text.json())
    rich = await client.post("/v1/chat/completions", json={**ASKED, "n": 2, "logprobs": True, "top_logprobs": 2})
    check(contract, "CreateChatCompletionResponse", rich.json())
    several = await client.post("/v1/completions", json={"model": "copy", "prompt": ["a", "b"], "n": 2, "logprobs": 2})
    check(contract, "CreateCompletionResponse", several.json())
    models = await client.get("/v1/models")
    check(contract, "ListModelsResponse", models.json())
    check(contract, "Model", (await client.get("/v1/models/intents")).json())
    for refused in ({"model": "nope"}, {"n": 0}, {"messages": []}):
        error = await client.post("/v1/chat/completions", json={**ASKED, **refused})
        check(contract, "ErrorResponse", error.json())


async def test_every_chunk_of_a_stream_has_openais_shape(contract: Registry[Any], client: AsyncTestClient[Any]) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chat = await client.post("/v1/chat/completions", json={**ASKED, **options})
    for chunk in chunks(chat.text):
        check(contract, "CreateChatCompletionStreamResponse", chunk)
    rich = {"n": 2, "logprobs": True, "top_logprobs": 2}
    for chunk in chunks((await client.post("/v1/chat/completions", json={**ASKED, **options, **rich})).text):
        check(contract, "CreateChatCompletionStreamResponse", chunk)
    # The description has no null finish_reason for completions, which OpenAI's own streams send until the last chunk.
    text = await client.post("/v1/completions", json={"model": "copy", "prompt": "a b", "stream": True, "logprobs": 1})
    *before, last = chunks(text.text)
    assert all(chunk["choices"][0].pop("finish_reason") is None for chunk in before)
    for chunk in before:
        chunk["choices"][0]["finish_reason"] = "stop"
    for chunk in [*before, last]:
        check(contract, "CreateCompletionResponse", chunk)
