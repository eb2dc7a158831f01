"""Versions that go from one store into another by way of a directory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prompt_store.database import Database
from prompt_store.errors import (
    Conflict,
    InvalidArtifact,
    InvalidName,
    UnknownAlias,
    UnknownTask,
    UnknownVersion,
)
from prompt_store.interchange.hub import HubRepository
from prompt_store.interchange.sharing import Directory, parse_place, pull, push
from prompt_store.interchange.version_folder import FILE_LIMITS
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.template import Message
from prompt_store.prompts.version import (
    RemoteModelPayload,
    TextPayload,
)
from tests.prompt_store.building import ANNA, BASE, BORIS, prefix, prompt, publish, task
from tests.prompt_store.interchange.shared import EVIDENCE, NAME, edit, ensemble, same, version_json

WORDS = TextPayload(messages=(Message(role="user", content="{message}?"),))
MODEL = RemoteModelPayload(provider="openai", model="ft:gpt-4o-mini-2024-07-18:acme::Ab12")


def test_a_soft_prompt_goes_from_store_to_store_with_all_that_is_known_of_it(
    registry: Registry, other: Registry, place: Directory
) -> None:
    version = publish(registry, alias="production", **EVIDENCE).version
    pushed = push(registry, NAME, "production", place)
    assert ([entry.digest for entry in pushed.written], pushed.present, pushed.commit) == ([version.digest], (), None)
    assert sorted(path.name for path in (place.path / NAME / version.digest).iterdir()) == sorted(FILE_LIMITS)
    (pulled,) = pull(other, place, NAME, "production", alias="candidate", principal=BORIS, reason="from the team")
    assert (pulled.version.digest, pulled.label_there, pulled.created, pulled.alias) == (
        version.digest, "v1", True, "candidate",
    )  # fmt: skip
    same(registry, other, version.digest)
    assert other.prompt(version.digest) == prompt()
    assert other.bases() == [BASE]
    assert (pulled.version.principal, pulled.version.author) == ("boris", "carla")
    (move,) = other.alias_history(NAME, "candidate")
    assert (move.target, move.reason, move.principal) == (version.digest, "from the team", "boris")


def test_every_kind_of_version_arrives_as_the_same_version(
    registry: Registry, other: Registry, place: Directory
) -> None:
    contents = [prompt(1), prefix(2), WORDS, MODEL]
    versions = [publish(registry, payload_content=content).version for content in contents] + [ensemble(registry)]
    push(registry, NAME, None, place)
    pulled = pull(other, place, principal=BORIS)
    assert {entry.version.digest for entry in pulled} == {version.digest for version in registry.versions(NAME)}
    for version in versions:
        same(registry, other, version.digest)
    assert other.prompt(versions[1].digest) == prefix(2)


def test_an_ensemble_brings_its_members_before_itself(registry: Registry, other: Registry, place: Directory) -> None:
    publish(registry, 1)
    whole = ensemble(registry)
    assert len(push(registry, NAME, whole.digest, place).written) == 3
    pulled = pull(other, place, NAME, whole.digest[:10], alias="candidate", principal=BORIS)
    assert [entry.version.payload.kind for entry in pulled] == ["soft_prompt", "soft_prompt", "ensemble"]
    assert [entry.alias for entry in pulled] == [None, None, "candidate"]
    assert other.version(NAME, "candidate").digest == whole.digest


def test_an_ensemble_without_its_member_is_refused(registry: Registry, other: Registry, place: Directory) -> None:
    whole = ensemble(registry)
    push(registry, NAME, whole.digest, place)
    member = place.path / NAME / registry.version(NAME, "v1").digest
    member.rename(place.path / "elsewhere")
    with pytest.raises(InvalidArtifact, match=f"{member.name}: is not there, but the ensemble {whole.digest[:12]}"):
        pull(other, place, NAME, whole.digest, principal=BORIS)
    assert other.snapshot().sequence == 0


def test_pushing_and_pulling_again_changes_nothing(registry: Registry, other: Registry, place: Directory) -> None:
    publish(registry, alias="production", **EVIDENCE)
    push(registry, NAME, None, place)
    pull(other, place, principal=BORIS)
    files = {path: path.read_bytes() for path in place.path.rglob("*") if path.is_file()}
    before = other.snapshot()
    again = push(registry, NAME, None, place)
    assert (again.written, [version.label for version in again.present]) == ((), ["v1"])
    assert {path: path.read_bytes() for path in place.path.rglob("*") if path.is_file()} == files
    assert [entry.created for entry in pull(other, place, principal=BORIS)] == [False]
    assert other.snapshot() == before


def test_two_stores_push_to_one_place_and_neither_loses_anything(
    registry: Registry, other: Registry, place: Directory, tmp_path: Path
) -> None:
    other.register_base(BASE, BORIS)
    other.apply_task(task(), BORIS)
    publish(registry, 1, alias="production")
    shared = publish(registry, 2).version
    publish(other, 2, author="someone else")
    publish(other, 3, alias="mine")
    push(registry, NAME, None, place)
    pushed = push(other, NAME, None, place)
    assert [version.digest for version in pushed.present] == [shared.digest]
    aliases = json.loads((place.path / NAME / "aliases.json").read_text())
    assert aliases == {
        "mine": other.version(NAME, "mine").digest,
        "production": registry.version(NAME, "production").digest,
    }
    with Database.open(tmp_path / "third.db", create=True) as database:
        third = Registry(database)
        assert len(pull(third, place, principal=ANNA)) == 3
        assert third.version(NAME, shared.digest).author == "anna"


def test_a_pulled_revision_does_not_change_what_callers_are_asked(
    registry: Registry, other: Registry, place: Directory
) -> None:
    version = publish(registry).version
    push(registry, NAME, None, place)
    edited = task(labels=["refund", "delivery", "other"])
    other.apply_task(edited, BORIS)
    pull(other, place, principal=BORIS)
    assert other.task(NAME).task == edited
    assert other.version(NAME, "v1").task_revision == version.task_revision == task().digest


def test_a_task_keeps_its_authors_order_of_keys(registry: Registry, other: Registry, place: Directory) -> None:
    properties = {"z": {"type": "string"}, "a": {"type": "string"}}
    ordered = task("ordered", kind="extract", labels=[], json_schema={"type": "object", "properties": properties})
    registry.apply_task(ordered, ANNA)
    publish(registry, task="ordered")
    push(registry, "ordered", None, place)
    pull(other, place, principal=BORIS)
    schema = other.task("ordered").task.json_schema
    assert schema is not None
    assert list(schema["properties"]) == ["z", "a"]


def test_a_base_that_is_known_with_other_sizes_is_refused(
    registry: Registry, other: Registry, place: Directory
) -> None:
    publish(registry)
    push(registry, NAME, None, place)
    edit(version_json(place), lambda document: document["base"].update(layers=3))
    other.register_base(BASE, BORIS)
    with pytest.raises(Conflict, match="layers=3"):
        pull(other, place, principal=BORIS)


def test_a_version_is_found_by_digest_label_and_alias(registry: Registry, other: Registry, place: Directory) -> None:
    first, second = publish(registry, 1).version, publish(registry, 2, alias="production").version
    push(registry, NAME, None, place)
    for selector, version in ((first.digest[:8], first), ("v1", first), ("v2", second), ("production", second)):
        (pulled,) = pull(other, place, NAME, selector, principal=BORIS)
        assert pulled.version.digest == version.digest
    with pytest.raises(UnknownTask, match="did you mean 'support_intents'"):
        pull(other, place, "support_intent", principal=BORIS)
    with pytest.raises(UnknownVersion, match="no version 'v9'"):
        pull(other, place, NAME, "v9", principal=BORIS)
    with pytest.raises(UnknownAlias, match="did you mean 'production'"):
        pull(other, place, NAME, "prodution", principal=BORIS)
    with pytest.raises(InvalidName, match="name the version to pull"):
        pull(other, place, NAME, alias="candidate", principal=BORIS)
    with pytest.raises(InvalidName, match="name the task too"):
        pull(other, place, None, "v1", principal=BORIS)
    with pytest.raises(InvalidName, match="is not a task name"):
        pull(other, place, "../..", principal=BORIS)


def test_a_label_that_two_stores_gave_is_ambiguous(registry: Registry, other: Registry, place: Directory) -> None:
    other.register_base(BASE, BORIS)
    other.apply_task(task(), BORIS)
    for store, seed in ((registry, 1), (other, 2)):
        publish(store, seed)
        push(store, NAME, None, place)
    with pytest.raises(InvalidName, match="fits 2 versions"):
        pull(registry, place, NAME, "v1", principal=ANNA)


def test_places_are_parsed() -> None:
    assert parse_place("some/folder") == Directory(Path("some/folder"))
    assert parse_place("hf://acme/prompts") == HubRepository("acme/prompts")
    assert parse_place("hf://acme/prompts@v1.0") == HubRepository("acme/prompts", "v1.0")
    assert str(parse_place("hf://acme/prompts@v1.0")) == "hf://acme/prompts@v1.0"
    for text in ("", "s3://bucket", "hf://prompts", "hf://a/b/c", "hf://acme/..", "hf://acme/prompts@", "hf://a b/c"):
        with pytest.raises(InvalidName, match=r"place to share at|names no model repository"):
            parse_place(text)


def test_the_card_lists_what_lies_there_and_somebodys_own_readme_stays(registry: Registry, place: Directory) -> None:
    publish(registry, **EVIDENCE)
    push(registry, NAME, None, place)
    card = place.path / "README.md"
    text = card.read_text()
    assert text.startswith("---\nlibrary_name: softcue\ntags:\n- softcue\n")
    assert "demo-base | carla" in text
    assert "tuned \\| by &lt;hand&gt; and twice" in text
    assert "base_model" not in text  # the hub refuses names that are no model ids
    card.write_text("# My own\n")
    push(registry, NAME, None, place)
    assert card.read_text() == "# My own\n"


def test_the_card_names_a_base_that_is_a_model_of_the_hub(other: Registry, place: Directory) -> None:
    other.register_base(replace(BASE, name="acme/small"), BORIS)
    other.apply_task(task(), BORIS)
    publish(other)
    push(other, NAME, None, place)
    assert "base_model:\n- acme/small\n" in (place.path / "README.md").read_text()


def test_a_push_that_is_interrupted_leaves_no_half_version(
    registry: Registry, other: Registry, place: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = publish(registry, 1, **EVIDENCE).version, publish(registry, 2, **EVIDENCE).version
    writes = 0
    write_bytes = Path.write_bytes

    def stop(self: Path, data: bytes) -> int:
        nonlocal writes
        writes += 1
        if writes == 8:
            raise KeyboardInterrupt
        return write_bytes(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            push(registry, NAME, None, place)
    assert [path.name for path in (place.path / NAME).iterdir()] == [first.digest]
    assert [entry.version.digest for entry in pull(other, place, principal=BORIS)] == [first.digest]
    assert [version.digest for version in push(registry, NAME, None, place).written] == [second.digest]
