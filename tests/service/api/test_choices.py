"""Several choices, log-probabilities, echoed prompts, several prompts, forms of answers, deadlines."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from litestar.testing import AsyncTestClient
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from service.api.response_formats import StructuredOutputsBody, response_format
from service.engines.base import Delta, GenerationRequest, RawText, ResponseFormat, TokenLogprob
from service.engines.errors import GenerationFailed, InvalidRequest
from service.engines.scripted import ScriptedEngine, echo
from tests.service.api.test_openai import HELLO, chat, events


async def complete(client: AsyncTestClient[Any], model: str = "demo-base", **body: Any) -> Any:
    return await client.post("/v1/completions", json={"model": model, **body})


def apart(request: GenerationRequest) -> list[Delta]:
    """Two choices that differ, the second of which ends first."""
    return [
        Delta("a", (1,)),
        Delta("x", (1,), 1, finish_reason="length"),
        Delta("b", (2,)),
        Delta("", (), finish_reason="stop"),
    ]


async def test_choices_keep_their_index_text_and_reason(client: AsyncTestClient[Any], engine: ScriptedEngine) -> None:
    engine.script = apart
    answer = ChatCompletion.model_validate((await chat(client, n=2)).json())
    assert [(one.index, one.message.content, one.finish_reason) for one in answer.choices] == [
        (0, "ab", "stop"),
        (1, "x", "length"),
    ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


async def test_streamed_choices_are_interleaved_and_each_ends_on_its_own(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    engine.script = apart
    stream = events((await chat(client, n=2, stream=True)).text)
    chunks = [ChatCompletionChunk.model_validate(chunk).choices[0] for chunk in stream]
    told = [(chunk.index, chunk.delta.role or chunk.delta.content, chunk.finish_reason) for chunk in chunks]
    assert told == [
        (0, "assistant", None),
        (1, "assistant", None),
        (0, "a", None),
        (1, "x", None),
        (1, None, "length"),
        (0, "b", None),
        (0, None, "stop"),
    ]


async def test_chat_logprobs_name_each_token_its_bytes_and_its_alternatives(client: AsyncTestClient[Any]) -> None:
    whole = (await chat(client, logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]
    assert whole["content"][1] == {
        "token": " big",
        "logprob": -0.25,
        "bytes": list(b" big"),
        "top_logprobs": [
            {"token": " big", "logprob": -0.25, "bytes": list(b" big")},
            {"token": " big~", "logprob": -1.25, "bytes": list(b" big~")},
        ],
    }
    stream = events((await chat(client, logprobs=True, top_logprobs=2, stream=True)).text)
    parts = [chunk["choices"][0]["logprobs"] for chunk in stream]
    assert [entry for part in parts if part is not None for entry in part["content"]] == whole["content"]
    assert (await chat(client, logprobs=True)).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_half_a_character_is_sent_with_its_bytes_before_its_text_is_there(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    half, rest = TokenLogprob(1, -1.0, text="\ufffd", data=b"\xc3"), TokenLogprob(2, -1.0, text="\ufffd", data=b"\xa9")
    last = TokenLogprob(3, -float("inf"), text="!", data=b"!")
    engine.script = lambda _: [
        Delta("", (1,), logprobs=(half,)),
        Delta("é", (2,), logprobs=(rest,)),
        Delta("!", (3,), logprobs=(last,)),
    ]
    stream = events((await chat(client, logprobs=True, stream=True)).text)
    content = [chunk["choices"][0]["logprobs"]["content"][0] for chunk in stream[1:4]]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [0x21]]
    assert content[2]["logprob"] == -9999.0
    whole = (await complete(client, prompt="x", logprobs=0)).json()["choices"][0]
    assert (whole["text"], whole["logprobs"]["text_offset"]) == ("é!", [0, 0, 1])


async def test_completions_logprobs_have_the_older_shape(client: AsyncTestClient[Any]) -> None:
    answer = (await complete(client, prompt="hello you", logprobs=2)).json()
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["hello", " you"],
        "token_logprobs": [-0.125, -0.25],
        "top_logprobs": [{"hello": -0.125, "hello~": -1.125}, {" you": -0.25, " you~": -1.25}],
        "text_offset": [0, 5],
    }
    assert Completion.model_validate(answer).choices[0].logprobs is not None


async def test_an_echoed_prompt_stands_before_each_choice_with_its_logprobs(client: AsyncTestClient[Any]) -> None:
    asked = {"prompt": "hello you", "echo": True, "logprobs": 1, "max_tokens": 1, "n": 2}
    for choice in (await complete(client, **asked)).json()["choices"]:
        assert choice["text"] == "hello youhello"
        assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.125]
        assert choice["logprobs"]["top_logprobs"] == [None, {" you": -0.25}, {"hello": -0.125}]
        assert choice["logprobs"]["text_offset"] == [0, 5, 9]
        assert choice["finish_reason"] == "length"
    plain = (await complete(client, prompt="hello you", echo=True)).json()["choices"][0]
    assert (plain["text"], plain["logprobs"]) == ("hello youhello you", None)
    tuned = (await complete(client, "copy", prompt="hello you", echo=True, logprobs=0)).json()["choices"][0]
    assert tuned["logprobs"]["token_logprobs"][0] == -0.125  # a soft prompt stands before the first token


async def test_a_streamed_echo_says_the_same_as_a_whole_one(client: AsyncTestClient[Any]) -> None:
    asked = {"prompt": ["hello you", "a b c"], "echo": True, "logprobs": 1, "n": 2}
    whole = (await complete(client, **asked)).json()["choices"]
    told: list[dict[str, Any]] = [{"text": "", "tokens": [], "text_offset": []} for _ in whole]
    for chunk in events((await complete(client, stream=True, **asked)).text):
        (choice,) = chunk["choices"]
        into = told[choice["index"]]
        into["text"] += choice["text"]
        for key in ("tokens", "text_offset"):
            into[key] += (choice["logprobs"] or {key: []})[key]
    assert told == [
        {key: choice["text"] if key == "text" else choice["logprobs"][key] for key in into}
        for choice, into in zip(whole, told, strict=True)
    ]


async def test_a_prompt_can_be_scored_without_an_answer(client: AsyncTestClient[Any]) -> None:
    scored = await complete(client, prompt="hello you", echo=True, logprobs=0, max_tokens=0)
    (choice,) = scored.json()["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("hello you", ["hello", " you"])
    assert scored.json()["usage"]["completion_tokens"] == 0
    assert choice["finish_reason"] == "length"
    assert (await complete(client, prompt="x", max_tokens=0)).status_code == 400


async def test_prompt_logprobs_have_vllms_shape(client: AsyncTestClient[Any]) -> None:
    expected = [None, {"2": {"logprob": -0.25, "rank": 1, "decoded_token": " you"}}]
    text = (await complete(client, prompt="hello you", prompt_logprobs=1)).json()
    assert text["choices"][0]["prompt_logprobs"] == expected
    assert text["choices"][0]["text"] == "hello you"
    conversation = (await chat(client, "demo-base", prompt_logprobs=0)).json()
    assert conversation["prompt_logprobs"][1] == {"2": {"logprob": -0.25, "rank": None, "decoded_token": " big"}}


async def test_each_prompt_of_several_has_its_answers_in_order_and_usage_is_summed(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    body = (await complete(client, prompt=["one", "two words"], n=2)).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "one"),
        (1, "one"),
        (2, "two words"),
        (3, "two words"),
    ]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 6)
    assert {request.prompt for request in engine.requests} == {RawText("one"), RawText("two words")}
    assert len({request.id for request in engine.requests}) == 2
    ids = (await complete(client, prompt=[[5, 6], [7]])).json()
    assert [choice["text"] for choice in ids["choices"]] == ["5 6", "7"]


async def test_several_prompts_stream_together_with_one_usage(client: AsyncTestClient[Any]) -> None:
    asked = {"prompt": ["one", "two words"], "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events((await complete(client, **asked)).text)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["one", "two words"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks].count("stop") == 2
    assert (last["choices"], last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == ([], 3, 3)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_prompt_that_fails_fails_the_answer_and_cancels_the_others(
    client: AsyncTestClient[Any], engine: ScriptedEngine, stream: bool
) -> None:
    never = asyncio.Event()

    def script(request: GenerationRequest) -> list[str | asyncio.Event | GenerationFailed]:
        return ["a", GenerationFailed("it broke") if request.prompt == RawText("bad") else never]

    engine.script = script
    answer = await complete(client, prompt=["good", "bad", "good"], stream=stream)
    assert answer.status_code == (200 if stream else 500)
    assert "it broke" in answer.text
    assert engine.running == set()


async def test_a_prompt_that_is_refused_before_it_begins_is_answered_with_its_status(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    engine.script = lambda request: [GenerationFailed("no")] if request.prompt == RawText("bad") else [asyncio.Event()]
    assert (await complete(client, prompt=["good", "bad"], stream=True)).status_code == 500
    assert engine.running == set()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "x", "best_of": 2}, "best_of is 2 and n is 1"),
        ({"prompt": "x", "best_of": 2, "n": 3}, "best_of is 2 and n is 3"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": []}, "0 prompts"),
        ({"prompt": ["x"] * 65, "n": 2}, "65 prompts with 2 answers each"),
        ({"prompt": "x", "logprobs": 21}, "logprobs is 21"),
    ],
)
async def test_completions_that_cannot_be_given_are_refused(
    client: AsyncTestClient[Any], body: dict[str, Any], said: str
) -> None:
    response = await complete(client, **body)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
    assert (await complete(client, prompt="x", best_of=2, n=2)).status_code == 200


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"response_format": {"type": "text"}}, ResponseFormat()),
        ({"response_format": {"type": "json_object"}}, ResponseFormat("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            ResponseFormat("json_schema", SCHEMA),
        ),
        ({"response_format": {"type": "regex", "regex": "a+"}}, ResponseFormat("regex", regex="a+")),
        (
            {"response_format": {"type": "choice", "choices": ["a", "b"]}},
            ResponseFormat("choice", choices=("a", "b")),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, ResponseFormat("json_schema", SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ResponseFormat("json_schema", SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, ResponseFormat("regex", regex="a+")),
        ({"structured_outputs": {"choice": ["a"]}}, ResponseFormat("choice", choices=("a",))),
    ],
)
async def test_forms_of_an_answer_reach_the_engine(
    client: AsyncTestClient[Any], engine: ScriptedEngine, body: dict[str, Any], expected: ResponseFormat
) -> None:
    assert (await chat(client, **body)).status_code == 200
    assert (await complete(client, prompt="x", **body)).status_code == 200
    assert [request.response_format for request in engine.requests] == [expected, expected]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "json_object and regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "regex and choice at once"),
        ({"response_format": {"type": "regex", "choices": ["a"]}}, "also choices; leave one of them out"),
        ({"response_format": {"type": "json_schema"}}, "does not say which"),
        ({"response_format": {"type": "choice", "choices": [""]}}, "does not say which"),
        ({"structured_outputs": {"json": {"type": "text"}}}, "the JSON schema is not one at type"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json is not JSON"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar"),
    ],
)
async def test_forms_that_contradict_themselves_are_refused(
    client: AsyncTestClient[Any], engine: ScriptedEngine, body: dict[str, Any], said: str
) -> None:
    response = await chat(client, **body)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
    assert engine.requests == []


@pytest.mark.parametrize("beside", [{}, {"description": "x" * 100_000}])
def test_a_schemas_verdict_is_the_same_each_time_and_its_own(beside: dict[str, Any]) -> None:
    good, bad = {"minimum": float("nan"), **beside}, {"minimum": None, **beside}
    for _ in range(2):
        assert response_format(None, StructuredOutputsBody(json=good)).json_schema == good
        with pytest.raises(InvalidRequest, match="not one at minimum: None is not of type 'number'; correct it there"):
            response_format(None, StructuredOutputsBody(json=bad))


async def test_a_deadline_that_passes_is_a_gateway_timeout(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    engine.script = lambda _: ["a", asyncio.Event()]
    response = await chat(client, timeout_s=0.01)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert engine.running == set()


async def test_vllms_extra_fields_and_the_tasks_name_reach_the_engine(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    extra = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 1, "ignore_eos": True}
    await chat(client, **extra, stop_token_ids=[7], logit_bias={"5": -1}, stream=True)
    await chat(client, "demo-base", messages=HELLO)
    first, second = engine.requests
    assert {name: getattr(first.sampling, name) for name in extra} == extra
    assert (first.sampling.stop_token_ids, first.sampling.logit_bias) == ((7,), {5: -1.0})
    assert [(one.stream, one.task) for one in (first, second)] == [(True, "intents"), (False, "")]


async def test_times_of_tokens_are_measured_where_they_are_streamed(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    engine.script = echo
    await chat(client, stream=False)
    labels = 'arm="",backend="local",task="intents",version="v1"'
    assert f"softcue_time_per_output_token_seconds_count{{{labels}}}" not in (await client.get("/metrics")).text
    await chat(client, stream=True, n=2)
    metrics = (await client.get("/metrics")).text
    for name in ("time_per_output_token", "time_to_first_token"):
        assert f"softcue_{name}_seconds_count{{{labels}}} 1.0" in metrics
