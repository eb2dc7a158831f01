from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, func, insert, select

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.version import EnsemblePayload
from prompt_store.routing.routes import DirectRoute, TaskRoute, parse_task_route
from prompt_store.tables import audit, idempotency_keys, tensors
from prompt_store.upkeep.collecting import Collection, UnnamedVersion
from tests.prompt_store.building import ANNA, BASE, BORIS, LOCAL, calibration, prompt, publish, task

TASK = "support_intents"
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
GRACE = timedelta(days=30)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def pass_days(self, days: float) -> None:
        self.now += timedelta(days=days)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(database: Database, clock: Clock) -> Registry:
    made = Registry(database, now=clock)
    made.register_base(BASE, ANNA)
    made.apply_task(task(), ANNA)
    return made


def move(registry: Registry, selector: str, alias: str = "production") -> None:
    registry.move_alias(TASK, alias, selector, reason="", principal=ANNA)


def labels(found: Sequence[UnnamedVersion]) -> list[str]:
    return [version.label.partition("@")[2] for version in found]


def collect(registry: Registry) -> Collection:
    return registry.collect(GRACE, BORIS, "spring cleaning")


def test_versions_that_nothing_names_go_after_the_grace_period_and_the_plan_says_so_first(
    registry: Registry, clock: Clock
) -> None:
    digests = [publish(registry, seed=seed).version.digest for seed in range(2)]
    clock.pass_days(29)
    publish(registry, seed=2)
    assert labels(registry.plan_collection(GRACE).waiting) == ["v1", "v2", "v3"]
    clock.pass_days(2)
    plan = registry.plan_collection(GRACE)
    size = prompt().size_bytes
    assert plan == Collection(
        versions=tuple(
            UnnamedVersion(TASK, number, digest, "soft_prompt", size, START) for number, digest in enumerate(digests, 1)
        ),
        tensors=(),
        calibrations=0,
        answers=0,
        size_bytes=2 * size,
        waiting=plan.waiting,
    )
    assert labels(plan.waiting) == ["v3"]
    assert len(registry.versions(TASK)) == 3
    assert collect(registry) == plan
    assert [version.label for version in registry.versions(TASK)] == ["v3"]
    assert collect(registry) == replace(plan, versions=(), size_bytes=0)


def test_what_was_collected_is_in_the_audit_trail(registry: Registry, clock: Clock) -> None:
    digest = publish(registry).version.digest
    clock.pass_days(31)
    collect(registry)
    with registry.database.read() as connection:
        row = connection.execute(select(audit).order_by(audit.c.sequence.desc()).limit(1)).one()
    assert (row.action, row.subject, row.principal, row.reason, row.at) == (
        "version.delete",
        digest,
        "boris",
        "spring cleaning",
        clock.now,
    )
    assert registry.changes_since(0)[-1].subject == digest


def test_nothing_that_is_named_is_ever_collected(registry: Registry, clock: Clock) -> None:
    digests = [publish(registry, seed=seed).version.digest for seed in range(5)]
    members = EnsemblePayload(members=(digests[2], digests[3]), base_fingerprint=BASE.fingerprint)
    publish(registry, payload_content=members, base_fingerprint=None, alias="candidate")
    move(registry, "v1")
    registry.apply_route(TASK, TaskRoute(route=DirectRoute(version="v2")), ANNA)
    clock.pass_days(365)
    assert labels(collect(registry).versions) == ["v5"]
    assert [version.label for version in registry.versions(TASK)] == ["v6", "v4", "v3", "v2", "v1"]
    assert registry.soft_prompt(digests[2]) == prompt(2)


def test_versions_in_fallbacks_and_cascades_stay_and_calibrations_go_with_the_rest(
    registry: Registry, clock: Clock
) -> None:
    digests = [publish(registry, seed=seed).version.digest for seed in range(5)]
    for digest in digests:
        registry.calibrate(calibration(digest, "margin"), ANNA)
    leaf = [{"kind": "direct", "version": f"v{number}"} for number in range(1, 6)]
    cascade = {"kind": "cascade", "first": leaf[0], "second": leaf[1], "measure": "margin"}
    route = parse_task_route({"kind": "fallback", "routes": [cascade, leaf[2]]})
    registry.apply_route(TASK, route, ANNA, backends=[LOCAL])
    clock.pass_days(31)
    plan = registry.plan_collection(GRACE)
    assert (labels(plan.versions), plan.calibrations) == (["v4", "v5"], 2)
    assert collect(registry) == plan
    assert [entry.version for entry in registry.calibrations(TASK)] == digests[:3]


def test_what_a_rollback_would_return_to_is_kept_and_what_lies_before_it_is_not(
    registry: Registry, clock: Clock
) -> None:
    for seed in range(3):
        publish(registry, seed=seed, alias="production")
    clock.pass_days(31)
    assert labels(collect(registry).versions) == ["v1"]
    assert registry.rollback_alias(TASK, "production", reason="", principal=ANNA).number == 2
    # The rollback went to v2, whose own predecessor is gone, so nothing returns to v3 any more.
    assert labels(registry.plan_collection(GRACE).waiting) == ["v3"]


