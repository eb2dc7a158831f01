from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, event, update

from prompt_store.errors import (
    BaseMismatch,
    DamagedArtifact,
    InvalidArtifact,
    InvalidName,
    StoreError,
    UnknownBase,
    UnknownVersion,
)
from prompt_store.prompts.registry import Evidence, NewVersion, Registry
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.template import Message
from prompt_store.prompts.version import (
    EnsemblePayload,
    Provenance,
    SoftPromptPayload,
    TextPayload,
)
from prompt_store.tables import tensors, version_tensors, versions
from tests.prompt_store.building import ANNA, BASE, BORIS, OTHER_BASE, prefix, prompt, publish, task

A, B = "a" * 64, "b" * 64
NAN = SoftPrompt.from_float32(np.array([[0.0] * 16, [np.nan] * 16]))


def text(content: str = "Classify: {message}") -> TextPayload:
    return TextPayload(messages=(Message(role="user", content=content),))


def count_rows(registry: Registry) -> dict[str, int]:
    with registry.database.read() as connection:
        return {
            table: connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()
            for table in ("versions", "tensors", "version_tensors", "aliases", "alias_moves", "changes", "audit")
        }


def test_a_published_soft_prompt_reads_back_exactly(registry: Registry) -> None:
    provenance = Provenance(recipe_hash="r", seed=3, run_as="float32 on cpu")
    published = publish(registry, provenance=provenance, report={"accuracy": 0.9}, notes="n", tags=("b", "a", "b"))
    version = published.version
    assert published.created
    assert registry.version("support_intents", "v1") == version
    assert version.payload == SoftPromptPayload(
        tensor_digest=prompt().digest, dtype="F32", shape=(4, 16), base_fingerprint=BASE.fingerprint
    )
    assert version.task_revision == task().digest
    assert (version.provenance, version.notes) == (provenance, "n")
    assert registry.evidence(version.digest) == Evidence({"accuracy": 0.9}, None)
    assert version.tags == ("b", "a")
    assert registry.soft_prompt(version.digest) == prompt()


def test_the_same_content_twice_is_one_version_and_the_alias_still_moves(registry: Registry) -> None:
    first = publish(registry, seed=1, notes="first")
    publish(registry, seed=2, alias="production")
    before = count_rows(registry)
    again = registry.publish(
        NewVersion("support_intents", prompt(1), BASE.fingerprint, notes="second"), "production", "back", BORIS
    )
    assert (again.version, again.created) == (first.version, False)
    assert again.version.notes == "first"
    assert registry.version("support_intents", "production") == first.version
    assert count_rows(registry) == before | {
        "alias_moves": before["alias_moves"] + 1,
        "changes": before["changes"] + 1,
        "audit": before["audit"] + 1,
    }


def test_the_same_content_twice_under_the_same_alias_writes_nothing(registry: Registry) -> None:
    publish(registry, alias="production")
    before = count_rows(registry)
    assert not publish(registry, alias="production").created
    assert count_rows(registry) == before


def test_one_tensor_for_two_tasks_is_stored_once_as_two_versions(registry: Registry) -> None:
    registry.apply_task(task("other"), ANNA)
    versions = [publish(registry).version, publish(registry, task="other").version]
    assert [version.label for version in versions] == ["v1", "v1"]
    assert versions[0].digest != versions[1].digest
    rows = count_rows(registry)
    assert (rows["tensors"], rows["versions"]) == (1, 2)
    assert [registry.soft_prompt(version.digest) for version in versions] == [prompt(), prompt()]


def test_one_tensor_for_two_bases_is_two_versions(registry: Registry) -> None:
    registry.register_base(OTHER_BASE, ANNA)
    assert publish(registry).version.label == "v1"
    assert publish(registry, base_fingerprint=OTHER_BASE.fingerprint).version.label == "v2"


def test_a_version_answers_the_revision_that_was_current_or_was_named(registry: Registry) -> None:
    old = registry.task("support_intents").digest
    new = registry.apply_task(task(description="edited"), ANNA).digest
    assert publish(registry).version.task_revision == new
    assert publish(registry, task_revision=old).version.task_revision == old
    with pytest.raises(UnknownVersion):
        publish(registry, task_revision=A)
    other = registry.apply_task(task("other"), ANNA).digest
    with pytest.raises(InvalidArtifact, match="belongs to task 'other'"):
        publish(registry, task_revision=other)


def test_a_text_prompt_is_published_for_any_base(registry: Registry) -> None:
    published = publish(registry, payload_content=text(), base_fingerprint=None, alias="production")
    assert published.version.payload == text()
    assert published.version.base_fingerprint is None
    judged = publish(registry, payload_content=text("{message}?"))
    assert judged.version.provenance.base_fingerprint == BASE.fingerprint
    with pytest.raises(InvalidArtifact, match="holds a text payload, not a soft prompt"):
        registry.soft_prompt(published.version.digest)


def ensemble(*members: str, base: str = BASE.fingerprint) -> EnsemblePayload:
    return EnsemblePayload(members=members, base_fingerprint=base)


def test_an_ensemble_answers_the_revision_of_its_members_in_whatever_order_they_are_named(registry: Registry) -> None:
    one, two = (publish(registry, seed=seed).version for seed in (1, 2))
    registry.apply_task(task(description="edited"), ANNA)
    first = publish(registry, payload_content=ensemble(one.digest, two.digest), base_fingerprint=None)
    again = publish(registry, payload_content=ensemble(two.digest, one.digest), alias="production")
    assert (first.version.task_revision, first.version.base_fingerprint) == (one.task_revision, BASE.fingerprint)
    assert (again.created, again.version) == (False, first.version)
    assert registry.version("support_intents", "production").payload == first.version.payload


