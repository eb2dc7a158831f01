"""Whether an answer is what an extract task wants: JSON that is valid for the task's schema."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator

from prompt_store.prompts.task import Task


@dataclass(frozen=True, slots=True)
class Extracted:
    """`parsed` is the answer as JSON where it is valid for the task's schema; else None, and `invalid` says why."""

    parsed: Any
    invalid: str | None


def extract(task: Task, text: str) -> Extracted:
    """Read an answer to an extract task."""
    try:
        parsed = json.loads(text)
        problem = next(Draft202012Validator(task.json_schema or {}).iter_errors(parsed), None)
    except ValueError as error:
        return Extracted(None, f"the answer is not JSON: {error}")
    except RecursionError:
        return Extracted(None, "the answer is nested too deeply to be read")
    if problem is not None:
        return Extracted(None, f"the answer does not fit the task's schema: {problem.message}")
    return Extracted(parsed, None)
