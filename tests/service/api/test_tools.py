"""Tools, and what else only a provider understands, passed through `/v1/chat/completions`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from litestar.testing import AsyncTestClient
from pydantic import BaseModel
from referencing import Registry

from prompt_store.prompts.task import Message
from prompt_store.prompts.version import TextPayload
from service.engines.base import Delta, Finish, GenerationEvent, GenerationRequest, Messages, ToolCallPiece, Usage
from service.engines.scripted import FEATURES, ScriptedEngine
from tests.openai_contract import check
from tests.service.serving import Store, chunks, client_of, listening

REMOTE = FEATURES | {"tools", "rich_messages", "provider_options"}
ASKED: dict[str, Any] = {"model": "intents", "messages": [{"role": "user", "content": "how warm is it in Rome"}]}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "temperature",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def calling(*calls: tuple[str, str, str]) -> Iterator[GenerationEvent]:
    """Tool calls by id, name and arguments, each in three pieces."""
    for index, (call_id, name, arguments) in enumerate(calls):
        half = len(arguments) // 2
        yield Delta("", tool_calls=(ToolCallPiece(index, "", call_id, name),))
        yield Delta("", tool_calls=(ToolCallPiece(index, arguments[:half]),))
        yield Delta("", tool_calls=(ToolCallPiece(index, arguments[half:]),))
    yield Delta("", finish_reason="tool_calls")
    yield Finish("tool_calls", Usage(7, 5, 0, cached_prompt_tokens=4))


def weather(request: GenerationRequest) -> Iterator[str | GenerationEvent]:
    """Asks for the temperatures of two cities, and says them when it has them."""
    assert isinstance(request.prompt, Messages)
    results = [str(message["content"]) for message in request.prompt.wire if message["role"] == "tool"]
    if results:
        yield f"Rome has {', Oslo '.join(results)} degrees."
    else:
        yield from calling(("call_1", "temperature", '{"city": "Rome"}'), ("call_2", "temperature", '{"city": "Oslo"}'))


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(weather, features=REMOTE)


@pytest.fixture
def official(store: Store, engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    with listening(store, engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_completes_a_loop_of_tool_calls(official: openai.OpenAI, engine: ScriptedEngine) -> None:
    degrees = {"Rome": "24", "Oslo": "9"}
    messages: list[Any] = list(ASKED["messages"])
    answer = official.chat.completions.create(model="intents", messages=messages, tools=TOOLS, tool_choice="required")
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    messages.append(choice.message)
    for call in choice.message.tool_calls or []:
        assert call.type == "function"
        city = json.loads(call.function.arguments)["city"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": degrees[city]})
    last = official.chat.completions.create(
        model="intents", messages=messages, tools=TOOLS, parallel_tool_calls=False, tool_choice="auto"
    )
    assert last.choices[0].message.content == "Rome has 24, Oslo 9 degrees."
    first, second = engine.requests
    assert (first.tools, first.tool_choice, first.parallel_tool_calls) == (tuple(TOOLS), "required", None)
    assert (second.tool_choice, second.parallel_tool_calls) == ("auto", False)
    assert isinstance(second.prompt, Messages)
    calls = [
        {
            "id": f"call_{n}",
            "type": "function",
            "function": {"name": "temperature", "arguments": f'{{"city": "{city}"}}'},
        }
        for n, city in enumerate(degrees, 1)
    ]
    assert second.prompt.wire[1] == {"role": "assistant", "tool_calls": calls}
    assert second.prompt.wire[2] == {"role": "tool", "tool_call_id": "call_1", "content": "24"}


def test_the_official_streaming_helper_assembles_tool_calls(official: openai.OpenAI) -> None:
    class Temperature(BaseModel):
        city: str

    tool = openai.pydantic_function_tool(Temperature, name="temperature")
    with official.chat.completions.stream(**ASKED, tools=[tool], stream_options={"include_usage": True}) as stream:
        seen = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        answer = stream.get_final_completion()
    assert [(event.index, event.parsed_arguments) for event in seen] == [
        (0, Temperature(city="Rome")),
        (1, Temperature(city="Oslo")),
    ]
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert [call.id for call in choice.message.tool_calls or []] == ["call_1", "call_2"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_the_official_streaming_helper_assembles_a_refusal(official: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = lambda _: [
        Delta("", refusal="I "),
        Delta("", refusal="won't."),
        Delta("", finish_reason="content_filter"),
        Finish("content_filter", Usage(1, 2)),
    ]
    with official.chat.completions.stream(**ASKED) as stream:
        assert [event.delta for event in stream if event.type == "refusal.delta"] == ["I ", "won't."]
    whole = official.chat.completions.create(**ASKED).choices[0]
    assert (whole.message.refusal, whole.message.content, whole.finish_reason) == ("I won't.", None, "content_filter")


async def test_answers_with_tool_calls_have_openais_shape(
    contract: Registry[Any], client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    whole = await client.post("/v1/chat/completions", json={**ASKED, "tools": TOOLS})
    check(contract, "CreateChatCompletionResponse", whole.json())
    assert whole.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = await client.post("/v1/chat/completions", json={**ASKED, **options, "tools": TOOLS})
    for chunk in chunks(stream.text):
        check(contract, "CreateChatCompletionStreamResponse", chunk)


RICH = [
    {"role": "user", "name": "ann", "content": "hi"},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
    {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}]},
    {"role": "tool", "tool_call_id": "c", "content": "9"},
    {"role": "assistant", "refusal": "no"},
    {"role": "assistant", "audio": {"id": "audio_1"}},
]


@pytest.mark.parametrize("message", RICH, ids=["name", "image", "tool calls", "tool result", "refusal", "audio"])
async def test_a_message_that_holds_more_than_text_goes_to_a_provider_as_it_came_and_to_no_other_backend(
    client: AsyncTestClient[Any], engine: ScriptedEngine, message: dict[str, Any]
) -> None:
    engine.script = lambda _: ["ok"]
    body = {"model": "intents", "messages": [{"role": "developer", "content": "be kind"}, message]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    prompt = engine.requests[0].prompt
    assert isinstance(prompt, Messages)
    assert prompt.wire == tuple(body["messages"])
    engine.features = FEATURES
    refused = await client.post("/v1/chat/completions", json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "messages[1]")
    assert "messages[1] is not served by this task's backend; it takes roles and texts alone" in error["message"]


async def test_a_text_prompt_stands_before_a_rich_conversation_too(store: Store, engine: ScriptedEngine) -> None:
    system = Message(role="system", content="Name the intent.")
    store.publish("intents", TextPayload(messages=(system, Message(role="user", content="{message}"))))
    engine.script = lambda _: ["ok"]
    async with client_of(store, engine) as client:
        assert (await client.post("/v1/chat/completions", json={"model": "intents", "messages": RICH})).is_success
    prompt = engine.requests[0].prompt
    assert isinstance(prompt, Messages)
    assert prompt.wire == ({"role": "system", "content": "Name the intent."}, *RICH)


OPTIONS: dict[str, Any] = {
    "reasoning_effort": "high",
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
}
HARMLESS = {"service_tier": "flex", "prompt_cache_key": "k", "prompt_cache_retention": "24h"}


@pytest.mark.parametrize("name", OPTIONS)
async def test_a_providers_option_is_passed_on_or_refused_by_its_name(
    client: AsyncTestClient[Any], engine: ScriptedEngine, name: str
) -> None:
    engine.script = lambda _: ["ok"]
    body = {**ASKED, name: OPTIONS[name]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert engine.requests[0].provider_options == {name: OPTIONS[name]}
    engine.features = FEATURES
    error = (await client.post("/v1/chat/completions", json=body)).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)


@pytest.mark.parametrize("features", [REMOTE, FEATURES], ids=["a provider", "another backend"])
async def test_what_changes_nothing_of_an_answer_is_served_by_every_backend(
    client: AsyncTestClient[Any], engine: ScriptedEngine, features: frozenset[str]
) -> None:
    engine.script = lambda _: ["ok"]
    engine.features = features
    answer = await client.post("/v1/chat/completions", json={**ASKED, **HARMLESS, "modalities": ["text"]})
    assert answer.status_code == 200
    assert engine.requests[0].provider_options == HARMLESS
