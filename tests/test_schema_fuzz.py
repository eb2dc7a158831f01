"""Requests made up by schemathesis from our own description, good and bad, sent to a real server on each database.

No answer may be a failure of the service, and each must be one that the description declares. A run is short and always
the same; SOFTCUE_FUZZ_EXAMPLES=300 makes it long (see `make check-slow`).
"""

from __future__ import annotations

import os
import time
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.engines.base_model import BaseModel
from service.engines.scripted import ScriptedEngine
from service.generation_ids import GenerationTag, sign
from tests.service.experiments.lived import prepare, started
from tests.service.serving import filled, listening

EXAMPLES = int(os.environ.get("SOFTCUE_FUZZ_EXAMPLES", "4"))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

# What is there, so that not every request ends at a name that is not.
KNOWN = {"task": "copy", "selector": "v1", "alias": "production", "model": "copy", "name": "local"}


@pytest.mark.parametrize("names", ["known names", "any names"])
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_makes_the_service_fail(
    location: str, base: BaseModel, names: str, mode: GenerationMode, subtests: pytest.Subtests
) -> None:
    store = filled(location, base)
    prepare(store)
    started(store.registry, name="local")
    tag = GenerationTag("copy", "", "control", "5" * 16, round(time.time() * 1000), "5f-1", "local")
    known_names = {**KNOWN, "generation": sign(tag, store.registry.database.signing_key())}
    with store.registry.database, listening(store, ScriptedEngine()) as url:
        schema = schemathesis.openapi.from_dict(httpx.get(f"{url}/schema/openapi.json").json())
        for operation in (result.ok() for result in schema.get_all_operations()):

            @settings(
                max_examples=EXAMPLES,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def answers_well(case: Case) -> None:
                known: dict[str, Any] = {key: known_names[key] for key in case.path_parameters if key in known_names}
                if names == "known names":
                    case.path_parameters |= known
                case.call_and_validate(base_url=url, checks=CHECKS, timeout=30)

            with subtests.test(operation=operation.label):
                try:
                    answers_well()
                except Unsatisfiable:
                    # Nothing of this operation can be wrong: it has no parameters, or takes any text.
                    assert mode is GenerationMode.NEGATIVE