def test_the_grace_period_begins_when_the_last_alias_left(registry: Registry, clock: Clock) -> None:
    for seed in range(3):
        publish(registry, seed=seed)
    move(registry, "v1", "canary")
    clock.pass_days(100)
    left_at = clock.now
    registry.remove_alias(TASK, "canary", reason="", principal=ANNA)
    clock.pass_days(29)
    plan = registry.plan_collection(GRACE)
    assert (labels(plan.versions), labels(plan.waiting)) == (["v2", "v3"], ["v1"])
    assert plan.waiting[0].unnamed_since == left_at
    clock.pass_days(1)
    assert labels(collect(registry).versions) == ["v1", "v2", "v3"]


def test_an_ensemble_that_nothing_names_goes_with_the_members_that_only_it_needs(
    registry: Registry, clock: Clock
) -> None:
    digests = [publish(registry, seed=seed).version.digest for seed in range(3)]
    for members in (digests[:2], digests[1:]):
        payload = EnsemblePayload(members=tuple(members), base_fingerprint=BASE.fingerprint)
        publish(registry, payload_content=payload, base_fingerprint=None)
    move(registry, "v5")
    clock.pass_days(31)
    assert labels(collect(registry).versions) == ["v1", "v4"]
    move(registry, "v3")
    move(registry, "v2")
    clock.pass_days(31)
    assert labels(collect(registry).versions) == ["v5"]


def test_members_wait_with_their_ensemble(registry: Registry, clock: Clock) -> None:
    digests = [publish(registry, seed=seed).version.digest for seed in range(2)]
    clock.pass_days(29)
    payload = EnsemblePayload(members=tuple(digests), base_fingerprint=BASE.fingerprint)
    publish(registry, payload_content=payload, base_fingerprint=None)
    clock.pass_days(2)
    plan = registry.plan_collection(GRACE)
    assert (labels(plan.versions), labels(plan.waiting)) == ([], ["v1", "v2", "v3"])


def test_a_shared_tensor_frees_its_bytes_only_with_its_last_version(registry: Registry, clock: Clock) -> None:
    publish(registry, seed=0)
    registry.apply_task(task(labels=["refund", "delivery", "other"]), ANNA)
    publish(registry, seed=0, alias="production")
    clock.pass_days(31)
    plan = registry.plan_collection(GRACE)
    assert (labels(plan.versions), plan.versions[0].size_bytes, plan.size_bytes) == (["v1"], prompt().size_bytes, 0)
    assert collect(registry) == plan
    assert registry.soft_prompt(registry.version(TASK, "production").digest) == prompt(0)


def test_tensors_without_a_version_and_expired_answers_go(registry: Registry, clock: Clock) -> None:
    publish(registry, alias="production")
    with registry.database.write() as connection:
        connection.execute(
            insert(tensors).values(digest="d" * 64, dtype="F32", shape="[1,1]", size_bytes=4, data=b"abcd")
        )
        for key, hours in (("old", 25), ("new", 23)):
            connection.execute(
                insert(idempotency_keys).values(
                    principal="anna", key=key, request="e" * 64, answer="{}", created_at=START - timedelta(hours=hours)
                )
            )
    plan = registry.plan_collection(GRACE)
    assert ([tensor.digest for tensor in plan.tensors], plan.answers, plan.size_bytes) == (["d" * 64], 1, 4)
    assert collect(registry) == plan
    with registry.database.read() as connection:
        assert connection.execute(select(idempotency_keys.c.key)).scalars().all() == ["new"]
        assert connection.execute(select(func.count()).select_from(tensors)).scalar_one() == 1


def test_more_versions_than_one_transaction_takes_go_too(registry: Registry, clock: Clock) -> None:
    for seed in range(120):
        publish(registry, seed=seed)
    move(registry, "v60")
    clock.pass_days(31)
    plan = registry.plan_collection(GRACE)
    assert len(plan.versions) == 119
    assert collect(registry) == plan
    assert [version.label for version in registry.versions(TASK)] == ["v60"]


def test_a_quiet_store_is_planned_once_however_much_goes(registry: Registry, clock: Clock) -> None:
    for seed in range(120):
        publish(registry, seed=seed)
    clock.pass_days(31)
    plans: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "GROUP BY alias_moves.previous" in statement:
            plans.append(statement)

    event.listen(registry.database.storage.engine, "before_cursor_execute", note)
    assert len(collect(registry).versions) == 120
    assert len(plans) == 1


def test_what_is_named_between_two_transactions_of_a_collection_stays(registry: Registry, clock: Clock) -> None:
    for seed in range(120):
        publish(registry, seed=seed)
    clock.pass_days(31)

    def name_the_last(*_: Any) -> None:
        move(registry, "v120")

    event.listen(registry.database.storage.engine, "checkin", name_the_last, once=True)
    assert len(collect(registry).versions) == 119
    assert [version.label for version in registry.versions(TASK)] == ["v120"]
