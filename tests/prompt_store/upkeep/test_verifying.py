import json

import pytest
from sqlalchemy import select

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.version import EnsemblePayload
from prompt_store.routing.routes import DirectRoute, TaskRoute
from prompt_store.sqlite import SqliteStorage
from prompt_store.tables import changes, versions
from prompt_store.upkeep.verifying import Checked, Problem, verify
from tests.prompt_store.building import ANNA, BASE, LOCAL, calibration, prompt, publish, task
from tests.prompt_store.upkeep.damage import change, flip_file_byte, flip_tensor_byte

TASK = "support_intents"


@pytest.fixture
def registry(registry: Registry) -> Registry:
    """Has something in every table that verify looks at."""
    digests = [publish(registry, seed=seed, alias="production").version.digest for seed in range(3)]
    payload = EnsemblePayload(members=tuple(digests[:2]), base_fingerprint=BASE.fingerprint)
    publish(registry, payload_content=payload, base_fingerprint=None, alias="candidate")
    registry.rollback_alias(TASK, "production", reason="", principal=ANNA)
    registry.remove_alias(TASK, "candidate", reason="", principal=ANNA)
    registry.apply_route(TASK, TaskRoute(route=DirectRoute(version="v1")), ANNA)
    registry.apply_task(task(labels=["refund", "delivery", "other"]), ANNA)
    publish(registry, seed=0)
    publish(registry, seed=7)
    registry.delete_version(TASK, "v6", reason="", principal=ANNA)
    return registry


def problems(registry: Registry) -> list[Problem]:
    return list(verify(registry.database))


def only(registry: Registry) -> Problem:
    found = problems(registry)
    assert len(found) == 1, [str(problem) for problem in found]
    assert str(found[0]) == f"{found[0].where}: {found[0].message}; {found[0].remedy}"
    return found[0]


def publish_third(registry: Registry) -> None:
    """Publishes what v3 holds again."""
    first = registry.version(TASK, "v3")
    assert not publish(registry, seed=2, task_revision=first.task_revision).created


def found(registry: Registry) -> set[tuple[str, str]]:
    """Kind and place of each problem, without what SQLite's own check of foreign keys adds."""
    return {(problem.kind, problem.where) for problem in problems(registry) if not problem.where.startswith("table ")}


def test_a_whole_store_has_no_problems_and_says_what_was_checked(registry: Registry) -> None:
    checked = Checked()
    assert list(verify(registry.database, checked)) == []
    assert checked == Checked(
        tasks=1,
        revisions=2,
        versions=5,
        tensors=3,
        size_bytes=3 * prompt().size_bytes,
        aliases=1,
        changes=registry.snapshot().sequence,
    )


def test_an_empty_store_is_whole(database: Database) -> None:
    assert list(verify(database)) == []


def test_a_flipped_byte_of_a_tensor_is_found_and_its_versions_named(registry: Registry) -> None:
    flip_tensor_byte(registry.database, prompt(0).digest)
    problem = only(registry)
    assert (problem.kind, problem.where) == ("damaged", f"tensor {prompt(0).digest[:12]}")
    assert problem.versions == (f"{TASK}@v1", f"{TASK}@v5")
    assert "or publish the prompt of support_intents@v1 or support_intents@v5 again" in problem.remedy
    assert not publish(registry, seed=0).created
    assert problems(registry) == []


def test_every_damaged_tensor_is_named_and_the_rest_is_checked(registry: Registry) -> None:
    for seed in (0, 2):
        flip_tensor_byte(registry.database, prompt(seed).digest)
    checked = Checked()
    found = list(verify(registry.database, checked))
    assert {problem.where for problem in found} == {f"tensor {prompt(seed).digest[:12]}" for seed in (0, 2)}
    assert (checked.tensors, checked.versions) == (3, 5)


@pytest.mark.parametrize(
    ("column", "value"), [("shape", "[8,8]"), ("shape", "[8,"), ("dtype", "BF16"), ("size_bytes", 1)]
)
def test_a_tensor_is_hashed_with_its_dtype_and_shape(registry: Registry, column: str, value: object) -> None:
    change(registry.database, f"UPDATE tensors SET {column} = :value WHERE digest = :digest",
           value=value, digest=prompt(2).digest)  # fmt: skip
    problem = only(registry)
    assert (problem.kind, problem.versions) == ("damaged", (f"{TASK}@v3",))
    before = registry.snapshot()
    publish_third(registry)
    assert problems(registry) == []
    # Services look again.
    assert registry.snapshot(before).sequence == before.sequence + 1


def test_a_missing_tensor_is_named_with_its_versions(registry: Registry) -> None:
    change(registry.database, "DELETE FROM tensors WHERE digest = :digest", digest=prompt(2).digest)
    (problem,) = [problem for problem in problems(registry) if problem.where.startswith("tensor ")]
    assert (problem.kind, problem.versions) == ("missing", (f"{TASK}@v3",))
    assert "or publish the prompt of support_intents@v3 again" in problem.remedy
    publish_third(registry)
    assert problems(registry) == []


