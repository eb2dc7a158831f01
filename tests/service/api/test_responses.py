"""`/v1/responses` by the official client over a socket, and each body and event held against OpenAI's description."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from litestar.testing import AsyncTestClient
from pydantic import BaseModel
from referencing import Registry

from prompt_store.prompts.task import Message
from service.engines.base import Delta, Finish, Messages, ResponseFormat, ToolCallPiece, Usage
from service.engines.errors import GenerationFailed, InvalidRequest, ProviderRateLimited, QueueFull
from service.engines.scripted import FEATURES, ScriptedEngine
from tests.openai_contract import check
from tests.service.api.test_tools import REMOTE, calling
from tests.service.serving import Store, listening

ASKED: dict[str, Any] = {"model": "intents", "input": "hello big world"}
TOOLS: Any = [
    {"type": "function", "name": "temperature", "parameters": {"type": "object"}, "strict": True, "description": "in C"}
]


@pytest.fixture
def official(store: Store, engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    with listening(store, engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def respond(client: AsyncTestClient[Any], **body: Any) -> Any:
    return await client.post("/v1/responses", json={**ASKED, **body})


def events(text: str) -> list[Any]:
    """The events of a stream. Each is named as its type says, and they are numbered from 0."""
    found = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_the_official_client_gets_a_response(official: openai.OpenAI, store: Store) -> None:
    raw = official.responses.with_raw_response.create(**ASKED, metadata={"run": "7"}, user="ann")
    response = raw.parse()
    assert raw.headers["x-softcue-version"] == "intents@v1"
    assert response.output_text == "hello big world"
    assert (response.status, response.metadata, response.user) == ("completed", {"run": "7"}, "ann")
    assert response.id.startswith("resp_")
    (message,) = response.output
    assert (message.type, message.status) == ("message", "completed")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (3, 3, 6)
    assert response.model_extra is not None
    assert response.model_extra["store"] is False
    digest = store.registry.version("intents", "v1").digest
    assert response.model_extra["system_fingerprint"] == f"intents@v1:{digest[:12]}"
    assert response.usage.model_extra == {"virtual_tokens": 4}


def test_the_official_client_reads_the_stream(official: openai.OpenAI) -> None:
    stream = official.responses.create(**ASKED, stream=True)
    assert [event.type for event in stream] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_the_official_streaming_helper_assembles_the_response(official: openai.OpenAI) -> None:
    with official.responses.stream(**ASKED) as stream:
        assert [event.delta for event in stream if event.type == "response.output_text.delta"] == [
            "hello",
            " big",
            " world",
        ]
        response = stream.get_final_response()
    assert (response.output_text, response.status) == ("hello big world", "completed")


class Order(BaseModel):
    item: str
    count: int


def test_the_official_client_parses_an_answer_by_a_pydantic_model(
    official: openai.OpenAI, engine: ScriptedEngine
) -> None:
    engine.script = lambda _: ['{"item": ', '"bolt", "count": 3}']
    response = official.responses.parse(model="query", input="three bolts", text_format=Order)
    assert response.output_parsed == Order(item="bolt", count=3)
    with official.responses.stream(model="query", input="three bolts", text_format=Order) as stream:
        assert stream.get_final_response().output_parsed == Order(item="bolt", count=3)
    form = engine.requests[0].response_format
    assert form.kind == "json_schema"
    assert form.json_schema is not None
    assert set(form.json_schema["properties"]) == {"item", "count"}


def test_the_official_client_completes_a_loop_of_function_calls(
    official: openai.OpenAI, engine: ScriptedEngine
) -> None:
    engine.features = REMOTE
    engine.script = lambda _: ["Let me see.", *calling(("call_1", "temperature", '{"city": "Rome"}'))]
    conversation: list[Any] = [{"role": "user", "content": "how warm is it in Rome"}]
    response = official.responses.create(
        model="intents", input=conversation, tools=TOOLS, tool_choice={"type": "function", "name": "temperature"}
    )
    message, call = response.output
    assert (message.type, call.type, response.output_text) == ("message", "function_call", "Let me see.")
    assert (call.call_id, call.name, call.arguments) == ("call_1", "temperature", '{"city": "Rome"}')
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 4
    conversation += response.output
    conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": "24"})
    engine.script = lambda _: ["24 degrees"]
    last = official.responses.create(
        model="intents", input=conversation, tools=TOOLS, instructions="Be brief.", parallel_tool_calls=False
    )
    assert last.output_text == "24 degrees"
    first, second = engine.requests
    function = {"name": "temperature", "parameters": {"type": "object"}, "strict": True, "description": "in C"}
    assert first.tools == ({"type": "function", "function": function},)
    assert first.tool_choice == {"type": "function", "function": {"name": "temperature"}}
    assert (second.tool_choice, second.parallel_tool_calls) == (None, False)
    assert isinstance(second.prompt, Messages)
    called = {"name": "temperature", "arguments": '{"city": "Rome"}'}
    assert second.prompt.wire == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "how warm is it in Rome"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Let me see."}],
            "tool_calls": [{"id": "call_1", "type": "function", "function": called}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "24"},
    )


def test_the_official_streaming_helper_assembles_function_calls(
    official: openai.OpenAI, engine: ScriptedEngine
) -> None:
    engine.features = REMOTE
    engine.script = lambda _: ["So.", *calling(("a", "temperature", "{}"), ("b", "temperature", '{"x": 1}'))]
    with official.responses.stream(**ASKED, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    called = [item for item in response.output if item.type == "function_call"]
    assert [(call.call_id, call.arguments) for call in called] == [("a", "{}"), ("b", '{"x": 1}')]
    deltas = "response.function_call_arguments.delta"
    assert [kind for kind in kinds if kind != deltas] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


async def test_messages_and_parts_of_text_become_a_conversation(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    said = {"type": "output_text", "text": "Hi.", "annotations": [], "logprobs": []}
    parts = [{"type": "input_text", "text": text} for text in ("Hel", "lo")]
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": parts},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [said]},
        {"role": "user", "content": "Bye"},
    ]
    answer = await respond(client, input=items, instructions="Be brief.", temperature=0.3, top_p=0.5)
    assert answer.status_code == 200
    assert engine.requests[0].prompt == Messages(
        (
            Message(role="system", content="Be brief."),
            Message(role="system", content="Be kind."),
            Message(role="user", content="Hello"),
            Message(role="assistant", content="Hi."),
            Message(role="user", content="Bye"),
        )
    )
    body = answer.json()
    assert (body["instructions"], body["temperature"], body["top_p"]) == ("Be brief.", 0.3, 0.5)


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ({"type": "text"}, "text"),
        ({"type": "json_object"}, "json_object"),
        ({"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}, "json_schema"),
    ],
)
async def test_the_form_of_the_text_is_asked_of_the_backend_and_told_again(
    client: AsyncTestClient[Any], engine: ScriptedEngine, form: dict[str, Any], kind: Any
) -> None:
    body = (await respond(client, text={"format": form})).json()
    assert body["text"]["format"] == form
    assert engine.requests[0].response_format == ResponseFormat(kind, form.get("schema"))


async def test_log_probabilities_come_where_they_are_included(client: AsyncTestClient[Any]) -> None:
    included = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (message,) = (await respond(client, **included)).json()["output"]
    entries = message["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == ["hello", " big", " world"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 3
    streamed = events((await respond(client, **included, stream=True)).text)
    told = [entry for event in streamed if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert told == entries


async def test_effort_and_verbosity_are_a_providers_options(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    asked = {"reasoning": {"effort": "low"}, "text": {"verbosity": "high"}}
    error = (await respond(client, **asked)).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "reasoning_effort")
    engine.features = REMOTE
    body = (await respond(client, **asked, service_tier="flex")).json()
    assert (body["reasoning"]["effort"], body["text"]["verbosity"]) == ("low", "high")
    assert engine.requests[0].provider_options == {
        "reasoning_effort": "low",
        "verbosity": "high",
        "service_tier": "flex",
    }


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation as input"),
    ({"conversation": "conv_1"}, "conversation", "send the whole conversation as input"),
    ({"store": True}, "store", "set store to false"),
    ({"background": True}, "background", "leave background out"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "name a task as model"),
    ({"max_tool_calls": 3}, "max_tool_calls", "leave it out"),
    ({"truncation": "auto"}, "truncation", "send less"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "only reasoning.effort is"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "no tools are built in here"),
    ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, "tool_choice", "can name one function"),
    ({"tools": TOOLS}, "tools", "calls no tools, only remote backends"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content", "only text is served"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "of type 'item_reference'"),
    ({"input": [{"role": "user", "content": "x"}, {"type": "reasoning", "summary": []}]}, "input[1]", "'reasoning'"),
]  # fmt: skip
INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, "input", "give a text or messages"),
    ({"input": [{"role": "user"}]}, "input[0]", "needs role and content"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]", "needs call_id, name and arguments"),
    ({"input": [{"type": "function_call_output"}]}, "input[0]", "needs call_id and output"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content", "without text"),
    ({"tools": [{"type": "function"}]}, "tools[0]", "has no name"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"top_logprobs": 3}, "top_logprobs", "add 'message.output_text.logprobs' to include"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format", "without a schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, "text.format", "is not one at type"),
    ({"temperature": 9}, "temperature", "temperature is 9.0; it must be between 0 and 2"),
    ({"input": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]}, "input[0].content",
     "only an assistant says"),
    ({"input": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "input[0].content", "says in its refusal"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "asked", "parameter", "said"),
    [*(("unsupported_parameter", *case) for case in REFUSED), *(("invalid_value", *case) for case in INVALID)],
)
async def test_what_is_not_served_is_refused_by_its_name_with_a_remedy(
    contract: Registry[Any], client: AsyncTestClient[Any], code: str, asked: dict[str, Any], parameter: str, said: str
) -> None:
    response = await respond(client, **asked)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, parameter)
    assert said in error["message"]
    check(contract, "ErrorResponse", response.json())


@pytest.mark.parametrize(
    ("asked", "parameter", "said"),
    [
        ({"max_output_tokens": 2**31}, "max_output_tokens", "less than 2147483648"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.items.0.role", "'system', 'developer', 'user'"),
        ({"input": ["x"]}, "input.items.0", "valid dictionary"),
        ({"input": 3}, "input.items", "valid list"),
    ],
)
async def test_a_value_of_another_shape_is_refused_at_its_own_name(
    client: AsyncTestClient[Any], asked: dict[str, Any], parameter: str, said: str
) -> None:
    response = await respond(client, **asked)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, parameter)
    assert said in error["message"]


async def test_what_is_refused_before_a_stream_has_its_status(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    engine.script = lambda _: [QueueFull(7, 3.0)]
    refused = await respond(client, stream=True)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")


@pytest.mark.parametrize(
    ("error", "code", "failure"),
    [
        (GenerationFailed("it broke"), "generation_failed", "server_error"),
        (ProviderRateLimited("it waits", retry_after_s=1.0), "provider_rate_limited", "rate_limit_exceeded"),
        (InvalidRequest("it is wrong"), "invalid_value", "invalid_prompt"),
    ],
)
async def test_what_fails_midway_ends_in_an_error_and_a_failed_response(
    contract: Registry[Any],
    client: AsyncTestClient[Any],
    engine: ScriptedEngine,
    error: Any,
    code: str,
    failure: str,
) -> None:
    engine.script = lambda _: ["one", error]
    *before, told, failed = events((await respond(client, stream=True)).text)
    assert before[-1]["type"] == "response.output_text.delta"
    assert (told["type"], told["code"], told["message"]) == ("error", code, str(error))
    check(contract, "ResponseErrorEvent", told)
    check(contract, "ResponseFailedEvent", failed)
    assert failed["response"]["error"] == {"code": failure, "message": str(error)}
    assert (failed["response"]["status"], failed["response"]["output"][0]["status"]) == ("failed", "incomplete")
    assert engine.running == set()


SCRIPTS: dict[str, Callable[[], list[Any]]] = {
    "text": lambda: ["one", " two"],
    "nothing": list,
    "too long": lambda: list("abcdefghijkl"),
    "filtered": lambda: ["one", Delta("", finish_reason="content_filter"), Finish("content_filter", Usage(3, 1))],
    "refusal": lambda: ["Well. ", Delta("", refusal="I "), Delta("", refusal="won't.")],
    "calls": lambda: ["See.", *calling(("a", "f", "{}"), ("b", "g", "[1]"))],
    "calls in turn": lambda: [
        Delta("", tool_calls=(ToolCallPiece(0, "", "a", "f"), ToolCallPiece(1, "", "b", "g"))),
        Delta("", tool_calls=(ToolCallPiece(0, "{"), ToolCallPiece(1, "["))),
        Delta("", tool_calls=(ToolCallPiece(0, "}"), ToolCallPiece(1, "]"))),
        "Done.",
    ],
}
# The description's schema of each event.
SCHEMAS = {
    "response.created": "ResponseCreatedEvent",
    "response.in_progress": "ResponseInProgressEvent",
    "response.output_item.added": "ResponseOutputItemAddedEvent",
    "response.content_part.added": "ResponseContentPartAddedEvent",
    "response.output_text.delta": "ResponseTextDeltaEvent",
    "response.output_text.done": "ResponseTextDoneEvent",
    "response.refusal.delta": "ResponseRefusalDeltaEvent",
    "response.refusal.done": "ResponseRefusalDoneEvent",
    "response.function_call_arguments.delta": "ResponseFunctionCallArgumentsDeltaEvent",
    "response.function_call_arguments.done": "ResponseFunctionCallArgumentsDoneEvent",
    "response.content_part.done": "ResponseContentPartDoneEvent",
    "response.output_item.done": "ResponseOutputItemDoneEvent",
    "response.completed": "ResponseCompletedEvent",
    "response.incomplete": "ResponseIncompleteEvent",
}


def unnamed(response: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two answers to the same request."""
    items = [{key: value for key, value in item.items() if key != "id"} for item in response["output"]]
    own = ("id", "created_at", "completed_at", "softcue")
    return {key: value for key, value in response.items() if key not in own} | {"output": items}


