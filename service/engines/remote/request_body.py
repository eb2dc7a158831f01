"""Requests out: a GenerationRequest as the body of a provider's `/chat/completions` or `/completions`. Pure.

Only what differs from the provider's defaults is sent: some models refuse even to be told `temperature` 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from service.engines.base import UNBOUNDED, GenerationRequest, Messages, RawText, ResponseFormat, Sampling, TokenIds
from service.engines.errors import InvalidRequest, UnsupportedFeature
from service.engines.remote.flavours import Flavour

Endpoint = Literal["chat/completions", "completions"]

CHOICE = "choice"
"""The one property of the JSON object that stands around a choice where no plainer constraint is to be had."""

_WRAPPING_TOKENS = 16
_NEUTRAL = Sampling(temperature=1.0)
_FIELDS = tuple(name for name in Sampling.__dataclass_fields__ if name != "max_tokens")
_OURS = frozenset({"model", "messages", "prompt", "stream", "stream_options", "n", "max_tokens"})

# What OpenAI's strict mode takes, for fine-tuned models too, which know no pattern, format or bounds.
_STRICT_KEYWORDS = frozenset(
    {
        "type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "$ref", "$defs",
        "definitions", "title", "description",
    }
)  # fmt: skip
_STRICT_DEPTH = 10
_MOST_VALUES = 1000
_MANY_VALUES = 250
_MOST_CHARACTERS_OF_MANY = 15_000


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A body and where it goes. `wrapped` says that the choice comes back inside a JSON object, see CHOICE."""

    endpoint: Endpoint
    body: bytes
    stream: bool
    wrapped: bool = False


def encode(request: GenerationRequest, model: str, flavour: Flavour) -> Outgoing:
    """The request as `flavour` wants it. Raises UnsupportedFeature and InvalidRequest for what it cannot be told.

    A wrapped choice is not streamed: what stands around it is no part of the answer.
    """
    body: dict[str, Any] = {"model": model}
    limit_field: str
    match request.prompt:
        case Messages(messages, wire):
            endpoint: Endpoint = "chat/completions"
            limit_field = flavour.chat_limit
            body["messages"] = wire or [{"role": message.role, "content": message.content} for message in messages]
            if request.logprobs is not None:
                body |= _chat_logprobs(request.logprobs, flavour)
            body |= _tools(request)
        case RawText(text):
            endpoint, limit_field = "completions", "max_tokens"
            body["prompt"] = text
        case TokenIds(ids):
            endpoint, limit_field = "completions", "max_tokens"
            if not flavour.token_ids:
                raise UnsupportedFeature(
                    "this task's backend takes no tokenised text; send the prompt as text", parameter="prompt"
                )
            body["prompt"] = ids
    if endpoint == "completions":
        _check_completion(request, flavour)
        if request.logprobs is not None:
            body["logprobs"] = request.logprobs
    wrapped = request.response_format.kind == "choice" and flavour.constraint == "json_schema"
    if request.response_format.kind != "text":
        body |= _response_format(request.response_format, flavour)
    if request.sampling.max_tokens != UNBOUNDED:
        body[limit_field] = request.sampling.max_tokens + (_WRAPPING_TOKENS if wrapped else 0)
    _add_sampling(body, request.sampling, flavour)
    if request.n != 1:
        body["n"] = request.n
    stream = request.stream and not wrapped
    if stream:
        body["stream"] = True
        if flavour.stream_usage:
            body["stream_options"] = {"include_usage": True}
    if request.provider_options:
        _add_options(body, request.provider_options)
    for name in flavour.omitted:
        body.pop(name, None)
    return Outgoing(endpoint, msgspec.json.encode(body), stream, wrapped)


