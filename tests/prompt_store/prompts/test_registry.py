from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from sqlalchemy import insert, select, update

from prompt_store.errors import (
    Conflict,
    DamagedArtifact,
    InvalidArtifact,
    InvalidName,
    SchemaMismatch,
    UnknownAlias,
    UnknownBase,
    UnknownTask,
    UnknownVersion,
)
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.registry import Evidence, Registry, TaskSnapshot
from prompt_store.prompts.task import parse_task
from prompt_store.prompts.template import Message
from prompt_store.prompts.version import PrefixPayload, TextPayload
from prompt_store.routing.routes import TaskRoute
from prompt_store.tables import tensors, version_tensors, versions
from tests.prompt_store.building import ANNA, BASE, BORIS, OTHER_BASE, prompt, publish, task


def test_a_base_is_registered_once(empty_registry: Registry) -> None:
    for base in (BASE, BASE, replace(BASE, name="the same under another name")):
        empty_registry.register_base(base, ANNA)
    assert empty_registry.bases() == [BASE]
    assert len(empty_registry.changes_since(0)) == 1


def test_a_fingerprint_stands_for_one_model(registry: Registry) -> None:
    with pytest.raises(Conflict, match=r"hidden_size=32 \(was 16\)"):
        registry.register_base(replace(BASE, hidden_size=32), ANNA)
    with pytest.raises(InvalidArtifact, match="has an empty name or fingerprint"):
        registry.register_base(replace(OTHER_BASE, layers=0), ANNA)
    assert registry.bases() == [BASE]


def test_a_base_is_found_by_name_fingerprint_or_prefix(registry: Registry) -> None:
    registry.register_base(OTHER_BASE, ANNA)
    registry.register_base(replace(OTHER_BASE, fingerprint="b2" * 31 + "ff"), ANNA)
    for name in ("demo-base", BASE.fingerprint, BASE.fingerprint[:8]):
        assert registry.find_base(name) == BASE
    with pytest.raises(UnknownBase, match="did you mean 'demo-base'"):
        registry.find_base("demobase")
    for ambiguous in ("other-base", "b2b2b2b2b2"):
        with pytest.raises(InvalidName, match="fits 2 bases"):
            registry.find_base(ambiguous)


def test_a_task_keeps_the_order_of_its_schemas_properties(empty_registry: Registry) -> None:
    properties = {"z": {"type": "string"}, "b": {"type": "string"}, "a": {"type": "string"}}
    document = {
        "name": "ordered",
        "kind": "extract",
        "inputs": ["text"],
        "messages": [{"role": "user", "content": "{text}"}],
        "json_schema": {"type": "object", "properties": properties},
    }
    stored = empty_registry.apply_task(parse_task(document), ANNA)
    assert stored.task.json_schema is not None
    assert list(stored.task.json_schema["properties"]) == ["z", "b", "a"]
    assert stored.digest == parse_task(document).digest


def test_applying_an_equal_task_adds_no_revision(registry: Registry) -> None:
    first = registry.task("support_intents")
    assert registry.apply_task(task(), BORIS) == first
    assert (first.number, first.principal) == (1, "anna")
    assert len(registry.changes_since(0)) == 2


def test_an_edited_task_is_a_new_revision_and_the_old_one_stays(registry: Registry) -> None:
    old = registry.task("support_intents")
    new = registry.apply_task(task(description="edited"), BORIS)
    assert (new.number, new.principal, new.task.description) == (2, "boris", "edited")
    assert registry.task("support_intents") == new
    assert registry.task_revision(old.digest) == old


def test_applying_an_older_revision_makes_it_current_again(registry: Registry) -> None:
    old = registry.task("support_intents")
    registry.apply_task(task(description="edited"), ANNA)
    assert registry.apply_task(task(), ANNA) == old
    assert registry.task("support_intents") == old
    assert [change.kind for change in registry.changes_since(1)] == ["task", "task", "task"]
    assert registry.apply_task(task(description="third"), ANNA).number == 3


def test_tasks_are_listed_by_name(registry: Registry) -> None:
    registry.apply_task(task("alpha"), ANNA)
    assert [revision.task.name for revision in registry.tasks()] == ["alpha", "support_intents"]


