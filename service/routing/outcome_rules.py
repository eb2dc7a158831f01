"""What may be reported of an answer, and the entry that a report of it becomes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from prompt_store.errors import InvalidOutcome
from prompt_store.ledger.entries import Outcome
from prompt_store.ledger.metrics import find_metric
from prompt_store.names import DigestSelector
from prompt_store.prompts.registry import TaskSnapshot
from prompt_store.prompts.task import Task
from prompt_store.prompts.unreadable import Unreadable, readable
from prompt_store.prompts.version import PromptVersion
from service.generation_ids import GenerationTag


def revision_with(metric: str, task: TaskSnapshot, version: str) -> Task:
    """The task's current revision where it has the metric, else that of the version that answered.

    `version` is the beginning of its digest, or empty. Raises InvalidOutcome where neither has it, SchemaMismatch where
    it cannot be read what they have.
    """
    refusal: InvalidOutcome | None = None
    for revision in _revisions(task, version):
        try:
            find_metric(revision, metric)
        except InvalidOutcome as error:
            refusal = refusal or error
        else:
            return revision
    assert refusal is not None
    raise refusal


def outcome_of(
    tag: GenerationTag,
    metric: str,
    value: bool | float | str,
    at_ms: int,
    *,
    source: Literal["caller", "judge"],
    principal: str,
) -> Outcome:
    """What was reported of the generation that a tag is of."""
    return Outcome(
        request=tag.request,
        task=tag.task,
        experiment=tag.experiment,
        arm=tag.arm,
        unit_hash=tag.unit_hash,
        version=tag.version,
        generated_ms=tag.at_ms,
        metric=metric,
        value=value,
        at_ms=at_ms,
        source=source,
        principal=principal,
    )


def _revisions(task: TaskSnapshot, version: str) -> Iterator[Task]:
    """The current one first; it is passed over where it cannot be read and there is another."""
    answered = task.find(DigestSelector(version)) if version else None
    earlier = task.revisions[answered.task_revision] if isinstance(answered, PromptVersion) else None
    if earlier is None or not isinstance(task.revision, Unreadable):
        yield readable(task.revision).task
    if earlier is not None:
        yield readable(earlier).task
