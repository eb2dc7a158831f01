"""A provider's answers through our own `/v1` endpoints, as the official client reads them there and at the provider."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest

from prompt_store.access import ANONYMOUS
from prompt_store.prompts.registry import NewVersion
from prompt_store.prompts.version import RemoteModelPayload
from service.engines.base_model import BaseModel
from service.engines.scripted import ScriptedEngine
from tests.providers import Answer, Asked, ScriptedProvider, event_stream, json_answer
from tests.service.engines.remote.answers import USAGE, chat, choice, chunk, completion, piece, token
from tests.service.serving import COPY, INTENTS, QUERY, filled, listening

T = TypeVar("T")
MESSAGES: Any = [{"role": "user", "content": "say hello"}]
TOKENS = [token("Hel", -0.25, Hel=-0.25, Hal=-2.0), {**token("lo", -0.5, lo=-0.5, ló=-3.0), "bytes": None}]
LABEL_TOKENS = [
    token('{"choice":"', 0.0),
    token("track", math.log(0.7), track=math.log(0.7), get=math.log(0.2), greeting=math.log(0.1)),
    token(' order"}', 0.0),
]
COMPLETION_LOGPROBS = {
    "tokens": ["Hel", "lo"],
    "token_logprobs": [-0.25, -0.5],
    "top_logprobs": [{"Hel": -0.25, "Hal": -2.0}, {"lo": -0.5}],
    "text_offset": [0, 3],
}


def script(asked: Asked) -> Answer:
    """One answer for whatever is asked, in its form."""
    if asked.method == "GET":  # when its models retire
        return json_answer({"object": "list", "data": []})
    body = asked.document()
    if "prompt" in body:
        return json_answer(_completion())
    if "response_format" in body:
        return json_answer(chat(choice('{"choice":"track order"}', tokens=LABEL_TOKENS)))
    if not body.get("stream"):
        return json_answer(chat(choice("Hello", tokens=TOKENS)))
    texts = ("Hel", "lo")
    pieces = [chunk(piece(content=text, tokens=[entry])) for text, entry in zip(texts, TOKENS, strict=True)]
    return event_stream([*pieces, chunk(piece(reason="stop")), chunk(usage=USAGE)])


def _completion() -> dict[str, Any]:
    document = completion("Hello")
    document["choices"][0]["logprobs"] = COMPLETION_LOGPROBS
    return document


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with ScriptedProvider(script) as provider:
        yield provider


@pytest.fixture
async def ours(provider: ScriptedProvider, tmp_path: Path, base: BaseModel) -> AsyncIterator[str]:
    """A Softcue whose tasks are answered by a fine-tuned model at the provider."""
    store = filled(tmp_path / "store.db", base)
    for task in (INTENTS, COPY, QUERY):
        tuned = RemoteModelPayload(provider="remote", model=f"ft:{task['name']}")
        new = NewVersion(task=task["name"], payload_content=tuned, base_fingerprint=None)
        store.registry.publish(new, "production", "a test", ANONYMOUS)
    remote = {"remote": {"kind": "openai_compatible", "flavour": "openai", "url": provider.url}}
    with listening(store, ScriptedEngine(), remote=remote) as url:
        yield f"{url}/v1"
    store.registry.database.close()


async def asked_of(url: str, call: Callable[[openai.OpenAI], T]) -> T:
    def ask() -> T:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return call(client)

    return await asyncio.to_thread(ask)


async def of_both(ours: str, provider: ScriptedProvider, call: Callable[[openai.OpenAI, str], T]) -> tuple[T, T]:
    """The same asked of us by the task's name, and of the provider by its model's."""
    return (
        await asked_of(ours, lambda client: call(client, "copy")),
        await asked_of(provider.url, lambda client: call(client, "ft:copy")),
    )


def posted(provider: ScriptedProvider) -> list[Any]:
    return [asked.document() for asked in provider.requests if asked.method == "POST"]


def plain(logprobs: Any) -> Any:
    """Log-probabilities as values; a provider may leave bytes out, which we do not."""
    document = logprobs.model_dump(exclude={"refusal", "text_offset"})
    for entry in document.get("content") or ():
        entry["bytes"] = list(entry["token"].encode())
    return document


async def test_chat_answers_are_the_providers_with_their_log_probabilities(
    ours: str, provider: ScriptedProvider
) -> None:
    def call(client: openai.OpenAI, model: str) -> Any:
        return client.chat.completions.create(model=model, messages=MESSAGES, logprobs=True, top_logprobs=2)

    mine, theirs = await of_both(ours, provider, call)
    assert mine.choices[0].message.content == theirs.choices[0].message.content == "Hello"
    assert plain(mine.choices[0].logprobs) == plain(theirs.choices[0].logprobs)
    assert (mine.usage.prompt_tokens, mine.usage.completion_tokens) == (19, 4)
    assert mine.usage.prompt_tokens_details.cached_tokens == 16
    first, second = posted(provider)
    assert (first["model"], first["top_logprobs"]) == (second["model"], second["top_logprobs"]) == ("ft:copy", 2)


async def test_streamed_chat_answers_are_the_providers_with_their_log_probabilities(
    ours: str, provider: ScriptedProvider
) -> None:
    def call(client: openai.OpenAI, model: str) -> list[Any]:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        return list(
            client.chat.completions.create(model=model, messages=MESSAGES, logprobs=True, top_logprobs=2, **options)
        )

    mine, theirs = await of_both(ours, provider, call)

    def said(parts: list[Any]) -> list[Any]:
        choices = [part.choices[0] for part in parts if part.choices]
        return [(one.delta.content, plain(one.logprobs)) for one in choices if one.delta.content]

    assert said(mine) == said(theirs)
    assert [part.choices[0].finish_reason for part in mine if part.choices][-1] == "stop"
    assert mine[-1].usage.prompt_tokens == theirs[-1].usage.prompt_tokens == 19


async def test_completions_are_the_providers_with_their_log_probabilities(
    ours: str, provider: ScriptedProvider
) -> None:
    mine, theirs = await of_both(
        ours, provider, lambda client, model: client.completions.create(model=model, prompt="say", logprobs=2)
    )
    assert mine.choices[0].text == theirs.choices[0].text == "Hello"
    assert mine.choices[0].logprobs is not None
    assert theirs.choices[0].logprobs is not None
    assert mine.choices[0].logprobs == theirs.choices[0].logprobs


async def test_responses_have_the_providers_text_and_log_probabilities(ours: str) -> None:
    response = await asked_of(
        ours,
        lambda client: client.responses.create(
            model="copy", input="say hello", include=["message.output_text.logprobs"], top_logprobs=2
        ),
    )
    assert response.output_text == "Hello"
    (message,) = response.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert [(entry.token, entry.logprob) for entry in part.logprobs] == [("Hel", -0.25), ("lo", -0.5)]
    assert [other.token for other in part.logprobs[1].top_logprobs] == ["lo", "ló"]
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens) == (19, 16)


async def test_a_task_is_generated_and_classified_by_the_provider(ours: str, provider: ScriptedProvider) -> None:
    async with httpx.AsyncClient(base_url=ours) as client:
        inputs = {"inputs": {"product": "car", "colour": "red"}, "confidence": ["mean_logprob"]}
        generated = (await client.post("/tasks/copy/generate", json=inputs)).json()
        classified = (await client.post("/tasks/intents/classify", json={"inputs": {"message": "where"}})).json()
    assert generated["text"] == "Hello"
    assert generated["confidence"]["mean_logprob"] == (-0.25 - 0.5) / 2
    assert {one["label"]: one["probability"] for one in classified["labels"]} == {
        "track order": pytest.approx(0.7),
        "get refund": pytest.approx(0.2),
        "greeting": pytest.approx(0.1),
    }
    assert posted(provider)[0]["messages"] == [{"role": "user", "content": "red car"}]


async def test_an_extract_task_sends_its_schema_and_has_an_invalid_answer_repaired_once(
    ours: str, provider: ScriptedProvider
) -> None:
    said = iter(['{"table": 3}', '{"table": "sales"}', "no JSON", "none again"])
    provider.script = lambda asked: script(asked) if asked.method == "GET" else json_answer(chat(choice(next(said))))
    async with httpx.AsyncClient(base_url=ours) as client:
        inputs = {"inputs": {"question": "what was sold"}}
        repaired = (await client.post("/tasks/query/generate", json=inputs)).json()
        first, second = posted(provider)
        given_up = (await client.post("/tasks/query/generate", json=inputs)).json()
    assert (repaired["parsed"], repaired["invalid"]) == ({"table": "sales"}, None)
    assert first["response_format"]["json_schema"]["schema"] == QUERY["json_schema"]
    assert second["response_format"] == first["response_format"]
    assert first["messages"] == [{"role": "user", "content": "what was sold"}]
    assert second["messages"][0] == first["messages"][0]
    assert second["messages"][1] == {"role": "assistant", "content": '{"table": 3}'}
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert "3 is not of type 'string'" in second["messages"][2]["content"]
    assert (given_up["parsed"], len(posted(provider))) == (None, 4)
    assert "not JSON" in given_up["invalid"]
