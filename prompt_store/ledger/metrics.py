"""What answers are judged by: a task's own metrics, the automatic ones, and the answer that should have been given."""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from jsonschema import Draft202012Validator

from prompt_store.errors import InvalidOutcome, nearest_name
from prompt_store.ledger.automatic import AUTOMATIC
from prompt_store.ledger.entries import DEMONSTRATION
from prompt_store.names import check_texts
from prompt_store.prompts.task import Task

MAX_TEXT_BYTES = 32 * 1024
_LONGEST_SHOWN = 200


@dataclass(frozen=True, slots=True)
class MetricRule:
    """A metric of one task; `automatic` ones are measured by the service, and nobody reports them."""

    name: str
    direction: Literal["maximise", "minimise"]
    type: Literal["number", "boolean", "text"]
    automatic: bool = False


def find_metric(task: Task, name: str) -> MetricRule:
    """An automatic metric hides a task's own of that name, which tasks of before could have.

    Raises InvalidOutcome naming the nearest.
    """
    if (known := AUTOMATIC.get(name)) is not None:
        return MetricRule(name, known.direction, known.type, automatic=True)
    if name == DEMONSTRATION:
        return MetricRule(name, "maximise", "text")
    for metric in task.metrics:
        if metric.name == name:
            return MetricRule(name, metric.direction, metric.type)
    names = [*(metric.name for metric in task.metrics), *AUTOMATIC, DEMONSTRATION]
    near = nearest_name(name, names)
    hint = f"did you mean {near!r}? Otherwise add it" if near else f"name one of {', '.join(names)}, or add it"
    raise InvalidOutcome(f"task {task.name!r} has no metric {name[:64]!r}; {hint} to the task's `metrics`")


def checked_value(task: Task, name: str, value: Any) -> bool | float | str:
    """A reported value as its metric has it, whole numbers as floats.

    Raises InvalidOutcome for a metric that is unknown or automatic, a value of another type, and a demonstration that
    the task could not answer with.
    """
    rule = find_metric(task, name)
    if rule.automatic:
        raise InvalidOutcome(f"{name!r} is measured by the service itself; report another metric, under its own name")
    match rule.type, value:
        case "boolean", bool():
            return value
        case "number", int() | float() if not isinstance(value, bool):
            return _finite(name, value)
        case "text", str():
            check_texts(f"value of {name!r}", value, InvalidOutcome)
            if (size := len(value.encode())) > MAX_TEXT_BYTES:
                raise InvalidOutcome(f"the value of {name!r} has {size} bytes; give {MAX_TEXT_BYTES} at most")
            if name == DEMONSTRATION:
                _check_demonstration(task, value)
            return value
    raise InvalidOutcome(_mismatch(rule, value))


def _finite(name: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidOutcome(f"the value of {name!r} is not finite; give a number that a double can hold")
    return number


def _mismatch(rule: MetricRule, value: Any) -> str:
    wanted = {"boolean": "true or false", "number": "a number", "text": "text"}[rule.type]
    match value:
        case bool():
            given = "true" if value else "false"
        case int() | float():
            given = "a number"
        case str():
            given = "text"
        case _:
            given = f"a value of type {type(value).__name__}"
    return f"metric {rule.name!r} is {wanted} and was given {given}; give {wanted}"


def _check_demonstration(task: Task, text: str) -> None:
    """Raises InvalidOutcome for what the task could not have answered."""
    if task.kind == "classify" and text not in task.labels:
        near = nearest_name(text, task.labels)
        hint = f"did you mean {near!r}?" if near else f"give one of {', '.join(task.labels)}"
        raise InvalidOutcome(f"the demonstration is no label of task {task.name!r}; {hint}")
    if task.kind != "extract":
        return
    try:
        parsed = json.loads(text, parse_constant=_refuse_constant)
        problem = next(Draft202012Validator(task.json_schema or {}).iter_errors(parsed), None)
    except ValueError as error:
        raise InvalidOutcome(f"the demonstration is not JSON: {error}; give JSON that fits the schema") from error
    except RecursionError as error:
        raise InvalidOutcome("the demonstration is nested too deeply to be read; flatten it") from error
    if problem is not None:
        reason = problem.message
        shown = reason if len(reason) <= _LONGEST_SHOWN else reason[:_LONGEST_SHOWN] + "…"
        raise InvalidOutcome(f"the demonstration does not fit the schema of task {task.name!r}: {shown}; correct it")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
