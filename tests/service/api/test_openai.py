from __future__ import annotations

import json
from typing import Any

import pytest
from litestar.testing import AsyncTestClient

from prompt_store.access import ANONYMOUS
from prompt_store.prompts.registry import BaseDescription, NewVersion
from prompt_store.prompts.task import Message
from prompt_store.prompts.version import TextPayload
from service.engines.base import Messages, RawText, TokenIds
from service.engines.errors import GenerationFailed, QueueFull
from service.engines.scripted import ScriptedEngine
from tests.conftest import random_prompt
from tests.service.serving import Store, client_of

HELLO = [{"role": "user", "content": "hello big world"}]


async def chat(client: AsyncTestClient[Any], model: str = "intents", **body: Any) -> Any:
    return await client.post("/v1/chat/completions", json={"model": model, "messages": HELLO, **body})


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def test_a_chat_completion_says_which_version_answered(client: AsyncTestClient[Any], store: Store) -> None:
    response = await chat(client)
    body = response.json()
    version = store.registry.version("intents", "v1")
    assert response.headers["x-softcue-version"] == "intents@v1"
    assert body["system_fingerprint"] == f"intents@v1:{version.digest[:12]}"
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "logprobs": None,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "hello big world", "refusal": None},
        }
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6, "virtual_tokens": 4}


async def test_a_stream_has_a_role_then_deltas_then_a_reason_then_usage(client: AsyncTestClient[Any]) -> None:
    response = await chat(client, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:4]] == ["hello", " big", " world"]
    assert (chunks[4]["choices"][0]["delta"], chunks[4]["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (chunks[5]["choices"], chunks[5]["usage"]["completion_tokens"]) == ([], 3)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_the_model_name_chooses_alias_number_digest_or_the_bare_base(
    client: AsyncTestClient[Any], engine: ScriptedEngine, store: Store
) -> None:
    digest = store.registry.version("intents", "v1").digest
    for model in ("intents", "intents@production", "intents@v1", f"intents@{digest[:12]}"):
        assert (await chat(client, model)).headers["x-softcue-version"] == "intents@v1"
    assert (await chat(client, "demo-base")).headers["x-softcue-version"] == "base"
    assert [request.soft_prompt is None for request in engine.requests] == [False] * 4 + [True]


async def test_the_tasks_sampling_holds_unless_the_request_says_otherwise(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    await chat(client, "copy")
    await chat(client, "copy", temperature=0, max_completion_tokens=5, seed=3, stop="x", top_k=7)
    first, second = (request.sampling for request in engine.requests)
    assert (first.temperature, first.top_p, first.max_tokens, first.stop) == (0.5, 0.9, 12, ("\n",))
    assert (second.temperature, second.top_p, second.max_tokens) == (0.0, 0.9, 5)
    assert (second.seed, second.stop, second.top_k) == (3, ("x",), 7)


async def test_parts_of_text_and_developer_messages_are_understood(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "you"}]
    await chat(client, messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}])
    assert engine.requests[0].prompt == Messages(
        (Message(role="system", content="be kind"), Message(role="user", content="hello you"))
    )


async def test_a_text_prompt_puts_its_instructions_before_the_conversation(
    store: Store, engine: ScriptedEngine
) -> None:
    system = Message(role="system", content="Name the intent.")
    store.publish("intents", TextPayload(messages=(system, Message(role="user", content="{message}"))))
    async with client_of(store, engine) as client:
        assert (await chat(client)).headers["x-softcue-version"] == "intents@v2"
    prompt = engine.requests[0].prompt
    assert isinstance(prompt, Messages)
    assert prompt.messages[0] == system
    assert engine.requests[0].soft_prompt is None


async def test_a_text_prompt_that_chat_cannot_render_is_refused_and_literal_braces_are_rendered(
    store: Store, engine: ScriptedEngine
) -> None:
    user = Message(role="user", content="{message}")
    fields = TextPayload(messages=(Message(role="system", content="About {message}."), user))
    store.publish("intents", fields, alias="fields")
    shots = (Message(role="user", content="{{hi}}"), Message(role="assistant", content="greeting"))
    store.publish("intents", TextPayload(messages=(*shots, user)), alias="shots")
    async with client_of(store, engine) as client:
        refused = await chat(client, "intents@fields")
        await chat(client, "intents@shots")
        raw = await client.post("/v1/completions", json={"model": "intents@shots", "prompt": "x"})
    assert (refused.status_code, raw.status_code) == (400, 400)
    assert "placeholders; ask it with inputs at /v1/tasks" in refused.json()["error"]["message"]
    (asked,) = engine.requests
    assert isinstance(asked.prompt, Messages)
    assert [message.content for message in asked.prompt.messages] == ["{hi}", "greeting", "hello big world"]


