"""Outcomes over HTTP: what came of answers, told later by whoever asked for them.

A generation's id says whose it was and whom it counts for, so nothing is looked up and any replica takes it. What is
acknowledged is in this replica's journal, and comes from there to the store.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from litestar import Controller, Request, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from prompt_store.errors import InvalidOutcome, UnknownTask
from prompt_store.ledger.entries import Outcome
from prompt_store.ledger.metrics import checked_value
from prompt_store.prompts.registry import TaskSnapshot
from prompt_store.prompts.task import Task
from service.api.answers import errors
from service.api.callers import principal_of
from service.api.errors import InvalidOutcomes
from service.api.outcome_shapes import BatchBody, OutcomeBody, OutcomesBody, TakenOutcomeBody, TakenOutcomesBody
from service.catalog import Catalog
from service.generation_ids import GenerationTag, verify
from service.ledger.journal import Journal
from service.routing.errors import UnknownGeneration
from service.routing.outcome_rules import outcome_of, revision_with
from service.routing.router import Router

# How far clocks may be apart. A time further ahead would hold against all that is reported until then.
_AHEAD_MS = 10 * 60 * 1000
_BEFORE_MS = 24 * 60 * 60 * 1000
_MOST_PROBLEMS = 20


class OutcomeController(Controller):
    """`/v1/generations/{id}/outcomes` and `/v1/outcomes`."""

    path = "/v1"
    tags = ("Outcomes",)

    @post(
        "/generations/{generation:str}/outcomes",
        status_code=202,
        responses=errors(400, 404, 413, 415, 500, 503),
    )
    async def report(
        self,
        request: Request[Any, Any, Any],
        generation: FromPath[str],
        data: JSONBody[OutcomesBody],
        catalog: NamedDependency[Catalog],
        router: NamedDependency[Router],
        journal: NamedDependency[Journal],
    ) -> TakenOutcomesBody:
        """Report what came of an answer: values of its task's metrics, or under `demonstration` the right answer.

        Late and again is right: the newest by `at` holds, and the same twice is once. All are taken, or none where one
        is at fault; what is taken is kept once this is answered, and read by analysis a moment later.
        """
        whose = _generation(generation, catalog, router)
        reports = [_Report(place, whose, outcome) for place, outcome in data.listed()]
        return _take(reports, principal_of(request).name, journal)

    @post("/outcomes", status_code=202, responses=errors(400, 413, 415, 500, 503))
    async def report_batch(
        self,
        request: Request[Any, Any, Any],
        data: JSONBody[BatchBody],
        catalog: NamedDependency[Catalog],
        router: NamedDependency[Router],
        journal: NamedDependency[Journal],
    ) -> TakenOutcomesBody:
        """Report what came of several answers, as for one; what is wrong is named by its place."""
        reports: list[_Report] = []
        problems: list[_Problem] = []
        for number, outcome in enumerate(data.outcomes):
            place = f"outcomes[{number}]."
            try:
                reports.append(_Report(place, _generation(outcome.generation, catalog, router), outcome))
            except (UnknownGeneration, UnknownTask) as error:
                problems.append((f"{place}generation", str(error)))
        return _take(reports, principal_of(request).name, journal, problems)


@dataclass(frozen=True, slots=True)
class _Generation:
    """Its id as it came, what that says, and its task; None of the bare base model and of a provider's."""

    id: str
    tag: GenerationTag
    task: TaskSnapshot | None


@dataclass(frozen=True, slots=True)
class _Report:
    """An outcome of a generation; `place` is where its keys stand in the body."""

    place: str
    generation: _Generation
    outcome: OutcomeBody


# A place in the body, and what is wrong there.
_Problem = tuple[str, str]


def _generation(generation: str, catalog: Catalog, router: Router) -> _Generation:
    """Raises UnknownGeneration, and UnknownTask where its task is gone."""
    tag = verify(generation, router.signing_key)
    return _Generation(generation, tag, catalog.task(tag.task) if tag.task else None)


def _take(
    reports: Sequence[_Report], principal: str, journal: Journal, problems: Sequence[_Problem] = ()
) -> TakenOutcomesBody:
    """Journal all of them. Raises InvalidOutcomes with every problem, JournalUnavailable."""
    now_ms = round(time.time() * 1000)
    found = list(problems)
    entries: list[Outcome] = []
    for report in reports:
        tag, outcome = report.generation.tag, report.outcome
        key = "metric"
        try:
            rules = _rules(report.generation, outcome.metric)
            key = "value"
            value = checked_value(rules, outcome.metric, outcome.value)
            key = "at"
            at_ms = _moment_ms(outcome.at, tag, now_ms)
        except InvalidOutcome as error:
            found.append((f"{report.place}{key}", str(error)))
            continue
        entries.append(outcome_of(tag, outcome.metric, value, at_ms, source="caller", principal=principal))
    if found:
        raise _refusal(found)
    journal.append_all(entries)
    taken = zip((report.generation.id for report in reports), entries, strict=True)
    return TakenOutcomesBody(data=[TakenOutcomeBody.of(generation, entry) for generation, entry in taken])


def _rules(generation: _Generation, metric: str) -> Task:
    """As `revision_with`."""
    if generation.task is None:
        raise InvalidOutcome(
            "the answer was of no task, and so has no metrics; ask a task to report outcomes of answers"
        )
    return revision_with(metric, generation.task, generation.tag.version)


def _moment_ms(at: float | str | None, tag: GenerationTag, now_ms: int) -> int:
    """Unix milliseconds. Raises InvalidOutcome for a time that cannot be meant."""
    if at is None:
        return now_ms
    if isinstance(at, str):
        try:
            moment = datetime.fromisoformat(at)
        except ValueError:
            moment = datetime.min
        if moment.tzinfo is None:
            raise InvalidOutcome(
                "it is no ISO time with a zone; give one such as 2026-05-01T12:00:00Z, or Unix seconds"
            )
        at = moment.timestamp()
    at_ms = at * 1000
    if at_ms > now_ms + _AHEAD_MS:
        raise InvalidOutcome(
            "it lies in the future by this service's clock, and would hold against all that is reported until then; "
            "give the time of the outcome in Unix seconds or as ISO time, or leave it out for now"
        )
    if at_ms < tag.at_ms - _BEFORE_MS:
        raise InvalidOutcome(
            "it lies before the answer was given; give the time of the outcome, or leave it out for now"
        )
    return round(at_ms)


def _refusal(problems: list[_Problem]) -> InvalidOutcomes:
    told = "; ".join(f"{place}: {message}" for place, message in problems[:_MOST_PROBLEMS])
    more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
    return InvalidOutcomes(f"{told}{more}", problems[0][0])
