"""Captured requests as training data is made of them: with what came of each."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, select, tuple_

from prompt_store.ledger.automatic import AUTOMATIC
from prompt_store.ledger.entries import Captured
from prompt_store.tables import answers, captures, outcomes

_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class CapturedRow:
    """A captured request: `outcomes` by metric, those of boolean ones as 1.0 and 0.0; `facts` by automatic metric.

    `experiment` and `arm` are what it counted for, empty where nothing.
    """

    entry: Captured
    outcomes: Mapping[str, float | str]
    facts: Mapping[str, float]
    experiment: str
    arm: str


def read_captured(connection: Connection, task: str, now_ms: int) -> Iterator[CapturedRow]:
    """Those of a task whose time is not over, the oldest first."""
    last: tuple[int, str] = (-1, "")
    place = tuple_(captures.c.at_ms, captures.c.request)
    while True:
        query = select(captures).where(captures.c.task == task, captures.c.expires_ms > now_ms, place > last)
        page = connection.execute(query.order_by(captures.c.at_ms, captures.c.request).limit(_AT_ONCE)).all()
        yield from _with_what_came_of_them(connection, page)
        if len(page) < _AT_ONCE:
            return
        last = (page[-1].at_ms, page[-1].request)


def _with_what_came_of_them(connection: Connection, page: Sequence[Row[Any]]) -> Iterator[CapturedRow]:
    requests = [row.request for row in page]
    said: defaultdict[str, dict[str, float | str]] = defaultdict(dict)
    wanted = outcomes.c.request, outcomes.c.metric, outcomes.c.value, outcomes.c.text
    for request, metric, value, text in connection.execute(select(*wanted).where(outcomes.c.request.in_(requests))):
        said[request][metric] = value if text is None else text
    facts = [metric.value.label(name) for name, metric in AUTOMATIC.items()]
    ended = select(answers.c.request, answers.c.experiment, answers.c.arm, *facts)
    answered = {row.request: row for row in connection.execute(ended.where(answers.c.request.in_(requests)))}
    for row in page:
        known = answered.get(row.request)
        measured = {name: getattr(known, name) for name in AUTOMATIC} if known is not None else {}
        yield CapturedRow(
            entry=_entry(row),
            outcomes=said[row.request],
            facts={name: float(value) for name, value in measured.items() if value is not None},
            experiment=known.experiment if known is not None else "",
            arm=known.arm if known is not None else "",
        )


def _entry(row: Row[Any]) -> Captured:
    known = dict(row._mapping)
    inputs = known.pop("inputs")
    return Captured(**known, inputs=json.loads(inputs) if inputs is not None else None)