def test_an_ensembles_members_share_task_revision_and_base_and_are_soft_prompts(registry: Registry) -> None:
    registry.register_base(OTHER_BASE, ANNA)
    one = publish(registry, seed=1).version
    elsewhere = publish(registry, seed=2, base_fingerprint=OTHER_BASE.fingerprint).version
    words = publish(registry, payload_content=text()).version
    registry.apply_task(task("other"), ANNA)
    foreign = registry.publish(NewVersion("other", prompt(3), BASE.fingerprint), None, "", ANNA).version
    registry.apply_task(task(description="edited"), ANNA)
    later = publish(registry, seed=4).version
    for member, error, said in (
        (elsewhere, BaseMismatch, "was tuned on base"),
        (words, InvalidArtifact, "is of kind 'text'; name soft prompts"),
        (foreign, InvalidArtifact, "belongs to task 'other'"),
        (later, InvalidArtifact, "not that of the others"),
    ):
        with pytest.raises(error, match=said):
            publish(registry, payload_content=ensemble(one.digest, member.digest))


BAD: list[tuple[dict[str, Any], type[StoreError], str]] = [
    ({"payload_content": prompt(hidden_size=8)}, BaseMismatch, "H=8 but base 'demo-base' has H=16; retrain it"),
    ({"payload_content": prompt(length=64)}, BaseMismatch, "P=64 virtual tokens but .* context of 64"),
    ({"payload_content": NAN}, InvalidArtifact, "NaN or infinite values, first in row 1"),
    ({"payload_content": SoftPrompt("F32", (4, 16), bytes(255))}, InvalidArtifact, "needs 256 bytes but has 255"),
    ({"payload_content": SoftPrompt("F64", (4, 16), bytes(512))}, InvalidArtifact, "dtype 'F64'"),
    ({"base_fingerprint": "a1" * 31 + "ff"}, UnknownBase, f"did you mean '{BASE.fingerprint}'"),
    ({"base_fingerprint": "nowhere"}, UnknownBase, "make it known to this store"),
    ({"base_fingerprint": None}, InvalidArtifact, "give that base's fingerprint"),
    ({"alias": "v7"}, InvalidName, "reads as a version number"),
    ({"report": {"loss": float("nan")}}, InvalidArtifact, "report cannot be stored as JSON"),
    ({"payload_content": text("{title}")}, InvalidArtifact, "uses {title}, which is not an input"),
    ({"payload_content": text("{")}, InvalidArtifact, "a lone '{'"),
    ({"payload_content": ensemble(A, A)}, InvalidArtifact, "names a member twice"),
    ({"payload_content": ensemble(A, B)}, UnknownVersion, f"no version '{A}'"),
    ({"payload_content": prefix(layers=3)}, BaseMismatch, "layers of 3 but base 'demo-base' has 2"),
    ({"payload_content": prefix(kv_heads=4)}, BaseMismatch, "KV heads of 4 but base 'demo-base' has 2"),
    ({"payload_content": prefix(head_size=4)}, BaseMismatch, "a head size of 4 but base 'demo-base' has 8"),
    ({"payload_content": prefix(length=64)}, BaseMismatch, "which leaves no room for a request"),
    ({"payload_content": prefix(), "base_fingerprint": None}, InvalidArtifact, "a prefix runs only on the base"),
    ({"recipe": {"rate": float("nan")}}, InvalidArtifact, "the recipe cannot be stored as JSON"),
]


@pytest.mark.parametrize(("changes", "error", "reason"), BAD, ids=[reason for _, _, reason in BAD])
def test_what_is_refused_leaves_nothing(
    registry: Registry, changes: dict[str, Any], error: type[StoreError], reason: str
) -> None:
    before = count_rows(registry)
    with pytest.raises(error, match=reason):
        publish(registry, **changes)
    assert count_rows(registry) == before


def test_a_publish_that_fails_halfway_leaves_nothing(registry: Registry) -> None:
    def fail(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO alias_moves"):
            raise RuntimeError("halfway")

    before = count_rows(registry)
    event.listen(registry.database.storage.engine, "before_cursor_execute", fail)
    with pytest.raises(RuntimeError, match="halfway"):
        publish(registry, alias="production")
    event.remove(registry.database.storage.engine, "before_cursor_execute", fail)
    assert count_rows(registry) == before
    assert publish(registry).version.label == "v1"


def test_a_flipped_byte_is_never_served(registry: Registry) -> None:
    damaged, whole = publish(registry, seed=1).version, publish(registry, seed=2).version
    assert isinstance(damaged.payload, SoftPromptPayload)
    data = bytearray(prompt(1).data)
    data[7] ^= 1
    with registry.database.write() as connection:
        of_it = tensors.c.digest == damaged.payload.tensor_digest
        connection.execute(update(tensors).where(of_it).values(data=bytes(data)))
    with pytest.raises(InvalidArtifact, match="is damaged on disk"):
        registry.soft_prompt(damaged.digest)
    assert registry.soft_prompt(whole.digest) == prompt(2)


def test_a_lost_tensor_is_said_and_an_unknown_version_too(registry: Registry) -> None:
    version = publish(registry).version
    with registry.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM version_tensors")
    with pytest.raises(DamagedArtifact, match="is missing"):
        registry.soft_prompt(version.digest)
    with pytest.raises(UnknownVersion):
        registry.soft_prompt(A)


def test_a_number_is_never_given_twice(registry: Registry) -> None:
    version = publish(registry, seed=1).version
    with registry.database.write() as connection:
        connection.execute(delete(version_tensors).where(version_tensors.c.version == version.digest))
        connection.execute(delete(versions).where(versions.c.digest == version.digest))
    assert publish(registry, seed=2).version.label == "v2"
