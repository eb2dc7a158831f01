"""Revisions that come from elsewhere, with the versions that answer them."""

from sqlalchemy import select

from prompt_store.prompts.registry import Registry
from prompt_store.tables import audit
from tests.prompt_store.building import ANNA, BORIS, publish, task


def test_an_added_revision_is_not_the_current_one_and_versions_answer_it(registry: Registry) -> None:
    current = registry.task("support_intents")
    other = task(labels=["refund", "delivery", "other"])
    added = registry.add_task_revision(other, BORIS)
    assert (added.number, added.digest, added.task, added.principal) == (2, other.digest, other, "boris")
    assert registry.task("support_intents") == current
    assert registry.task_revision(other.digest) == added
    assert publish(registry, task_revision=other.digest).version.task_revision == other.digest
    assert [(change.kind, change.subject) for change in registry.changes_since(0)[2:3]] == [("task", other.digest)]
    with registry.database.read() as connection:
        entry = connection.execute(select(audit).where(audit.c.action == "task.add")).one()
    assert (entry.task, entry.subject, entry.principal) == ("support_intents", other.digest, "boris")


def test_adding_a_revision_of_a_task_that_is_not_there_makes_the_task(empty_registry: Registry) -> None:
    added = empty_registry.add_task_revision(task(), ANNA)
    assert empty_registry.task("support_intents") == added
    assert added.number == 1


def test_adding_what_is_stored_writes_nothing(registry: Registry) -> None:
    other = task(description="another")
    added = registry.add_task_revision(other, ANNA)
    before = registry.snapshot()
    assert registry.add_task_revision(other, BORIS) == added
    assert registry.add_task_revision(task(), BORIS) == registry.task("support_intents")
    assert registry.snapshot() == before


def test_an_added_revision_becomes_current_when_it_is_applied(registry: Registry) -> None:
    other = task(description="another")
    added = registry.add_task_revision(other, ANNA)
    assert registry.apply_task(other, ANNA) == added
    assert registry.task("support_intents") == added