async def test_completions_continue_raw_text_or_token_ids(client: AsyncTestClient[Any], engine: ScriptedEngine) -> None:
    for prompt in ("once upon", [5, 6], ["once upon"], [[5, 6]]):
        response = await client.post("/v1/completions", json={"model": "copy", "prompt": prompt})
        assert response.json()["object"] == "text_completion"
    assert [request.prompt for request in engine.requests] == [RawText("once upon"), TokenIds((5, 6))] * 2
    stream = await client.post("/v1/completions", json={"model": "copy", "prompt": "a b", "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in events(stream.text)) == "a b"


async def test_models_lists_the_base_tasks_and_versions(client: AsyncTestClient[Any]) -> None:
    entries = {entry["id"]: entry for entry in (await client.get("/v1/models")).json()["data"]}
    assert list(entries) == ["demo-base", "copy", "copy@v1", "intents", "intents@v1", "query", "query@v1"]
    assert (entries["intents"]["root"], entries["intents"]["parent"]) == ("intents@v1", "demo-base")
    one = (await client.get("/v1/models/intents@production")).json()
    assert (one["id"], one["root"]) == ("intents@production", "intents@v1")


@pytest.mark.parametrize(
    ("body", "status", "code", "said"),
    [
        ({"model": "intent"}, 404, "model_not_found", "no task 'intent'; did you mean 'intents'"),
        ({"model": "intents@v9"}, 404, "model_not_found", "no version 'v9' of task 'intents'; did you mean 'v1'"),
        ({"model": "intents@prodution"}, 404, "model_not_found", "did you mean 'production'"),
        ({"model": "ft:gpt-4o-mini:acme::x"}, 404, "model_not_found", "no backend here serves 'ft:"),
        ({"model": "No Such!"}, 400, "invalid_name", "is not a model name"),
        ({"tool_choice": "required"}, 400, "invalid_value", "tool_choice needs tools"),
        ({"tool_choice": "some"}, 400, None, "tool_choice"),
        ({"functions": []}, 400, "unsupported_parameter", "functions is not served here, OpenAI replaced it"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, 400, "unsupported_parameter", "messages[0] is"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "calls no tools, only remote backends"),
        ({"n": 0}, 400, "invalid_value", "n is 0; it must be between 1 and 128"),
        ({"n": 129}, 400, "invalid_value", "n is 129"),
        ({"top_logprobs": 2}, 400, "invalid_value", "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "logprobs is 21; it must be between 0 and 20"),
        ({"prompt_logprobs": 1, "stream": True}, 400, "invalid_value", "leave stream or prompt_logprobs out"),
        ({"timeout_s": 0}, 400, None, "timeout_s"),
        ({"logit_bias": {"5": 101}}, 400, "invalid_value", "each between -100 and 100"),
        ({"max_tokens": 2**70}, 400, "invalid_value", "max_tokens is"),
        ({"reasoning_effort": "high"}, 400, "unsupported_parameter", "reasoning_effort"),
        ({"temperature": 9}, 400, "invalid_value", "temperature is 9.0; it must be between 0 and 2"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens is 0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "messages[0] is a tool's result"),
        ({"messages": [{"role": "function", "content": "x"}]}, 400, "unsupported_parameter", "messages[0] uses"),
        ({"messages": [{"role": "user", "tool_calls": [{}]}]}, 400, "invalid_value", "only an assistant calls tools"),
        ({"messages": [{"role": "user"}]}, 400, "invalid_value", "messages[0] has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "invalid_value", "without text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "unsupported_parameter", "image"),
        ({"messages": []}, 400, None, "messages:"),
        ({"temprature": 1}, 400, None, "temprature"),
        ({"temperature": "hot"}, 400, None, "temperature"),
    ],
)
async def test_bad_input_gets_openais_error_with_fact_and_place(
    client: AsyncTestClient[Any], body: dict[str, Any], status: int, code: str | None, said: str
) -> None:
    response = await client.post("/v1/chat/completions", json={"model": "intents", "messages": HELLO, **body})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("parameter", "asked"),
    [
        ("n", {"n": 2}),
        ("logprobs", {"logprobs": True}),
        ("prompt_logprobs", {"prompt_logprobs": 1}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("presence_penalty", {"presence_penalty": 0.1}),
        ("frequency_penalty", {"frequency_penalty": 0.1}),
        ("logit_bias", {"logit_bias": {"5": 1}}),
        ("stop_token_ids", {"stop_token_ids": [5]}),
        ("min_p", {"min_p": 0.1}),
    ],
)
async def test_what_a_backend_does_not_serve_is_refused_by_its_name(
    client: AsyncTestClient[Any], engine: ScriptedEngine, parameter: str, asked: dict[str, Any]
) -> None:
    engine.features = frozenset()
    error = (await chat(client, **asked)).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", parameter)
    assert f"{parameter} is not served by this task's backend; leave it out" in error["message"]
    assert engine.requests == []


async def test_malformed_bodies_and_unknown_paths_are_answered_in_the_same_shape(client: AsyncTestClient[Any]) -> None:
    broken = await client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    unknown = await client.get("/v1/nothing")
    wrong = await client.get("/v1/chat/completions")
    json_type = {"content-type": "application/json"}
    unreadable = [
        await client.post("/v1/chat/completions", content=body, headers=json_type)
        for body in (b"", b"[]", b'{"model": "\xff\xfe"}', b"[" * 100_000, b'{"model": "\\ud800"}')
    ]
    plain = await client.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert [response.status_code for response in (broken, unknown, wrong, plain)] == [400, 404, 405, 415]
    assert [response.status_code for response in unreadable] == [400] * 5
    for response in (broken, unknown, wrong, plain, *unreadable):
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_body_over_the_limit_is_refused(store: Store, engine: ScriptedEngine) -> None:
    async with client_of(store, engine, max_body_bytes=2000) as client:
        response = await chat(client, messages=[{"role": "user", "content": "x" * 3000}])
    assert response.status_code == 413
    assert engine.requests == []


async def test_engine_errors_become_statuses_before_a_stream_and_events_within_it(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    engine.script = lambda _: [QueueFull(7, 3.0)]
    refused = await chat(client, stream=True)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
    engine.script = lambda _: ["one", GenerationFailed("it broke")]
    midway = await chat(client, stream=True)
    assert midway.status_code == 200
    assert '"message":"it broke"' in midway.text
    assert "[DONE]" not in midway.text
    whole = await chat(client)
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "generation_failed")
    assert engine.running == set()


async def test_a_version_for_another_base_is_refused_and_not_warmed(store: Store, engine: ScriptedEngine) -> None:
    foreign = BaseDescription("e" * 64, "other", 64, 2, 512, 4096, "LlamaForCausalLM")
    store.registry.register_base(foreign, ANONYMOUS)
    new = NewVersion(task="intents", payload_content=random_prompt(0, 4, 64), base_fingerprint="e" * 64)
    store.registry.publish(new, "candidate", "", ANONYMOUS)
    async with client_of(store, engine) as client:
        assert random_prompt(0, 4, 64).digest not in engine.warmed
        assert (await chat(client)).status_code == 200


async def test_what_is_measured_names_task_and_version_and_no_user(client: AsyncTestClient[Any]) -> None:
    await chat(client, user="somebody")
    await chat(client, "intent")
    text = (await client.get("/metrics")).text
    labels = 'arm="",backend="local",outcome="stop",task="intents",version="v1"'
    assert f"softcue_requests_total{{{labels}}} 1.0" in text
    assert "softcue_completion_tokens_total{" in text
    assert 'softcue_engine_ready{backend="local"} 1.0' in text
    assert "somebody" not in text


async def test_the_log_has_one_line_a_request_and_no_text(
    client: AsyncTestClient[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "softcue.requests"):
        await chat(client)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "softcue.requests"]
    logged = json.loads(line)
    assert (logged["task"], logged["version"], logged["outcome"], logged["completion_tokens"]) == (
        "intents", "v1", "stop", 3,
    )  # fmt: skip
    assert "world" not in line


async def test_the_api_is_described_under_schema(client: AsyncTestClient[Any]) -> None:
    document = (await client.get("/schema")).json()
    assert document["openapi"].startswith("3.1")
    chat_responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "404", "429", "503"} <= set(chat_responses)
    for status in ("400", "404", "503"):
        assert chat_responses[status]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorBody")
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health/live", "/metrics"} <= set(
        document["paths"]
    )
