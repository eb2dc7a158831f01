"""The forms an answer can be asked to take: OpenAI's `response_format`, ours beside it, vLLM's `structured_outputs`."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Literal

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import BaseModel, ConfigDict, Field

from service.engines.base import ResponseFormat
from service.engines.errors import InvalidRequest

_CACHED_VERDICTS = 256
_LONGEST_CACHED_SCHEMA = 32 * 1024


class JsonSchemaFormat(BaseModel):
    """`strict` is taken and changes nothing: a schema is always enforced."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormatBody(BaseModel):
    """OpenAI's three types, and `regex` and `choice` with a field of their own."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema", "regex", "choice"]
    json_schema: JsonSchemaFormat | None = None
    regex: str | None = None
    choices: list[str] | None = None


class TextFormatBody(BaseModel):
    """`text.format` of `/v1/responses`: the same three types, a schema's parts beside its type."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class StructuredOutputsBody(BaseModel):
    """vLLM's parameter of that name, as far as it is served here: one of these."""

    model_config = ConfigDict(extra="forbid")

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None


def response_format(format: ResponseFormatBody | None, structured: StructuredOutputsBody | None) -> ResponseFormat:
    """The one form that is asked for. Raises InvalidRequest for several, for one without content, for a bad schema."""
    asked = [form for form in (*_openai_forms(format), *_vllm_forms(structured)) if form.kind != "text"]
    if len(asked) > 1:
        raise InvalidRequest(
            f"the answer is asked to be {' and '.join(form.kind for form in asked)} at once; give one form, by "
            "response_format or by structured_outputs",
            parameter="response_format" if format is not None else "structured_outputs",
        )
    if not asked:
        return ResponseFormat()
    (form,) = asked
    form.check()
    _check_schema(form, "response_format")
    return form


def text_format(format: TextFormatBody | None) -> ResponseFormat:
    """The form that `/v1/responses` asks for. Raises InvalidRequest for a schema that is missing or bad."""
    if format is None:
        return ResponseFormat()
    if (format.type == "json_schema") != (format.json_schema is not None):
        raise InvalidRequest(
            f"text.format is of type '{format.type}' {'with' if format.json_schema is not None else 'without'} a "
            "schema; type json_schema and schema go together",
            parameter="text.format",
        )
    form = ResponseFormat(format.type, format.json_schema)
    _check_schema(form, "text.format")
    return form


def _check_schema(form: ResponseFormat, parameter: str) -> None:
    if form.json_schema is None:
        return
    text = json.dumps(form.json_schema)
    problem_of = _schema_problem if len(text) <= _LONGEST_CACHED_SCHEMA else _schema_problem.__wrapped__
    problem = problem_of(text)
    if problem is not None:
        place, message = problem
        raise InvalidRequest(f"the JSON schema is not one at {place}: {message}; correct it there", parameter=parameter)


@lru_cache(_CACHED_VERDICTS)
def _schema_problem(schema: str) -> tuple[str, str] | None:
    """Where a schema is none, and why. By its text: finding out takes milliseconds, and callers repeat themselves."""
    try:
        Draft202012Validator.check_schema(json.loads(schema))
    except SchemaError as error:
        return "/".join(str(step) for step in error.absolute_path) or "its top", error.message
    return None


def _openai_forms(body: ResponseFormatBody | None) -> list[ResponseFormat]:
    if body is None:
        return []
    given = {"json_schema": body.json_schema, "regex": body.regex, "choices": body.choices}
    wanted = {"json_schema": "json_schema", "regex": "regex", "choice": "choices"}.get(body.type)
    for name, value in given.items():
        if value is not None and name != wanted:
            raise InvalidRequest(
                f"response_format has type '{body.type}' and also {name}; leave one of them out",
                parameter="response_format",
            )
    schema = body.json_schema.json_schema if body.json_schema is not None else None
    return [ResponseFormat(body.type, schema, body.regex, tuple(body.choices or ()))]


def _vllm_forms(body: StructuredOutputsBody | None) -> list[ResponseFormat]:
    if body is None:
        return []
    forms = []
    if body.json_schema is not None:
        forms.append(ResponseFormat("json_schema", _schema(body.json_schema)))
    if body.json_object:
        forms.append(ResponseFormat("json_object"))
    if body.regex is not None:
        forms.append(ResponseFormat("regex", regex=body.regex))
    if body.choice is not None:
        forms.append(ResponseFormat("choice", choices=tuple(body.choice)))
    return forms


def _schema(given: dict[str, Any] | str) -> dict[str, Any]:
    """vLLM takes a schema as JSON or as its text."""
    if isinstance(given, dict):
        return given
    try:
        schema = json.loads(given)
    except ValueError as error:
        raise InvalidRequest(f"structured_outputs.json is not JSON: {error}", parameter="structured_outputs") from error
    if not isinstance(schema, dict):
        raise InvalidRequest("structured_outputs.json is not a JSON object", parameter="structured_outputs")
    return schema