def test_an_unknown_task_names_the_nearest_everywhere(registry: Registry) -> None:
    calls: list[Callable[[], object]] = [
        lambda: registry.task("suport_intents"),
        lambda: registry.versions("suport_intents"),
        lambda: registry.version("suport_intents", "v1"),
        lambda: registry.aliases("suport_intents"),
        lambda: registry.alias_history("suport_intents", "production"),
        lambda: registry.move_alias("suport_intents", "a", "v1", reason="", principal=ANNA),
        lambda: publish(registry, task="suport_intents"),
    ]
    for call in calls:
        with pytest.raises(UnknownTask, match="did you mean 'support_intents'"):
            call()


def test_a_version_is_found_by_number_digest_prefix_and_alias(registry: Registry) -> None:
    first = publish(registry, seed=1, alias="production").version
    second = publish(registry, seed=2).version
    for selector in ("v1", first.digest, first.digest[:8], "production"):
        assert registry.version("support_intents", selector) == first
    assert registry.versions("support_intents") == [second, first]
    assert (first.label, second.label) == ("v1", "v2")


def test_an_unknown_version_names_the_nearest(registry: Registry) -> None:
    version = publish(registry, alias="production").version
    with pytest.raises(UnknownVersion, match="did you mean 'v1'"):
        registry.version("support_intents", "v7")
    with pytest.raises(UnknownAlias, match="did you mean 'production'"):
        registry.version("support_intents", "producton")
    with pytest.raises(UnknownVersion):
        registry.version("support_intents", "0123456789")
    mistyped = version.digest[:11] + ("0" if version.digest[11] != "0" else "1")
    with pytest.raises(UnknownVersion, match=f"did you mean '{version.digest[:12]}'"):
        registry.version("support_intents", mistyped)
    with pytest.raises(InvalidName):
        registry.version("support_intents", "v0")


def test_a_task_without_versions_says_so(registry: Registry) -> None:
    for selector, error in (("production", UnknownAlias), ("v1", UnknownVersion)):
        with pytest.raises(error, match="has no version yet"):
            registry.version("support_intents", selector)


def test_a_version_of_another_task_is_not_found(registry: Registry) -> None:
    registry.apply_task(task("other"), ANNA)
    version = publish(registry).version
    with pytest.raises(UnknownVersion):
        registry.version("other", version.digest)


def test_an_ambiguous_prefix_is_refused(registry: Registry) -> None:
    first = publish(registry).version.digest
    with registry.database.write() as connection:
        # No two digests share 8 digits in a test's lifetime, so make one that does.
        twin = first[:63] + ("0" if first[63] != "0" else "1")
        row = connection.execute(select(versions).where(versions.c.digest == first)).one()
        connection.execute(insert(versions).values({**row._mapping, "digest": twin, "number": 2}))
    with pytest.raises(InvalidName, match="fits several versions"):
        registry.version("support_intents", first[:12])
    assert registry.version("support_intents", first).label == "v1"


def test_a_snapshot_holds_everything_but_the_bytes(registry: Registry) -> None:
    old = registry.task("support_intents")
    first = publish(registry, seed=1, alias="production").version
    new = registry.apply_task(task(description="edited"), ANNA)
    second = publish(registry, seed=1, alias="candidate").version
    registry.apply_task(task("bare"), ANNA)
    snapshot = registry.snapshot()
    assert snapshot.sequence == len(registry.changes_since(0)) == 8
    bare = registry.task("bare")
    assert snapshot.tasks == {
        "support_intents": TaskSnapshot(
            name="support_intents",
            revision=new,
            revisions={old.digest: old, new.digest: new},
            versions={first.digest: first, second.digest: second},
            numbers={1: first.digest, 2: second.digest},
            aliases={"production": first.digest, "candidate": second.digest},
            route=TaskRoute(),
            calibrations={},
        ),
        "bare": TaskSnapshot("bare", bare, {bare.digest: bare}, {}, {}, {}, TaskRoute(), {}),
    }
    assert snapshot.bases == {BASE.fingerprint: BASE}


def test_an_empty_store_has_an_empty_snapshot(empty_registry: Registry) -> None:
    snapshot = empty_registry.snapshot()
    assert (snapshot.sequence, dict(snapshot.tasks), dict(snapshot.bases)) == (0, {}, {})


