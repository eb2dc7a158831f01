"""What an answer is worth: each scorer takes an example and the given text, and returns a number in [0, 1]."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from prompt_store.prompts.task import Task
from training.dataset import Example

_NOT_JSON = object()

Scorer = Callable[[Example, str], float]


def exact_match(example: Example, answer: str) -> float:
    """1 when the answer is the expected one; JSON is compared as values, so key order and spaces do not count."""
    if example.answer.strip() == answer.strip():
        return 1.0
    expected, given = _json(example.answer), _json(answer)
    return float(isinstance(expected, dict | list) and expected == given)


def json_validity(_: Example, answer: str) -> float:
    """1 when the answer is JSON."""
    return float(_json(answer) is not _NOT_JSON)


def field_coverage(example: Example, answer: str) -> float:
    """The share of those input fields that the expected answer quotes and the given answer quotes too."""
    quoted = [value for value in example.inputs.values() if value.lower() in example.answer.lower()]
    if not quoted:
        return 1.0
    return sum(value.lower() in answer.lower() for value in quoted) / len(quoted)


SCORERS: Mapping[str, Scorer] = {
    "accuracy": exact_match,
    "exact_match": exact_match,
    "json_validity": json_validity,
    "field_coverage": field_coverage,
}


def metric_names(task: Task) -> list[str]:
    """The metrics that a task is evaluated by: those of its own that are computed here, else the one of its kind."""
    own = [metric.name for metric in task.metrics if metric.name in SCORERS]
    return own or ["accuracy" if task.kind == "classify" else "exact_match"]


def reported_names(task: Task) -> list[str]:
    """The task's metrics that no scorer computes: what came of answers, which callers report, says them."""
    return [metric.name for metric in task.metrics if metric.name not in SCORERS]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # an answer may also be nested beyond what any parser follows
        return _NOT_JSON
