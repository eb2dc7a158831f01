import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime

import pytest
from sqlalchemy import delete, event, update

from prompt_store.changes import record
from prompt_store.errors import InvalidName, SchemaMismatch
from prompt_store.names import AliasSelector, DigestSelector, NumberSelector
from prompt_store.prompts.registry import Registry, StoreSnapshot
from prompt_store.prompts.unreadable import Unreadable, UnreadableVersion, readable
from prompt_store.prompts.version import RemoteModelPayload
from prompt_store.routing.routes import DirectRoute, TaskRoute
from prompt_store.tables import route_revisions, task_revisions, version_tensors, versions
from tests.prompt_store.building import ANNA, BASE, calibration, publish, task

NAMES = ("alpha", "beta", "gamma")


@contextmanager
def statements(registry: Registry) -> Iterator[list[str]]:
    """The SQL that is sent meanwhile."""
    sent: list[str] = []

    def note(_: object, __: object, statement: str, *___: object) -> None:
        sent.append(statement)

    engine = registry.database.storage.engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


def remove(registry: Registry, name: str, digest: str) -> None:
    """Deletes a version as whoever deletes versions does: its rows, and a change that says so."""
    with registry.database.write() as connection:
        connection.execute(delete(version_tensors).where(version_tensors.c.version == digest))
        connection.execute(delete(versions).where(versions.c.digest == digest))
        record(
            connection, "version", action="version.delete", task=name, subject=digest, principal=ANNA,
            at=datetime.now(UTC),
        )  # fmt: skip


def change(registry: Registry, choose: random.Random, step: int) -> None:
    """One of the changes that a store sees."""
    name = choose.choice(NAMES)
    known = registry.snapshot().tasks.get(name)
    spare = [] if known is None else [digest for digest in known.versions if digest not in known.aliases.values()]
    kinds = ("task", "publish", "publish", "alias", "route", "base", "delete", "calibrate", "remote", "shutdown")
    what = choose.choice(kinds)
    if known is None or what == "task":
        registry.apply_task(task(name, description=f"edition {choose.randrange(4)}"), ANNA)
    elif what == "base":
        registry.register_base(replace(BASE, fingerprint=f"{choose.randrange(8):064}", name="another"), ANNA)
    elif what == "publish" or not known.versions:
        publish(registry, seed=step, alias=choose.choice((None, "production", "candidate")), task=name)
    elif what == "alias":
        target = choose.choice(list(known.versions))
        registry.move_alias(name, choose.choice(("production", "best")), target, reason="", principal=ANNA)
    elif what == "route":
        version = choose.choice([*known.aliases, *(f"v{number}" for number in known.numbers)])
        deadline_s = choose.choice((None, 5.0))
        registry.apply_route(name, TaskRoute(route=DirectRoute(version=version), deadline_s=deadline_s), ANNA)
    elif what == "calibrate":
        registry.calibrate(calibration(choose.choice(list(known.versions)), threshold=-choose.random()), ANNA)
    elif what == "remote":
        model = RemoteModelPayload(provider="openai", model=f"ft:acme::{step}")
        publish(registry, task=name, payload_content=model, base_fingerprint=None)
    elif what == "shutdown":
        remote = [version for version in map(readable, known.versions.values()) if version.base_fingerprint is None]
        for version in remote[:1]:
            day = choose.choice((None, date(2031, 1, 2)))
            registry.note_shutdown(name, version.digest, day, ANNA)
    elif spare:
        remove(registry, name, choose.choice(spare))


@pytest.mark.parametrize("seed", range(4))
def test_a_snapshot_after_another_equals_one_from_nothing(registry: Registry, seed: int) -> None:
    choose = random.Random(seed)
    following = registry.snapshot()
    for step in range(60):
        change(registry, choose, 1000 * seed + step)
        if choose.random() < 0.6:
            following = registry.snapshot(following)
            assert following == registry.snapshot()
    assert following.sequence > 20


def test_the_next_snapshot_shares_what_did_not_change(registry: Registry) -> None:
    registry.apply_task(task("other"), ANNA)
    first = publish(registry, seed=1, alias="production").version
    before = registry.snapshot()
    publish(registry, seed=2)
    with statements(registry) as sent:
        after = registry.snapshot(before)
    assert after.tasks["other"] is before.tasks["other"]
    assert after.bases is before.bases
    assert (
        after.tasks["support_intents"].versions[first.digest] is before.tasks["support_intents"].versions[first.digest]
    )
    assert list(after.tasks["support_intents"].numbers) == [1, 2]
    assert list(before.tasks["support_intents"].numbers) == [1]
    with statements(registry) as unchanged:
        assert registry.snapshot(after).tasks is after.tasks
    assert len(unchanged) < len(sent)


def test_neither_tensors_nor_evidence_are_read(registry: Registry) -> None:
    publish(registry, report={"accuracy": 0.9})
    with statements(registry) as sent:
        registry.snapshot()
    assert len(sent) > 5
    assert not [sql for sql in sent if "tensors" in sql or "report" in sql or "recipe" in sql]