@pytest.mark.parametrize("name", SCRIPTS)
async def test_every_response_and_event_has_openais_shape_and_a_stream_ends_as_the_whole_does(
    contract: Registry[Any], client: AsyncTestClient[Any], engine: ScriptedEngine, name: str
) -> None:
    engine.features = REMOTE
    engine.script = lambda _: SCRIPTS[name]()
    included = {"include": ["message.output_text.logprobs"], "top_logprobs": 1, "safety_identifier": "s"}
    asked = {
        **included,
        "tools": TOOLS,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "metadata": {"a": "b"},
    }
    whole = (await respond(client, **asked)).json()
    check(contract, "Response", whole)
    told = events((await respond(client, **asked, stream=True)).text)
    for event in told:
        check(contract, SCHEMAS[event["type"]], event)
    last = told[-1]["response"]
    assert [step["outcome"] for step in last["softcue"]["route"]] == ["answered"]
    done = {event["output_index"]: event["item"] for event in told if event["type"] == "response.output_item.done"}
    assert last["output"] == [done[index] for index in range(len(done))]
    if name != "calls in turn":  # of which the whole has the text first
        assert unnamed(last) == unnamed(whole)
    reasons = {"too long": "max_output_tokens", "filtered": "content_filter"}
    if name in reasons:
        assert whole["status"] == "incomplete"
        assert whole["incomplete_details"] == {"reason": reasons[name]}
        assert whole["output"][-1]["status"] == "incomplete"
    else:
        assert (whole["status"], whole["incomplete_details"]) == ("completed", None)


async def test_pieces_of_several_calls_are_put_together_by_their_places(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    engine.features = FEATURES | {"tools"}
    engine.script = lambda _: SCRIPTS["calls in turn"]()
    told = events((await respond(client, tools=TOOLS, stream=True)).text)
    first, second, message = told[-1]["response"]["output"]
    assert [(call["call_id"], call["arguments"]) for call in (first, second)] == [("a", "{}"), ("b", "[]")]
    assert message["content"][0]["text"] == "Done."
