import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from prompt_store.database import Database
from prompt_store.errors import Conflict, InvalidArtifact, SchemaMismatch, StoreUnavailable
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.version import EnsemblePayload, RemoteModelPayload
from prompt_store.routing.routes import DirectRoute, TaskRoute, parse_task_route
from prompt_store.routing.shadows import ShadowAnswer
from prompt_store.upkeep.backup import back_up_store, restore_store
from prompt_store.upkeep.verifying import verify
from tests.postgresql import Server
from tests.prompt_store.building import ANNA, BASE, LOCAL, OPENAI, calibration, prompt, publish, task
from tests.prompt_store.upkeep.damage import change, flip_tensor_byte

TASK = "support_intents"
DAY = date(2030, 1, 2)


@pytest.fixture
def registry(registry: Registry) -> Registry:
    digests = [publish(registry, seed=seed, alias="production").version.digest for seed in range(3)]
    payload = EnsemblePayload(members=tuple(digests[:2]), base_fingerprint=BASE.fingerprint)
    publish(registry, payload_content=payload, base_fingerprint=None, report={"accuracy": 0.5}, tags=("a",))
    registry.rollback_alias(TASK, "production", reason="worse", principal=ANNA)
    registry.apply_route(TASK, TaskRoute(route=DirectRoute()), ANNA)
    return registry


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "backups" / "monday.db"


@pytest.fixture
def backup(registry: Registry, file: Path) -> Path:
    file.parent.mkdir()
    return back_up_store(registry.database, file).file


