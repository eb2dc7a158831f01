"""The outcomes that nobody has to report: what a row of `answers` says by itself.

Cancelled requests count for nothing, and failed ones for `error` alone: nothing else of them says what an answer is
like. A value is NULL where there is none.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Float, Integer, case, cast

from prompt_store.tables import answers

CANCELLED = "cancelled"
ERROR = "error"


@dataclass(frozen=True, slots=True)
class AutomaticMetric:
    """`value` is a number over a row of `answers`; true and false are 1 and 0."""

    direction: Literal["maximise", "minimise"]
    type: Literal["number", "boolean"]
    value: ColumnElement[Any]


def _of_answers(value: Any) -> ColumnElement[Any]:
    return case((answers.c.outcome.not_in((ERROR, CANCELLED)), cast(value, Float)))


def _flag(condition: Any) -> ColumnElement[Any]:
    # Through an integer: PostgreSQL casts no boolean to a float.
    return cast(condition, Integer)


AUTOMATIC: dict[str, AutomaticMetric] = {
    "latency_ms": AutomaticMetric("minimise", "number", _of_answers(answers.c.latency_ms)),
    "first_token_ms": AutomaticMetric("minimise", "number", _of_answers(answers.c.first_token_ms)),
    "cost": AutomaticMetric("minimise", "number", _of_answers(answers.c.cost)),
    "prompt_tokens": AutomaticMetric("minimise", "number", _of_answers(answers.c.prompt_tokens)),
    "completion_tokens": AutomaticMetric("minimise", "number", _of_answers(answers.c.completion_tokens)),
    "error": AutomaticMetric(
        "minimise",
        "boolean",
        case((answers.c.outcome == ERROR, cast(1, Float)), (answers.c.outcome != CANCELLED, cast(0, Float))),
    ),
    "refused": AutomaticMetric("minimise", "boolean", _of_answers(_flag(answers.c.refused))),
    "valid_json": AutomaticMetric("maximise", "boolean", _of_answers(_flag(answers.c.valid_json))),
    "cut_off": AutomaticMetric("minimise", "boolean", _of_answers(_flag(answers.c.outcome == "length"))),
}
