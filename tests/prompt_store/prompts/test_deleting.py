import pytest
from sqlalchemy import func, insert, select

from prompt_store.canonical import canonical_json
from prompt_store.errors import Conflict, InUse, SchemaMismatch, UnknownVersion
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.version import EnsemblePayload
from prompt_store.routing.routes import DirectRoute, TaskRoute
from prompt_store.tables import audit, route_revisions, tensors, version_tensors, versions
from tests.prompt_store.building import ANNA, BASE, BORIS, prompt, publish, task

TASK = "support_intents"


@pytest.fixture
def digests(registry: Registry) -> list[str]:
    """Three versions."""
    return [publish(registry, seed=seed).version.digest for seed in range(3)]


def delete(registry: Registry, selector: str) -> str:
    return registry.delete_version(TASK, selector, reason="a mistake", principal=BORIS).label


def route_by(registry: Registry, document: dict[str, object]) -> None:
    """Puts a route in force that this release knows and does not yet apply."""
    with registry.database.write() as connection:
        connection.execute(
            insert(route_revisions).values(
                task=TASK,
                number=1,
                document=canonical_json(document).decode(),
                created_at=registry.task(TASK).created_at,
                principal="anna",
            )
        )


def count(registry: Registry, *tables: object) -> list[int]:
    with registry.database.read() as connection:
        return [connection.execute(select(func.count()).select_from(table)).scalar_one() for table in tables]


def test_a_deleted_version_is_gone_with_its_tensor_and_the_audit_says_who_and_why(
    registry: Registry, digests: list[str]
) -> None:
    assert delete(registry, "v2") == "v2"
    with pytest.raises(UnknownVersion):
        registry.version(TASK, "v2")
    assert count(registry, versions, version_tensors, tensors) == [2, 2, 2]
    assert registry.soft_prompt(digests[0]) == prompt(0)
    change = registry.changes_since(0)[-1]
    assert (change.kind, change.task, change.subject, change.principal) == ("version", TASK, digests[1], "boris")
    with registry.database.read() as connection:
        row = connection.execute(select(audit).where(audit.c.sequence == change.sequence)).one()
    assert (row.action, row.reason, row.details) == (
        "version.delete",
        "a mistake",
        '{"kind":"soft_prompt","number":2}',
    )


def test_the_number_of_a_deleted_version_is_never_given_again(registry: Registry, digests: list[str]) -> None:
    delete(registry, "v3")
    assert publish(registry, seed=9).version.label == "v4"
    assert publish(registry, seed=2).version.label == "v5"


def test_a_tensor_that_another_version_has_too_stays(registry: Registry, digests: list[str]) -> None:
    registry.apply_task(task(labels=["refund", "delivery", "other"]), ANNA)
    shared = publish(registry, seed=0).version
    assert shared.label == "v4"
    delete(registry, "v1")
    assert registry.soft_prompt(shared.digest) == prompt(0)
    delete(registry, "v4")
    assert count(registry, tensors) == [2]


def test_a_version_that_aliases_name_is_kept_and_the_refusal_names_them(registry: Registry, digests: list[str]) -> None:
    for alias in ("production", "candidate"):
        registry.move_alias(TASK, alias, "v1", reason="", principal=ANNA)
    with pytest.raises(
        InUse, match=r"v1 \(.*\) of task 'support_intents' is needed by alias 'candidate', alias 'production'; move"
    ) as caught:
        delete(registry, "candidate")
    assert isinstance(caught.value, Conflict)
    assert caught.value.current == digests[0]
    assert caught.value.users == ("alias 'candidate'", "alias 'production'")
    assert delete(registry, "v2") == "v2"


@pytest.mark.parametrize("selector", ["number", "digest", "prefix", "alias"])
def test_a_version_that_the_route_names_is_kept(registry: Registry, digests: list[str], selector: str) -> None:
    registry.move_alias(TASK, "stable", "v1", reason="", principal=ANNA)
    named = {"number": "v1", "digest": digests[0], "prefix": digests[0][:8], "alias": "stable"}[selector]
    registry.apply_route(TASK, TaskRoute(route=DirectRoute(version=named)), ANNA)
    with pytest.raises(InUse, match=rf"the route in force \(by '{named}'\)"):
        delete(registry, "v1")
    registry.apply_route(TASK, TaskRoute(route=DirectRoute(version="v2")), ANNA)
    registry.remove_alias(TASK, "stable", reason="", principal=ANNA)
    assert delete(registry, "v1") == "v1"
    with pytest.raises(InUse, match="the route in force"):
        delete(registry, "v2")


def test_a_version_in_an_arm_of_an_experiment_deep_inside_a_route_is_kept(
    registry: Registry, digests: list[str]
) -> None:
    arms = [{"name": name, "weight": 0.5, "route": {"kind": "direct", "version": name}} for name in ("v1", "v2")]
    split = {"kind": "split", "experiment": "labels", "arms": arms}
    shadowed = {"kind": "shadow", "primary": {"kind": "direct"}, "shadow": split}
    route_by(registry, {"kind": "fallback", "routes": [shadowed, {"kind": "direct"}]})
    for selector in ("v1", "v2"):
        with pytest.raises(InUse, match="the route in force"):
            delete(registry, selector)
    assert delete(registry, "v3") == "v3"


def test_a_route_of_another_release_keeps_every_version_of_its_task(registry: Registry, digests: list[str]) -> None:
    route_by(registry, {"kind": "bandit", "versions": ["v1"]})
    with pytest.raises(SchemaMismatch, match="another release"):
        delete(registry, "v2")
    assert count(registry, versions) == [3]


def test_a_member_of_an_ensemble_is_kept_as_long_as_the_ensemble(registry: Registry, digests: list[str]) -> None:
    payload = EnsemblePayload(members=(digests[0], digests[1]), base_fingerprint=BASE.fingerprint)
    publish(registry, payload_content=payload, base_fingerprint=None)
    with pytest.raises(InUse, match="is needed by ensemble v4"):
        delete(registry, "v1")
    assert [delete(registry, selector) for selector in ("v4", "v1")] == ["v4", "v1"]
    assert registry.soft_prompt(digests[1]) == prompt(1)


def test_what_is_not_there_cannot_be_deleted(registry: Registry, digests: list[str]) -> None:
    with pytest.raises(UnknownVersion, match="did you mean 'v3'"):
        delete(registry, "v4")


def test_a_rollback_to_a_deleted_version_names_it_and_says_what_to_do(registry: Registry, digests: list[str]) -> None:
    for selector in ("v2", "v1"):
        registry.move_alias(TASK, "production", selector, reason="", principal=ANNA)
    delete(registry, "v2")
    assert registry.rollback_target(TASK, "production") is None
    with pytest.raises(
        Conflict,
        match=rf"pointed at v2 \({digests[1][:12]}\) before, and that version was deleted by boris at .* "
        r"\(a mistake\); move it to another version",
    ):
        registry.rollback_alias(TASK, "production", reason="", principal=ANNA)
    assert registry.version(TASK, "production").label == "v1"