def wrap_choices(choices: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an object that holds one of the choices, as OpenAI's strict mode takes it."""
    return {
        "type": "object",
        "properties": {CHOICE: {"type": "string", "enum": list(choices)}},
        "required": [CHOICE],
        "additionalProperties": False,
    }


def leniently(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with its own word to llguidance, which vLLM and Softcue follow schemas by: leave out what cannot be
    followed, and take oneOf as anyOf.
    """
    return {**schema, "x-guidance": {"lenient": True, "coerce_one_of": True}}


def fits_strict_mode(schema: Mapping[str, Any]) -> bool:
    """Whether OpenAI's strict mode takes the schema: every object closed, all of its properties required, no keyword
    that it does not know, an object at the top, no more choices than it has room for.

    Source: OpenAI's guide to structured outputs, "Supported schemas" and "fine-tuned models", as of 2026-02.
    """
    return schema.get("type") == "object" and "anyOf" not in schema and _fits(schema, 0)


def _fits(schema: Any, depth: int) -> bool:
    if not isinstance(schema, Mapping) or not schema.keys() <= _STRICT_KEYWORDS or depth > _STRICT_DEPTH:
        return False
    kind = schema.get("type", "")  # a name, or several
    properties = schema.get("properties", {})
    if "object" in kind:
        closed = schema.get("additionalProperties") is False
        if not closed or set(schema.get("required", ())) != set(properties):
            return False
    elif not kind and not schema.keys() & {"anyOf", "$ref", "enum", "const"}:
        return False
    if "array" in kind and "items" not in schema:
        return False
    values = schema.get("enum", ())
    length = sum(len(value) for value in values if isinstance(value, str))
    if len(values) > _MOST_VALUES or (len(values) > _MANY_VALUES and length > _MOST_CHARACTERS_OF_MANY):
        return False
    inner = [*properties.values(), *schema.get("anyOf", ())]
    inner += [*schema.get("$defs", {}).values(), *schema.get("definitions", {}).values()]
    if "items" in schema:
        inner.append(schema["items"])
    return all(_fits(one, depth + 1) for one in inner)


def _chat_logprobs(alternatives: int, flavour: Flavour) -> dict[str, Any]:
    if flavour.chat_logprobs == "count":
        return {"logprobs": max(alternatives, 1)}
    return {"logprobs": True, "top_logprobs": alternatives} if alternatives else {"logprobs": True}


def _tools(request: GenerationRequest) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if request.tools:
        if any(tool.get("type") != "function" for tool in request.tools):
            raise UnsupportedFeature(
                "tools has one whose type is not 'function'; only functions are passed on", parameter="tools"
            )
        body["tools"] = request.tools
    if request.tool_choice is not None:
        body["tool_choice"] = request.tool_choice
    if request.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = request.parallel_tool_calls
    return body


def _check_completion(request: GenerationRequest, flavour: Flavour) -> None:
    if request.tools:
        raise UnsupportedFeature("tools need a conversation; ask at /v1/chat/completions", parameter="tools")
    if request.response_format.kind != "text" and not flavour.completion_formats:
        raise UnsupportedFeature(
            "this task's backend gives raw text no form; ask at /v1/chat/completions, or leave response_format out",
            parameter="response_format",
        )


def _response_format(form: ResponseFormat, flavour: Flavour) -> dict[str, Any]:
    match form.kind:
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "json_schema":
            assert form.json_schema is not None
            by_llguidance = flavour.constraint == "structured_outputs"
            schema = leniently(form.json_schema) if form.lenient and by_llguidance else form.json_schema
            return _by_schema("answer", schema)
        case "choice" if flavour.constraint == "structured_outputs":
            return {"structured_outputs": {"choice": form.choices}}
        case "choice":
            return _by_schema(CHOICE, wrap_choices(form.choices))
        case "regex" if flavour.constraint == "structured_outputs":
            return {"structured_outputs": {"regex": form.regex}}
    raise UnsupportedFeature(
        "this task's backend follows no regular expression; ask for choices or a JSON schema",
        parameter="response_format",
    )


def _by_schema(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    described = {"name": name, "schema": schema, "strict": fits_strict_mode(schema)}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def _add_sampling(body: dict[str, Any], sampling: Sampling, flavour: Flavour) -> None:
    for name in _FIELDS:
        value = getattr(sampling, name)
        if value == getattr(_NEUTRAL, name) and name not in flavour.stated:
            continue
        field = flavour.parameters.get(name)
        if field is None:
            raise UnsupportedFeature(f"{name} is not served by this task's backend; leave it out", parameter=name)
        if name == "logit_bias":
            value = {token: int(bias) if bias == int(bias) else bias for token, bias in value.items()}
        body[field] = value


def _add_options(body: dict[str, Any], options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in body or name in _OURS:
            raise InvalidRequest(
                f"{name} is given twice, once by the provider's own name; leave one of them out", parameter=name
            )
        body[name] = value
