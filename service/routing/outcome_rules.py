"""Which revision of a task says what may be reported of one of its answers."""

from __future__ import annotations

from collections.abc import Iterator

from prompt_store.errors import InvalidOutcome
from prompt_store.ledger.metrics import find_metric
from prompt_store.names import DigestSelector
from prompt_store.prompts.registry import TaskSnapshot
from prompt_store.prompts.task import Task
from prompt_store.prompts.unreadable import Unreadable, readable
from prompt_store.prompts.version import PromptVersion


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


def _revisions(task: TaskSnapshot, version: str) -> Iterator[Task]:
    """The current one first; it is passed over where it cannot be read and there is another."""
    answered = task.find(DigestSelector(version)) if version else None
    earlier = task.revisions[answered.task_revision] if isinstance(answered, PromptVersion) else None
    if earlier is None or not isinstance(task.revision, Unreadable):
        yield readable(task.revision).task
    if earlier is not None:
        yield readable(earlier).task
