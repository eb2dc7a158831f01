"""OpenAI's own API description, which bodies are held against."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.conftest import shared_file


@cache
def _description(text: str) -> Registry[Any]:
    document = _nullable(yaml.load(text, Loader=yaml.CSafeLoader))
    return Registry().with_resource("urn:openai", Resource(contents=document, specification=DRAFT202012))


def _nullable(schema: Any) -> Any:
    """The description mixes in OpenAPI 3.0's `nullable`, which JSON Schema does not know."""
    if isinstance(schema, list):
        return [_nullable(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _nullable(value) for key, value in schema.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") is True else plain


def contract() -> Registry[Any]:
    """The description. Skips the test where it is not beside the repository, as `shared_file` does."""
    return _description(shared_file("contracts", "openai-openapi.yaml").read_text("utf-8"))


def check(contract: Registry[Any], schema: str, body: Any) -> None:
    """Fail with every problem of `body`, which is to be one of the description's `schema`."""
    validator = Draft202012Validator({"$ref": f"urn:openai#/components/schemas/{schema}"}, registry=contract)
    problems = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(body)]
    assert not problems, problems