def test_after_a_backup_was_restored_everything_is_read_anew(registry: Registry) -> None:
    publish(registry)
    now = registry.snapshot()
    from_later = StoreSnapshot(now.sequence + 5, {}, {})
    assert registry.snapshot(from_later) == now


def test_a_version_that_cannot_be_read_refuses_itself_and_its_alias_alone(registry: Registry) -> None:
    foreign = publish(registry, seed=1, alias="candidate").version
    whole = publish(registry, seed=2, alias="production").version
    damaged = publish(registry, seed=3).version
    with registry.database.write() as connection:
        for digest, values in (
            (foreign.digest, {"payload": '{"kind": "hologram"}', "kind": "hologram"}),
            (damaged.digest, {"provenance": "{"}),
        ):
            connection.execute(update(versions).where(versions.c.digest == digest).values(**values))
        connection.execute(
            update(versions)
            .where(versions.c.digest == foreign.digest)
            .values(provenance='{"code_version": "9.1.0", "planet": "Mars"}')
        )
    known = registry.snapshot().tasks["support_intents"]
    assert known.find(AliasSelector("production")) == whole
    found = known.find(AliasSelector("candidate"))
    assert isinstance(found, UnreadableVersion)
    assert (found.label, found.kind, found.digest) == ("v1", "hologram", foreign.digest)
    for digest, writer in ((foreign.digest, r"Softcue 9\.1\.0"), (damaged.digest, "another release of Softcue")):
        said = (
            rf"of task 'support_intents' .* was written by {writer}, or is damaged.*upgrade Softcue or restore a backup"
        )
        with pytest.raises(SchemaMismatch, match=said):
            readable(known.versions[digest])
        with pytest.raises(SchemaMismatch, match=said):
            registry.version("support_intents", digest)
    assert [version.label for version in registry.versions("support_intents")] == ["v3", "v2", "v1"]


def test_what_could_not_be_read_is_read_again_with_its_task(registry: Registry) -> None:
    version = publish(registry, seed=1).version
    with registry.database.write() as connection:
        connection.execute(update(versions).values(tags="["))
    before = registry.snapshot()
    with registry.database.write() as connection:
        connection.execute(update(versions).values(tags="[]"))
    publish(registry, seed=2)
    assert isinstance(before.tasks["support_intents"].versions[version.digest], UnreadableVersion)
    assert registry.snapshot(before).tasks["support_intents"].versions[version.digest] == version


def test_a_revision_or_route_that_cannot_be_read_leaves_the_rest_readable(registry: Registry) -> None:
    old = registry.task("support_intents")
    registry.apply_task(task("other"), ANNA)
    registry.apply_task(task(description="edited"), ANNA)
    version = publish(registry, task_revision=old.digest, alias="production").version
    registry.apply_route("support_intents", TaskRoute(deadline_s=3), ANNA)
    with registry.database.write() as connection:
        connection.execute(update(task_revisions).where(task_revisions.c.number == 2).values(document="{}"))
        connection.execute(update(route_revisions).values(whole='{"route": {"kind": "lottery"}}'))
    snapshot = registry.snapshot()
    assert snapshot.tasks["other"].revision == registry.task("other")
    known = snapshot.tasks["support_intents"]
    assert known.find(AliasSelector("production")) == version
    assert known.revisions[old.digest] == old
    for unreadable, said in ((known.revision, "revision 2 of task"), (known.route, "the route of task")):
        assert isinstance(unreadable, Unreadable)
        with pytest.raises(SchemaMismatch, match=said):
            readable(unreadable)


def test_an_ensemble_with_a_member_that_cannot_be_read_says_so(registry: Registry) -> None:
    from_members = [publish(registry, seed=seed).version for seed in (1, 2)]
    with registry.database.write() as connection:
        connection.execute(update(versions).where(versions.c.number == 2).values(payload="{}"))
    known = registry.snapshot().tasks["support_intents"]
    whole = readable(known.versions[from_members[0].digest])
    assert known.members(whole) == (whole,)
    payload = {"kind": "ensemble", "members": [v.digest for v in from_members], "base_fingerprint": BASE.fingerprint}
    ensemble = whole.model_validate({**whole.model_dump(), "payload": payload})
    with pytest.raises(SchemaMismatch, match="version v2"):
        known.members(ensemble)


def test_a_prefix_of_a_digest_finds_one_version_or_says_that_it_fits_several(registry: Registry) -> None:
    first = publish(registry, seed=1).version
    second = publish(registry, seed=2).version
    known = registry.snapshot().tasks["support_intents"]
    assert known.find(DigestSelector(first.digest)) == known.find(DigestSelector(first.digest[:8])) == first
    assert known.find(NumberSelector(2)) == second
    assert known.find(NumberSelector(3)) is known.find(DigestSelector("0" * 64)) is None
    assert known.find(DigestSelector("f" * 64)) is None
    twin = first.digest[:63] + ("0" if first.digest[63] != "0" else "1")
    twins = replace(known, versions={first.digest: first, twin: second})
    with pytest.raises(InvalidName, match="fits several versions"):
        twins.find(DigestSelector(first.digest[:12]))
    assert twins.find(DigestSelector(first.digest)) == first