def test_rows_are_stamped_with_the_given_clock_and_principal(registry: Registry) -> None:
    moment = datetime(2030, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
    version = publish(Registry(registry.database, now=lambda: moment), alias="production").version
    assert (version.created_at, version.principal) == (moment, "anna")
    (move,) = registry.alias_history("support_intents", "production")
    assert (move.at, move.principal) == (moment, "anna")
    assert registry.changes_since(3)[0].at == moment


def test_a_document_of_another_release_is_a_schema_mismatch(registry: Registry) -> None:
    publish(registry)
    with registry.database.write() as connection:
        connection.exec_driver_sql('UPDATE versions SET payload = \'{"kind": "hologram"}\'')
    with pytest.raises(SchemaMismatch, match="v1 of task 'support_intents'"):
        registry.version("support_intents", "v1")
    with registry.database.write() as connection:
        connection.exec_driver_sql('UPDATE task_revisions SET document = \'{"name": "support_intents"}\'')
    with pytest.raises(SchemaMismatch, match="revision 1 of task 'support_intents'"):
        registry.task("support_intents")


def test_evidence_is_read_when_it_is_asked_for(registry: Registry) -> None:
    judged = publish(registry, seed=1, report={"accuracy": 0.9}).version
    bare = publish(registry, seed=2).version
    with registry.database.write() as connection:
        connection.execute(update(versions).where(versions.c.digest == judged.digest).values(recipe='{"seed": 7}'))
    assert registry.evidence(judged.digest) == Evidence({"accuracy": 0.9}, {"seed": 7})
    assert registry.evidence(bare.digest) == Evidence(None, None)
    with pytest.raises(UnknownVersion):
        registry.evidence("0" * 64)
    with registry.database.write() as connection:
        connection.execute(update(versions).where(versions.c.digest == judged.digest).values(report="{"))
    with pytest.raises(SchemaMismatch, match=r"report or recipe of version .* is damaged"):
        registry.evidence(judged.digest)


@pytest.fixture
def prefixed(registry: Registry) -> tuple[str, Prefix]:
    """The digest of a version that was made a prefix behind the registry's back, and the prefix."""
    values = np.random.default_rng(3).normal(size=(2, 2, 1, 5, 8)).astype("<f4")
    prefix = Prefix("F32", (2, 2, 1, 5, 8), values.tobytes())
    payload = PrefixPayload(tensors={"prefix": prefix.digest}, dtype="F32", length=5, base_fingerprint=BASE.fingerprint)
    version = publish(registry).version
    with registry.database.write() as connection:
        connection.execute(
            insert(tensors).values(
                digest=prefix.digest, dtype="F32", shape="[2,2,1,5,8]", size_bytes=640, data=prefix.data
            )
        )
        connection.execute(update(version_tensors).values(name="prefix", tensor=prefix.digest))
        connection.execute(update(versions).values(kind="prefix", payload=payload.model_dump_json()))
    return version.digest, prefix


def test_a_prefix_is_read_whole_and_is_no_soft_prompt(registry: Registry, prefixed: tuple[str, Prefix]) -> None:
    digest, prefix = prefixed
    assert registry.prompt(digest) == prefix
    with pytest.raises(InvalidArtifact, match="holds a prefix payload, not a soft prompt"):
        registry.soft_prompt(digest)


@pytest.mark.parametrize(
    "wrong",
    [{"shape": "[2,2,1,8,5]"}, {"shape": "[2,2,5,8]"}, {"shape": "{"}, {"shape": '"abcde"'}, {"data": b"\x00" * 640}],
)
def test_a_prefix_whose_row_was_changed_is_damaged(
    registry: Registry, prefixed: tuple[str, Prefix], wrong: dict[str, object]
) -> None:
    digest, prefix = prefixed
    with registry.database.write() as connection:
        connection.execute(update(tensors).where(tensors.c.digest == prefix.digest).values(**wrong))
    with pytest.raises(DamagedArtifact, match="is damaged on disk"):
        registry.prompt(digest)


def test_a_soft_prompt_is_a_prompt_and_a_text_has_none(registry: Registry) -> None:
    soft = publish(registry, seed=1).version
    assert registry.prompt(soft.digest) == registry.soft_prompt(soft.digest) == prompt(1)
    text = publish(registry, payload_content=TextPayload(messages=(Message(role="user", content="{message}"),)))
    with pytest.raises(InvalidArtifact, match="holds a text payload"):
        registry.prompt(text.version.digest)