def test_a_lost_current_revision_is_stored_again_by_applying_the_task(registry: Registry) -> None:
    current = registry.apply_task(task(description="newest"), ANNA)
    change(registry.database, "DELETE FROM task_revisions WHERE digest = :digest", digest=current.digest)
    assert ("missing", f"task '{TASK}'") in found(registry)
    assert registry.apply_task(task(description="newest"), ANNA).digest == current.digest
    assert problems(registry) == []


def test_a_changed_payload_no_longer_has_its_digest(registry: Registry) -> None:
    change(
        registry.database,
        "UPDATE versions SET payload = replace(payload, 'majority', 'mean_logprob') WHERE number = 4",
    )
    assert (only(registry).kind, only(registry).where) == ("damaged", f"{TASK}@v4")


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("UPDATE versions SET kind = 'text' WHERE number = 3", "contradictory"),
        ("UPDATE versions SET base_fingerprint = NULL WHERE number = 3", "contradictory"),
        ("UPDATE versions SET number = 77 WHERE number = 3", "contradictory"),
        ("UPDATE versions SET task_revision = (SELECT digest FROM task_revisions WHERE number = 2) WHERE number = 3",
         "damaged"),
        ("UPDATE versions SET payload = substr(payload, 1, 40) WHERE number = 3", "damaged"),
        ("UPDATE versions SET payload = replace(payload, 'tensor_digest', 'tensor_dijest') WHERE number = 3",
         "damaged"),
        ("UPDATE versions SET tags = '7' WHERE number = 3", "damaged"),
        ("DELETE FROM version_tensors WHERE version = (SELECT digest FROM versions WHERE number = 3)",
         "contradictory"),
        ("UPDATE versions SET kind = 'graft', payload = replace(payload, 'soft_prompt', 'graft') WHERE number = 3",
         "unreadable"),
        ("UPDATE versions SET payload = replace(payload, '{', '{\"colour\"\\:null,') WHERE number = 3", "unreadable"),
        ("UPDATE versions SET provenance = '{\"planet\":\"Mars\"}' WHERE number = 3", "unreadable"),
    ],
)  # fmt: skip
def test_a_version_that_disagrees_with_itself_is_named(registry: Registry, statement: str, kind: str) -> None:
    change(registry.database, statement)
    problem = only(registry)
    assert (problem.kind, problem.where) in {(kind, f"{TASK}@v3"), (kind, f"{TASK}@v77")}


def test_what_a_version_refers_to_must_be_there(registry: Registry) -> None:
    change(registry.database, "DELETE FROM bases")
    change(registry.database, "DELETE FROM versions WHERE number = 2")
    assert found(registry) >= {("missing", f"{TASK}@v1"), ("missing", f"{TASK}@v4")}
    assert any("its member" in problem.message for problem in problems(registry))


def test_a_task_without_its_current_revision_and_a_changed_revision_are_named(registry: Registry) -> None:
    revision = registry.task(TASK)
    change(registry.database, "UPDATE task_revisions SET document = replace(document, 'refund', 'refuse')")
    place = f"revision {revision.digest[:12]} of task '{TASK}'"
    assert ("damaged", place) in found(registry)
    change(registry.database, "UPDATE task_revisions SET document = '{\"name\":'")
    assert ("damaged", place) in found(registry)
    change(registry.database, "UPDATE tasks SET current_revision = :digest", digest="0" * 64)
    assert ("missing", f"task '{TASK}'") in found(registry)


def test_a_revision_of_a_newer_release_is_unreadable_and_not_damaged(registry: Registry) -> None:
    document = registry.task(TASK).task.document() | {"tone": "friendly"}
    change(registry.database, "UPDATE task_revisions SET document = :document WHERE number = 2",
           document=json.dumps(document))  # fmt: skip
    problem = only(registry)
    assert (problem.kind, problem.remedy) == ("unreadable", "upgrade Softcue")


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        (
            "UPDATE alias_moves SET previous = NULL WHERE target = :v2 AND undoes IS NULL",
            "leaves nothing, but the one before went to",
        ),
        ("DELETE FROM alias_moves WHERE alias = 'production'", "no move of it is in its history"),
        ("UPDATE aliases SET version = :v1", "but its last move went to"),
        ("UPDATE alias_moves SET undoes = 1 WHERE undoes IS NOT NULL", "takes back move 1, which it cannot"),
        ("DELETE FROM aliases", "it points at nothing, but its last move went to"),
    ],
)
def test_an_alias_whose_history_does_not_lead_to_it_is_named(registry: Registry, statement: str, says: str) -> None:
    digests = {label: registry.version(TASK, label).digest for label in ("v1", "v2") if f":{label}" in statement}
    change(registry.database, statement, **digests)
    problem = only(registry)
    assert (problem.kind, problem.where) == ("contradictory", f"alias 'production' of task '{TASK}'")
    assert says in problem.message


