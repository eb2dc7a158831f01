"""Text that one of the databases cannot hold is refused alike on both, wherever it enters; so are sizes and names."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from prompt_store.errors import InvalidArtifact, InvalidName, InvalidTask, StoreError, UnknownVersion
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.template import Message
from prompt_store.prompts.version import DatasetUse, Provenance, RemoteModelPayload, TextPayload
from tests.prompt_store.building import ANNA, BASE, publish, task

TASK = "support_intents"
FRESH = replace(BASE, fingerprint="c3" * 32)

BY_TEXT: list[tuple[str, type[StoreError], Callable[[Registry, str], Any]]] = [
    ("a task's description", InvalidTask, lambda registry, text: task(description=text)),
    ("a task's label", InvalidTask, lambda registry, text: task(labels=["refund", text])),
    ("a task's schema", InvalidTask, lambda registry, text: task(
        kind="extract", labels=[], json_schema={"properties": {text: {}}})),
    ("a base's name", InvalidArtifact, lambda registry, text: registry.register_base(
        replace(FRESH, name=text), ANNA)),
    ("a base's fingerprint", InvalidArtifact, lambda registry, text: registry.register_base(
        replace(FRESH, fingerprint=text), ANNA)),
    ("a base's architecture", InvalidArtifact, lambda registry, text: registry.register_base(
        replace(FRESH, architecture=text), ANNA)),
    ("notes", InvalidArtifact, lambda registry, text: publish(registry, seed=9, notes=text)),
    ("a tag", InvalidArtifact, lambda registry, text: publish(registry, seed=9, tags=("good", text))),
    ("an author", InvalidArtifact, lambda registry, text: publish(registry, seed=9, author=text)),
    ("provenance", InvalidArtifact, lambda registry, text: publish(
        registry, seed=9, provenance=Provenance(datasets=(DatasetUse(name=text, digest="d", rows=1),)))),
    ("a text prompt", InvalidArtifact, lambda registry, text: publish(
        registry, payload_content=TextPayload(messages=(Message(role="user", content=text),)))),
    ("a revision", UnknownVersion, lambda registry, text: publish(registry, seed=9, task_revision=text)),
    ("a version's digest", UnknownVersion, lambda registry, text: registry.prompt(text)),
    ("a digest of evidence", UnknownVersion, lambda registry, text: registry.evidence(text)),
    ("an alias's history", InvalidName, lambda registry, text: registry.alias_history(TASK, text)),
    ("a rollback", InvalidName, lambda registry, text: registry.rollback_alias(
        TASK, text, reason="", principal=ANNA)),
    ("a removal", InvalidName, lambda registry, text: registry.remove_alias(TASK, text, reason="", principal=ANNA)),
    ("a move's reason", InvalidArtifact, lambda registry, text: registry.move_alias(
        TASK, "production", "v1", reason=text, principal=ANNA)),
    ("a deletion's reason", InvalidArtifact, lambda registry, text: registry.delete_version(
        TASK, "v1", reason=text, principal=ANNA)),
    ("a collection's reason", InvalidArtifact, lambda registry, text: registry.collect(timedelta(0), ANNA, text)),
]  # fmt: skip


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"], ids=["NUL", "half a character"])
@pytest.mark.parametrize(("error", "enter"), [entry[1:] for entry in BY_TEXT], ids=[entry[0] for entry in BY_TEXT])
def test_text_that_a_database_cannot_hold_is_refused_wherever_it_enters(
    registry: Registry, text: str, error: type[StoreError], enter: Callable[[Registry, str], Any]
) -> None:
    publish(registry)
    before = registry.snapshot()
    with pytest.raises(error) as refusal:
        enter(registry, text)
    assert repr(text) in str(refusal.value)
    assert registry.snapshot() == before


def test_a_remote_model_of_such_text_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidArtifact, match="holds NUL"):
        publish(registry, payload_content=RemoteModelPayload(provider="openai", model="ft:a\0b"))


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "c" * 129},
        {"context_length": 2**31},
        {"vocabulary_size": 0},
        {"kv_heads": 0},
        {"name": ""},
    ],
)
def test_a_base_that_a_column_cannot_hold_is_refused(registry: Registry, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArtifact, match=r"describe the loaded model|give at most 128"):
        registry.register_base(replace(FRESH, **changes), ANNA)
    assert registry.bases() == [BASE]
