"""What each kind of version keeps, beside the soft prompts and texts of test_publishing."""

from dataclasses import replace
from datetime import UTC, datetime

from sqlalchemy import select, update

from prompt_store.access import Principal
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.version import PrefixPayload, RemoteModelPayload, SoftPromptPayload
from prompt_store.tables import audit, bases, tensors, versions
from tests.prompt_store.building import ANNA, BASE, prefix, prompt, publish


def test_a_prefix_is_one_tensor_bound_to_its_base(registry: Registry) -> None:
    version = publish(registry, payload_content=prefix(3)).version
    assert version.payload == PrefixPayload(
        tensors={"prefix": prefix(3).digest}, dtype="F32", length=3, base_fingerprint=BASE.fingerprint
    )
    with registry.database.read() as connection:
        row = connection.execute(select(tensors)).one()
    assert (row.digest, row.shape, bytes(row.data)) == (prefix(3).digest, "[2, 2, 2, 3, 8]", prefix(3).data)
    assert not publish(registry, payload_content=prefix(3)).created
    assert publish(registry, payload_content=prefix(4)).version.label == "v2"


def test_a_remote_model_needs_no_base(registry: Registry) -> None:
    model = RemoteModelPayload(provider="openai", model="ft:gpt-4o-mini-2024-07-18:acme::Ab12")
    version = registry.publish(NewVersion("support_intents", model), "candidate", "", ANNA).version
    assert (version.payload, version.base_fingerprint) == (model, None)
    assert registry.version("support_intents", "candidate") == version


def test_recipe_and_author_stay_with_a_version_and_are_no_part_of_its_digest(registry: Registry) -> None:
    recipe = {"optimise": {"learning_rate": 0.05}, "seed": 1}
    version = publish(registry, recipe=recipe, author="carla").version
    assert (version.author, version.principal) == ("carla", "anna")
    assert version.digest == publish(registry).version.digest
    with registry.database.read() as connection:
        stored = connection.execute(select(versions.c.recipe)).scalar_one()
    assert stored == '{"optimise":{"learning_rate":0.05},"seed":1}'


def test_publishing_again_puts_a_damaged_tensor_right(registry: Registry) -> None:
    version = publish(registry).version
    assert isinstance(version.payload, SoftPromptPayload)
    with registry.database.write() as connection:
        connection.execute(update(tensors).values(data=b"\x00" * len(prompt().data)))
    sequence = registry.snapshot().sequence
    assert not publish(registry).created
    assert registry.soft_prompt(version.digest) == prompt()
    with registry.database.read() as connection:
        assert connection.execute(select(audit.c.action).order_by(audit.c.sequence.desc()).limit(1)).scalar_one() == (
            "version.repair"
        )
    assert registry.snapshot().sequence == sequence + 1
    publish(registry)
    assert registry.snapshot().sequence == sequence + 1


def test_a_base_that_an_earlier_release_registered_gets_its_kv_sizes(empty_registry: Registry) -> None:
    with empty_registry.database.write() as connection:
        connection.execute(
            bases.insert().values(
                fingerprint=BASE.fingerprint,
                name="older-name",
                hidden_size=BASE.hidden_size,
                layers=BASE.layers,
                context_length=BASE.context_length,
                vocabulary_size=BASE.vocabulary_size,
                architecture=BASE.architecture,
                created_at=datetime.now(UTC),
                principal="anna",
            )
        )
    empty_registry.register_base(BASE, Principal("service"))
    assert empty_registry.bases() == [replace(BASE, name="older-name")]
    assert [change.kind for change in empty_registry.changes_since(0)] == ["base"]
    empty_registry.register_base(BASE, Principal("service"))
    assert len(empty_registry.changes_since(0)) == 1