def test_an_alias_that_points_at_nothing_is_named(registry: Registry) -> None:
    change(registry.database, "DELETE FROM versions WHERE number = 2")
    assert ("missing", f"alias 'production' of task '{TASK}'") in found(registry)


@pytest.mark.parametrize(
    ("statement", "place", "says"),
    [
        ("DELETE FROM changes WHERE sequence = 4", "the change log", "entry 4 of"),
        ("DELETE FROM audit WHERE sequence = 1", "the audit trail", "entry 1 of"),
        ("DELETE FROM audit WHERE sequence = (SELECT sequence FROM change_counter)", "the audit trail", "is missing"),
        ("DELETE FROM audit", "the audit trail", "entry 1 of"),
        ("UPDATE change_counter SET sequence = sequence - 1", "the change log", "above the counter's"),
        ("DELETE FROM change_counter", "the change log", "its counter is gone"),
        ("UPDATE audit SET subject = 'x' WHERE sequence = 5", "change 5", "tell it differently"),
    ],
)
def test_a_log_with_a_gap_or_out_of_step_is_named(registry: Registry, statement: str, place: str, says: str) -> None:
    change(registry.database, statement)
    assert any(problem.where == place and says in problem.message for problem in problems(registry))


def test_a_move_that_the_change_log_does_not_have_is_named(registry: Registry) -> None:
    with registry.database.read() as connection:
        kinds = {row.sequence: row.kind for row in connection.execute(select(changes))}
    moved = max(sequence for sequence, kind in kinds.items() if kind == "alias")
    change(registry.database, "UPDATE changes SET kind = 'task' WHERE sequence = :moved", moved=moved)
    problem = only(registry)
    assert problem.message == f"its move {moved} is not in the change log"


def test_routes_are_read_and_what_they_name_is_looked_for(registry: Registry) -> None:
    change(registry.database, "UPDATE route_revisions SET document = replace(document, 'v1', 'v6')")
    assert (only(registry).kind, only(registry).message) == ("missing", "it names v6, which is not there")
    change(registry.database, "UPDATE route_revisions SET document = replace(document, 'direct', 'bandit')")
    assert (only(registry).kind, only(registry).where) == ("unreadable", f"route 1 of task '{TASK}'")


def test_calibrations_and_backends_are_read_and_held_against_their_rows(registry: Registry) -> None:
    registry.calibrate(calibration(_digest_of(registry, 1)), ANNA)
    registry.register_backends([LOCAL], ANNA)
    assert problems(registry) == []
    change(registry.database, "UPDATE calibrations SET measure = 'margin'")
    found = only(registry)
    assert (found.kind, found.where) == ("contradictory", f"calibration of {TASK}@v1 for margin")
    change(registry.database, "UPDATE calibrations SET document = '{}'")
    assert only(registry).kind == "damaged"
    change(registry.database, "DELETE FROM calibrations")
    change(registry.database, "UPDATE backends SET kind = 'other'")
    assert (only(registry).kind, only(registry).where) == ("contradictory", "backend 'local'")
    change(registry.database, "UPDATE backends SET document = '[]'")
    assert only(registry).kind == "damaged"


@pytest.mark.parametrize("location", ["sqlite"], indirect=True)
def test_text_that_is_no_text_any_more_names_its_version_alone(registry: Registry) -> None:
    flip_tensor_byte(registry.database, prompt(2).digest)
    with registry.database.read() as connection:
        payload = connection.execute(select(versions.c.payload).where(versions.c.number == 4)).scalar_one()
    flip_file_byte(registry.database, payload.encode(), 20, mask=0x80)
    assert {(problem.kind, problem.where) for problem in problems(registry)} == {
        ("damaged", f"tensor {prompt(2).digest[:12]}"),
        ("damaged", f"version {_digest_of(registry, 4)[:12]}"),
    }


@pytest.mark.parametrize("location", ["sqlite"], indirect=True)
def test_a_damaged_page_does_not_end_the_check(registry: Registry) -> None:
    assert isinstance(registry.database.storage, SqliteStorage)
    flip_tensor_byte(registry.database, prompt(2).digest)
    path = registry.database.storage.path
    registry.database.close()
    with registry.database.read() as connection:
        page, size = (
            connection.exec_driver_sql(sql).scalar_one()
            for sql in ("SELECT rootpage FROM sqlite_master WHERE name = 'alias_moves'", "PRAGMA page_size")
        )
    registry.database.close()
    content = bytearray(path.read_bytes())
    content[(page - 1) * size : (page - 1) * size + 100] = b"\xff" * 100
    path.write_bytes(bytes(content))
    found = {problem.where for problem in problems(registry)}
    assert {"the database", "the aliases", f"tensor {prompt(2).digest[:12]}"} <= found


def _digest_of(registry: Registry, number: int) -> str:
    with registry.database.read() as connection:
        return str(connection.execute(select(versions.c.digest).where(versions.c.number == number)).scalar_one())