@pytest.fixture(params=["sqlite", "postgresql"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where nothing is yet."""
    if request.param == "sqlite":
        yield str(tmp_path / "target" / "softcue.db")
        return
    server: Server = request.getfixturevalue("postgresql")
    url = server.create()
    yield url
    server.drop(url)


def assert_equal(restored: Registry, original: Registry) -> None:
    assert restored.snapshot() == original.snapshot()
    assert restored.alias_history(TASK, "production") == original.alias_history(TASK, "production")
    assert restored.changes_since(0) == original.changes_since(0)
    assert restored.database.signing_key() == original.database.signing_key()
    for version in original.versions(TASK)[1:]:
        assert restored.soft_prompt(version.digest) == original.soft_prompt(version.digest)


def test_a_backup_is_itself_a_whole_store_and_says_what_it_holds(registry: Registry, file: Path) -> None:
    file.parent.mkdir()
    registry.database.signing_key()
    backup = back_up_store(registry.database, file)
    assert (backup.file, backup.size_bytes) == (file, file.stat().st_size)
    assert (backup.checked.versions, backup.checked.tensors) == (4, 3)
    assert list(file.parent.iterdir()) == [file]
    with Database.open(file, create=False) as database:
        assert list(verify(database)) == []
        assert_equal(Registry(database), registry)


def test_only_its_owner_may_read_a_backup_as_it_holds_the_signing_key(backup: Path) -> None:
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600


def test_a_backup_never_overwrites_a_file(registry: Registry, backup: Path) -> None:
    before = backup.read_bytes()
    with pytest.raises(Conflict, match=r"monday\.db exists and is kept; name a new file"):
        back_up_store(registry.database, backup)
    assert backup.read_bytes() == before
    assert list(backup.parent.iterdir()) == [backup]


def test_a_backup_into_a_folder_that_is_not_there_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"cannot be written \(No such file or directory\)"):
        back_up_store(registry.database, tmp_path / "absent" / "monday.db")


def test_a_damaged_store_is_not_backed_up_and_the_damage_is_named(registry: Registry, file: Path) -> None:
    file.parent.mkdir()
    flip_tensor_byte(registry.database, prompt(1).digest)
    with pytest.raises(StoreUnavailable, match=f"not backed up: tensor {prompt(1).digest[:12]}"):
        back_up_store(registry.database, file)
    assert list(file.parent.iterdir()) == []


def test_a_backup_beside_a_running_publisher_is_of_one_moment(registry: Registry, file: Path) -> None:
    file.parent.mkdir()
    done = threading.Event()

    def publish_on() -> None:
        seed = 100
        while not done.is_set():
            publish(registry, seed=seed, alias="candidate")
            seed += 1

    publisher = threading.Thread(target=publish_on)
    publisher.start()
    try:
        for number in range(3):
            back_up_store(registry.database, file.with_name(f"{number}.db"))
    finally:
        done.set()
        publisher.join()
    for number in range(3):
        with Database.open(file.with_name(f"{number}.db"), create=False) as database:
            copied = Registry(database).snapshot().tasks[TASK]
            newest = max(copied.numbers)
            assert newest == 4 or copied.aliases["candidate"] == copied.numbers[newest]


def test_a_store_is_restored_whole_into_either_kind_of_database(registry: Registry, file: Path, target: str) -> None:
    registry.database.signing_key()
    file.parent.mkdir()
    back_up_store(registry.database, file)
    before = file.read_bytes()
    restored = restore_store(file, target)
    assert (restored.versions, restored.tensors, restored.changes) == (4, 3, registry.snapshot().sequence)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
    with Database.open(target, create=False) as database:
        assert list(verify(database)) == []
        copy = Registry(database)
        assert_equal(copy, registry)
        assert publish(copy, seed=9).version.label == "v5"
        assert copy.rollback_alias(TASK, "production", reason="", principal=ANNA).number == 1


def test_what_routes_need_and_leave_behind_is_restored_on_either_database(
    registry: Registry, file: Path, target: str
) -> None:
    model = RemoteModelPayload(provider="openai", model="ft:gpt:acme::1")
    remote = publish(registry, payload_content=model, base_fingerprint=None, shutdown_date=date(2031, 1, 2)).version
    registry.register_backends([OPENAI, LOCAL], ANNA)
    registry.calibrate(calibration(remote.digest), ANNA)
    legs = [{"kind": "direct", "version": "v1"}, {"kind": "direct", "version": "v5"}]
    registry.apply_route(TASK, parse_task_route({"route": {"kind": "fallback", "routes": legs}, "deadline_s": 2}), ANNA)
    registry.rollback_route(TASK, ANNA, reason="slow")
    registry.add_spending([(DAY, TASK, "openai", 0.5), (DAY, TASK, "local", 0.1)])
    said = ShadowAnswer(
        "s1", "g1", TASK, datetime(2030, 1, 2, 3, tzinfo=UTC), remote.digest, "v5", "openai", "a", 1.5,
        remote.digest, "v5", "local", None, "away", 2.5, None,
    )  # fmt: skip
    registry.add_shadow_answers([said])
    file.parent.mkdir()
    restore_store(back_up_store(registry.database, file).file, target)
    with Database.open(target, create=False) as database:
        copy = Registry(database)
        assert list(verify(database)) == []
        assert copy.snapshot() == registry.snapshot()
        assert copy.version(TASK, "v5").shutdown_date == date(2031, 1, 2)
        assert copy.route_history(TASK) == registry.route_history(TASK)
        assert (copy.backends(), copy.calibrations(TASK)) == ([OPENAI, LOCAL], registry.calibrations(TASK))
        assert (copy.spending(DAY), copy.shadow_answers(TASK)) == (registry.spending(DAY), [said])


def test_whoever_follows_the_store_that_is_filled_notices(registry: Registry, backup: Path, target: str) -> None:
    with Database.open(target) as database:
        following = Registry(database)
        watcher = following.watch()
        assert not watcher.poll()
        restore_store(backup, target)
        assert any(watcher.wait(1.0) for _ in range(10))
        assert watcher.sequence == registry.snapshot().sequence
        assert following.version(TASK, "production").label == "v2"
        watcher.close()


def test_a_store_that_holds_anything_is_not_restored_into(backup: Path, target: str) -> None:
    with Database.open(target) as database:
        other = Registry(database)
        other.apply_task(task("other"), ANNA)
        with pytest.raises(Conflict, match=r"has .* already; restore into an empty or a new one"):
            restore_store(backup, target)
        assert [revision.task.name for revision in other.tasks()] == ["other"]


def test_a_store_is_not_restored_over_itself(backup: Path) -> None:
    before = backup.read_bytes()
    with pytest.raises(Conflict, match="restore into an empty"):
        restore_store(backup, backup)
    with Database.open(backup) as database:
        assert list(verify(database)) == []
    assert len(before) == len(backup.read_bytes())


@pytest.mark.parametrize("location", ["sqlite"], indirect=True)
def test_a_damaged_file_is_refused_and_nothing_touched(backup: Path, target: str, tmp_path: Path) -> None:
    data = bytearray(backup.read_bytes())
    damaged = prompt(1).data
    assert data.count(damaged) == 1
    data[data.index(damaged) + 7] ^= 0x10
    backup.write_bytes(bytes(data))
    with pytest.raises(
        InvalidArtifact, match=rf"monday\.db is damaged, so nothing was restored: tensor {prompt(1).digest[:12]}"
    ):
        restore_store(backup, target)
    assert not (tmp_path / "target").exists()
    assert backup.read_bytes() == bytes(data)


@pytest.mark.parametrize("location", ["sqlite"], indirect=True)
def test_what_is_no_backup_is_refused_by_its_name(backup: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.db"
    whole = backup.read_bytes()
    for name, content in (("cut.db", whole[: len(whole) // 2]), ("notes.db", b"dear diary " * 1000), ("empty.db", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidArtifact, match=name.replace(".", r"\.")) as caught:
            restore_store(tmp_path / name, target)
        assert "softcue-restore" not in str(caught.value)
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
        other.commit()
    with pytest.raises(InvalidArtifact, match="a table 'recipes'"):
        restore_store(tmp_path / "other.db", target)
    with pytest.raises(InvalidArtifact, match="there is no file"):
        restore_store(tmp_path / "absent.db", target)
    assert not target.exists()


@pytest.mark.parametrize("location", ["sqlite"], indirect=True)
def test_a_backup_of_an_older_schema_is_brought_up_to_date_on_the_way(
    registry: Registry, backup: Path, target: str
) -> None:
    with closing(sqlite3.connect(backup)) as older:
        older.executescript(
            """
            ALTER TABLE bases DROP COLUMN kv_heads; ALTER TABLE bases DROP COLUMN head_size;
            ALTER TABLE versions DROP COLUMN recipe; ALTER TABLE versions DROP COLUMN author;
            ALTER TABLE alias_moves DROP COLUMN undoes; DROP TABLE idempotency_keys;
            ALTER TABLE versions DROP COLUMN shutdown_date; ALTER TABLE route_revisions DROP COLUMN reason;
            ALTER TABLE route_revisions DROP COLUMN whole;
            ALTER TABLE route_revisions DROP COLUMN restores; DROP TABLE backends; DROP TABLE calibrations;
            DROP TABLE spending; DROP TABLE shadow_answers; DROP TABLE experiments; DROP TABLE allocations;
            DROP TABLE answers; DROP TABLE captures; DROP TABLE erased_units;
            UPDATE alembic_version SET version_num = '0001'; DELETE FROM meta WHERE key = 'schema_oldest_reader';
            DELETE FROM alias_moves WHERE sequence = (SELECT max(sequence) FROM alias_moves);
            UPDATE aliases SET version = (SELECT digest FROM versions WHERE number = 3);
            """
        )
    before = backup.read_bytes()
    restore_store(backup, target)
    assert backup.read_bytes() == before
    assert list(backup.parent.iterdir()) == [backup]
    with Database.open(target, create=False) as database:
        assert Registry(database).snapshot().tasks[TASK].versions == registry.snapshot().tasks[TASK].versions


def test_a_newer_schema_is_neither_backed_up_nor_restored(
    registry: Registry, backup: Path, target: str, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(backup)) as newer:
        newer.execute("UPDATE alembic_version SET version_num = '9999'")
        newer.commit()
    with pytest.raises(SchemaMismatch, match="schema 9999"):
        restore_store(backup, target)
    change(registry.database, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaMismatch, match="schema 9999"):
        back_up_store(registry.database, tmp_path / "newer.db")
    assert not (tmp_path / "newer.db").exists()


@pytest.mark.parametrize("location", ["sqlite"], indirect=True)
def test_what_another_release_wrote_into_a_backup_is_carried_along(
    registry: Registry, backup: Path, target: str
) -> None:
    with closing(sqlite3.connect(backup)) as other:
        other.execute('UPDATE versions SET provenance = \'{"planet":"Mars"}\' WHERE number = 3')
        other.commit()
    restore_store(backup, target)
    with Database.open(target) as database:
        assert [(problem.kind, problem.where) for problem in verify(database)] == [("unreadable", f"{TASK}@v3")]
