from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from prompt_store.prompts.task import Message
from service.engines.base import (
    UNBOUNDED,
    GenerationRequest,
    Messages,
    RawText,
    ResponseFormat,
    Sampling,
    TokenIds,
)
from service.engines.errors import InvalidRequest, UnsupportedFeature
from service.engines.remote.flavours import FLAVOURS, FlavourName
from service.engines.remote.request_body import encode, fits_strict_mode, wrap_choices
from tests.openai_contract import check, contract
from tests.service.engines.remote.official import sent_by_client

SAID: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hällo"}]
CHAT = Messages((Message(role="system", content="be brief"), Message(role="user", content="hällo")))
PLAIN = Sampling(UNBOUNDED, temperature=1.0)
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
STRICT = {
    "type": "object",
    "properties": {"table": {"type": "string", "description": "which"}, "rows": {"$ref": "#/$defs/rows"}},
    "required": ["rows", "table"],
    "additionalProperties": False,
    "$defs": {"rows": {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
WIRE: Any = [
    {"role": "user", "content": [{"type": "text", "text": "what is it?"}], "name": "anna"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
]


def asked(prompt: Any = CHAT, sampling: Sampling = PLAIN, **more: Any) -> GenerationRequest:
    return GenerationRequest("id", prompt, sampling=sampling, **{"stream": False, **more})


def sent(request: GenerationRequest, flavour: FlavourName = "openai") -> dict[str, Any]:
    document: dict[str, Any] = json.loads(encode(request, "ft:m", FLAVOURS[flavour]).body)
    return document


def chat(**given: Any) -> Callable[[openai.OpenAI], object]:
    return lambda client: client.chat.completions.create(**{"model": "ft:m", "messages": SAID, **given})


def text(**given: Any) -> Callable[[openai.OpenAI], object]:
    return lambda client: client.completions.create(**{"model": "ft:m", "prompt": "Once", **given})


def by_schema(name: str, schema: dict[str, Any], strict: bool) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": strict}}


SAME: dict[str, tuple[GenerationRequest, Callable[[openai.OpenAI], object]]] = {
    "nothing but messages": (asked(), chat()),
    "a stream": (asked(stream=True), chat(stream=True, stream_options={"include_usage": True})),
    "sampling": (
        asked(sampling=Sampling(9, 0.2, 0.5, seed=3, stop=("\n", "END"), frequency_penalty=0.5, presence_penalty=-1.0)),
        chat(max_completion_tokens=9, temperature=0.2, top_p=0.5, seed=3, stop=["\n", "END"], frequency_penalty=0.5,
             presence_penalty=-1.0),
    ),
    "greedy": (asked(sampling=Sampling(8)), chat(max_completion_tokens=8, temperature=0.0)),
    "logit bias": (
        asked(sampling=Sampling(UNBOUNDED, 1.0, logit_bias={5: -100.0, 7: 3.0})),
        chat(logit_bias={"5": -100, "7": 3}),
    ),
    "choices and log-probabilities": (asked(n=3, logprobs=4), chat(n=3, logprobs=True, top_logprobs=4)),
    "log-probabilities alone": (asked(logprobs=0), chat(logprobs=True)),
    "tools": (
        asked(tools=(TOOL,), tool_choice="auto", parallel_tool_calls=False),
        chat(tools=[TOOL], tool_choice="auto", parallel_tool_calls=False),
    ),
    "messages as they came": (asked(Messages((), tuple(WIRE))), chat(messages=WIRE)),
    "options by the provider's names": (
        asked(provider_options={"reasoning_effort": "low", "user": "u"}),
        chat(reasoning_effort="low", user="u"),
    ),
    "a JSON object": (
        asked(response_format=ResponseFormat("json_object")),
        chat(response_format={"type": "json_object"}),
    ),
    "a strict schema": (
        asked(response_format=ResponseFormat("json_schema", json_schema=STRICT)),
        chat(response_format=by_schema("answer", STRICT, True)),
    ),
    "a loose schema": (
        asked(response_format=ResponseFormat("json_schema", json_schema={"type": "object"})),
        chat(response_format=by_schema("answer", {"type": "object"}, False)),
    ),
    "one of several": (
        asked(response_format=ResponseFormat("choice", choices=("yes", "no"))),
        chat(response_format=by_schema("choice", wrap_choices(["yes", "no"]), True)),
    ),
    "text to continue": (
        asked(RawText("Once"), Sampling(5, logit_bias={1: 2})),
        text(max_tokens=5, temperature=0.0, logit_bias={"1": 2}),
    ),
    "text in a stream": (
        asked(RawText("Once"), n=2, logprobs=2, stream=True),
        text(n=2, logprobs=2, stream=True, stream_options={"include_usage": True}),
    ),
    "token ids": (asked(TokenIds((1, 2))), text(prompt=[1, 2])),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_a_request_is_what_the_official_client_sends_and_openai_takes(case: str) -> None:
    request, call = SAME[case]
    endpoint, body = sent_by_client(call)
    outgoing = encode(request, "ft:m", FLAVOURS["openai"])
    assert (outgoing.endpoint, json.loads(outgoing.body)) == (endpoint, body)
    schema = "CreateChatCompletionRequest" if endpoint == "chat/completions" else "CreateCompletionRequest"
    check(contract(), schema, body)


def test_an_answer_without_a_limit_is_asked_for_without_one() -> None:
    assert sent(asked(CHAT, PLAIN)) == {"model": "ft:m", "messages": SAID}
    assert sent(asked(CHAT, Sampling(5, 1.0)), "other")["max_tokens"] == 5


@pytest.mark.parametrize("flavour", ["vllm", "softcue"])
def test_a_server_whose_defaults_are_a_models_is_told_even_what_is_neutral(flavour: FlavourName) -> None:
    told = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert sent(asked(), flavour) == {"model": "ft:m", "messages": SAID} | told


def test_mistral_is_sent_no_field_that_it_does_not_know() -> None:
    body = sent(asked(sampling=Sampling(7, 0.5, seed=11), stream=True), "mistral")
    told = {"max_tokens": 7, "temperature": 0.5, "top_p": 1.0, "random_seed": 11, "stream": True}
    assert body == {"model": "ft:m", "messages": SAID} | told
    with pytest.raises(UnsupportedFeature, match="logit_bias is not served"):
        sent(asked(sampling=Sampling(logit_bias={1: 1.0})), "mistral")


def test_together_takes_the_number_of_alternatives_for_logprobs() -> None:
    assert sent(asked(logprobs=3), "together")["logprobs"] == 3
    assert sent(asked(logprobs=0), "together")["logprobs"] == 1


@pytest.mark.parametrize("prompt", [CHAT, RawText("Once")])
def test_vllm_is_asked_for_choices_and_patterns_by_its_own_parameter(prompt: Any) -> None:
    choice = asked(prompt, response_format=ResponseFormat("choice", choices=("a", "b")), stream=True)
    assert sent(choice, "vllm")["structured_outputs"] == {"choice": ["a", "b"]}
    outgoing = encode(choice, "m", FLAVOURS["vllm"])
    assert (outgoing.wrapped, outgoing.stream) == (False, True)
    assert sent(asked(prompt, response_format=ResponseFormat("regex", regex="a+")), "vllm")["structured_outputs"] == {
        "regex": "a+"
    }


@pytest.mark.parametrize("flavour", ["vllm", "softcue"])
def test_a_schema_that_is_checked_afterwards_is_followed_as_far_as_llguidance_can(flavour: str) -> None:
    form = ResponseFormat("json_schema", json_schema={"type": "object", "minProperties": 1}, lenient=True)
    schema = sent(asked(response_format=form), flavour)["response_format"]["json_schema"]["schema"]
    assert schema == {**dict(form.json_schema or {}), "x-guidance": {"lenient": True, "coerce_one_of": True}}
    assert sent(asked(response_format=form), "openai")["response_format"]["json_schema"]["schema"] == form.json_schema


def test_a_choice_within_json_is_not_streamed_and_has_room_for_what_stands_around_it() -> None:
    request = asked(sampling=Sampling(2), stream=True, response_format=ResponseFormat("choice", choices=("a", "b")))
    outgoing = encode(request, "m", FLAVOURS["openai"])
    assert (outgoing.wrapped, outgoing.stream) == (True, False)
    body = json.loads(outgoing.body)
    assert "stream" not in body
    assert body["max_completion_tokens"] > 10


@pytest.mark.parametrize(
    ("request_", "flavour", "parameter"),
    [
        (asked(response_format=ResponseFormat("regex", regex="a")), "openai", "response_format"),
        (asked(RawText("x"), response_format=ResponseFormat("json_object")), "openai", "response_format"),
        (asked(RawText("x"), tools=(TOOL,)), "openai", "tools"),
        (asked(tools=({"type": "custom", "custom": {"name": "x"}},)), "openai", "tools"),
        (asked(TokenIds((1,))), "mistral", "prompt"),
        (asked(sampling=Sampling(top_k=5)), "openai", "top_k"),
        (asked(sampling=Sampling(min_p=0.5)), "azure", "min_p"),
        (asked(sampling=Sampling(ignore_eos=True)), "together", "ignore_eos"),
    ],
)
def test_what_a_provider_cannot_be_told_is_refused(
    request_: GenerationRequest, flavour: FlavourName, parameter: str
) -> None:
    with pytest.raises(UnsupportedFeature) as refused:
        sent(request_, flavour)
    assert refused.value.parameter == parameter


@pytest.mark.parametrize("options", [{"temperature": 0.1}, {"stream": True}, {"messages": []}, {"n": 4}])
def test_an_option_that_is_given_twice_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"{next(iter(options))} is given twice"):
        sent(asked(sampling=Sampling(temperature=0.5), provider_options=options))


def test_a_backends_own_features_and_omissions_change_what_is_sent() -> None:
    flavour = FLAVOURS["other"].having({"min_p", "deadline"}, {"temperature", "stream_options"})
    body = json.loads(encode(asked(sampling=Sampling(5, 0.0, min_p=0.25), stream=True), "m", flavour).body)
    assert body == {"model": "m", "messages": SAID, "max_tokens": 5, "min_p": 0.25, "stream": True}
    with pytest.raises(UnsupportedFeature, match="frequency_penalty is not served"):
        encode(asked(sampling=Sampling(frequency_penalty=1.0)), "m", flavour)


@pytest.mark.parametrize(
    ("schema", "fits"),
    [
        (STRICT, True),
        (wrap_choices(["a"]), True),
        ({**STRICT, "additionalProperties": True}, False),
        ({**STRICT, "required": ["table"]}, False),
        ({**STRICT, "$defs": {"rows": {"type": "array"}}}, False),
        ({**STRICT, "$defs": {"rows": {"type": "object", "properties": {}}}}, False),
        ({**STRICT, "$defs": {"rows": {"type": "string", "pattern": "a"}}}, False),
        ({**STRICT, "$defs": {"rows": {}}}, False),
        ({"type": "string"}, False),
        ({"anyOf": [STRICT]}, False),
        ({"type": "object", "properties": {}}, False),
    ],
)
def test_only_what_strict_mode_takes_is_asked_for_strictly(schema: dict[str, Any], fits: bool) -> None:
    assert fits_strict_mode(schema) is fits


def test_strict_mode_is_not_asked_for_more_choices_than_it_takes() -> None:
    assert fits_strict_mode(wrap_choices([f"{number}" for number in range(1000)]))
    assert fits_strict_mode(wrap_choices(["x" * 100 + f"{number}" for number in range(250)]))
    assert not fits_strict_mode(wrap_choices([f"{number}" for number in range(1001)]))
    assert not fits_strict_mode(wrap_choices(["x" * 100 + f"{number}" for number in range(251)]))
