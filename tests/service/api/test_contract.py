"""Our answers held against OpenAI's own API description."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from litestar.testing import AsyncTestClient
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.conftest import shared_file


def nullable(schema: Any) -> Any:
    """The description mixes in OpenAPI 3.0's `nullable`, which JSON Schema does not know."""
    if isinstance(schema, list):
        return [nullable(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: nullable(value) for key, value in schema.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") is True else plain


@pytest.fixture(scope="module")
def contract() -> Registry[Any]:
    file = shared_file("contracts", "openai-openapi.yaml")
    document = nullable(yaml.load(file.read_text("utf-8"), Loader=yaml.CSafeLoader))
    return Registry().with_resource("urn:openai", Resource(contents=document, specification=DRAFT202012))


def check(contract: Registry[Any], schema: str, body: Any) -> None:
    validator = Draft202012Validator({"$ref": f"urn:openai#/components/schemas/{schema}"}, registry=contract)
    problems = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(body)]
    assert not problems, problems


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


def chunks(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


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
