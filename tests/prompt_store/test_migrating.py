import multiprocessing
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Inspector, create_engine, delete, insert, inspect, select, text
from typer.testing import CliRunner

from prompt_store.database import Database
from prompt_store.errors import SchemaMismatch, StoreUnavailable
from prompt_store.migrating import MIGRATIONS, OLDEST_READER_KEY, copy_rows, newest_revision, schema_revision
from prompt_store.prompts.registry import Registry
from prompt_store.tables import meta, metadata
from softcue import app
from tests.conftest import BASE_FOLDER
from tests.prompt_store import processes
from tests.prompt_store.building import ANNA, BASE, publish, task
from tests.prompt_store.consistency import assert_consistent

NEWEST = newest_revision()
NEXT = "9999"


@pytest.fixture
def first_migrations(tmp_path: Path) -> Path:
    """The migrations as the first release had them."""
    copy = tmp_path / "first"
    shutil.copytree(MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__", "r000[!1]_*"))
    return copy


@pytest.fixture
def backups(tmp_path: Path) -> Path:
    return tmp_path / "backups"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nothing is yet."""
    if request.param == "sqlite":
        return str(tmp_path / "empty.db")
    return str(request.getfixturevalue("empty_postgresql"))


def url_of(location: str) -> str:
    return location if "://" in location else f"sqlite:///{location}"


def look(location: str, asked: Callable[[Inspector], Any]) -> Any:
    """What an inspector says of a database that nobody has migrated for it."""
    engine = create_engine(url_of(location))
    try:
        return asked(inspect(engine))
    finally:
        engine.dispose()


def revision_of(location: str) -> str | None:
    engine = create_engine(url_of(location))
    try:
        with engine.connect() as connection:
            return schema_revision(connection)
    finally:
        engine.dispose()


def schema_of(inspector: Inspector) -> dict[str, Any]:
    """Everything that a database knows of each of our tables, in an order that does not matter."""

    def ordered(entries: list[Any]) -> list[str]:
        return sorted(repr(sorted(entry.items(), key=repr)) for entry in entries)

    return {
        name: (
            ordered([{**column, "type": str(column["type"])} for column in inspector.get_columns(name)]),
            inspector.get_pk_constraint(name),
            ordered(inspector.get_foreign_keys(name)),
            ordered(inspector.get_unique_constraints(name)),
            ordered(inspector.get_check_constraints(name)),
            ordered(inspector.get_indexes(name)),
        )
        for name in inspector.get_table_names()
        if name != "alembic_version"
    }


def assert_untouched(location: str) -> None:
    assert revision_of(location) == NEWEST
    assert not look(location, lambda inspector: inspector.has_table("extra"))
    with Database.open(location, create=False) as database:
        registry = Registry(database)
        assert registry.version("support_intents", "v1").label == "v1"
        assert publish(registry, seed=9).version.label == "v2"


def test_the_migrations_make_exactly_the_tables_of_the_metadata(empty_location: str) -> None:
    Database.open(empty_location).close()
    migrated = look(empty_location, schema_of)
    engine = create_engine(url_of(empty_location))
    metadata.drop_all(engine)
    metadata.create_all(engine)
    engine.dispose()
    assert set(migrated) == set(metadata.tables)
    assert look(empty_location, schema_of) == migrated


def test_no_migration_is_missing(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_a_current_store_is_opened_without_a_backup(database: Database, backups: Path) -> None:
    database.close()
    Database.open(database.location, backups=backups).close()
    assert not backups.exists()
    assert list(Path(database.location).parent.glob("*.backup")) == []


def test_a_store_of_the_first_schema_is_backed_up_and_migrated(
    empty_location: str, first_migrations: Path, backups: Path
) -> None:
    with Database.open(empty_location, migrations=first_migrations) as database:
        key = database.signing_key()
        with database.write() as connection:
            connection.execute(
                text(
                    "INSERT INTO bases (fingerprint, name, hidden_size, layers, context_length, vocabulary_size, "
                    "architecture, created_at, principal) VALUES (:fingerprint, :name, 16, 2, 64, 512, "
                    "'LlamaForCausalLM', '2026-05-01 12:00:00.000000', 'anna')"
                ),
                {"fingerprint": BASE.fingerprint, "name": BASE.name},
            )
    assert revision_of(empty_location) == "0001"
    with Database.open(empty_location, create=False, backups=backups) as database:
        assert database.signing_key() == key
        registry = Registry(database)
        assert registry.find_base(BASE.fingerprint).hidden_size == 16
        registry.apply_task(task(), ANNA)
        publish(registry, alias="production")
    assert revision_of(empty_location) == NEWEST
    (backup,) = backups.glob("*.schema-0001-*.backup")
    assert revision_of(str(backup)) == "0001"
    with Database.open(backup, migrations=first_migrations, create=False) as database:
        assert database.signing_key() == key
        with database.read() as connection:
            assert connection.execute(text("SELECT fingerprint FROM bases")).all() == [(BASE.fingerprint,)]


def test_a_backup_holds_everything_and_opens_as_a_store(
    registry: Registry, with_step: Callable[[str], Path], backups: Path
) -> None:
    location = registry.database.location
    for seed in range(30):
        publish(registry, seed=seed, alias="candidate", notes="ä\n'\"", report={"accuracy": 0.5})
    before, history = registry.snapshot(), registry.alias_history("support_intents", "candidate")
    key = registry.database.signing_key()
    Database.open(location, migrations=with_step("pass"), backups=backups).close()
    assert revision_of(location) == NEXT
    assert look(location, lambda inspector: inspector.has_table("extra"))
    (backup,) = backups.iterdir()
    assert backup.name.endswith(".backup")
    assert_consistent(str(backup))
    with Database.open(backup, create=False) as database:
        copied = Registry(database)
        assert copied.snapshot() == before
        assert copied.alias_history("support_intents", "candidate") == history
        assert database.signing_key() == key
        assert publish(copied, seed=99).version.label == "v31"


def test_rows_are_copied_from_either_database_into_either(registry: Registry, empty_location: str) -> None:
    for seed in range(10):
        publish(registry, seed=seed, alias="production")
    before = registry.snapshot()
    with Database.open(empty_location) as other:
        with registry.database.read() as source, other.write() as target:
            counts = copy_rows(source, target)
        assert (counts["versions"], counts["tensors"], counts["alias_moves"], counts["jobs"]) == (10, 10, 10, 0)
        assert Registry(other).snapshot() == before
        assert publish(Registry(other), seed=99).version.label == "v11"
    assert_consistent(empty_location)


def test_a_store_that_cannot_be_backed_up_is_not_migrated(
    registry: Registry, with_step: Callable[[str], Path], tmp_path: Path
) -> None:
    publish(registry)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"must be copied .* cannot take the copy .* SOFTCUE_STORE_BACKUPS"):
        Database.open(registry.database.location, migrations=with_step("pass"), backups=tmp_path / "file" / "backups")
    assert_untouched(registry.database.location)


def test_a_migration_that_fails_leaves_the_old_schema(
    registry: Registry, with_step: Callable[[str], Path], backups: Path
) -> None:
    publish(registry)
    with pytest.raises(ZeroDivisionError):
        Database.open(registry.database.location, migrations=with_step("1 / 0"), backups=backups)
    assert_untouched(registry.database.location)


def test_a_migration_that_is_killed_leaves_the_old_schema(
    registry: Registry, with_step: Callable[[str], Path], backups: Path
) -> None:
    location = registry.database.location
    publish(registry)
    registry.database.close()
    migrations = with_step("os.kill(os.getpid(), signal.SIGKILL)")
    process = multiprocessing.get_context("spawn").Process(
        target=processes.open_with, args=(location, migrations, backups)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert_untouched(location)
    Database.open(location, migrations=with_step("pass"), backups=backups).close()
    assert revision_of(location) == NEXT


def test_a_migration_that_breaks_references_is_rolled_back(
    registry: Registry, with_step: Callable[[str], Path], backups: Path
) -> None:
    publish(registry)
    with pytest.raises(Exception, match=r"dangling|foreign key"):
        Database.open(
            registry.database.location, migrations=with_step('op.execute("DELETE FROM tensors")'), backups=backups
        )
    assert_untouched(registry.database.location)


def test_a_migration_waits_for_a_writer(registry: Registry, with_step: Callable[[str], Path], backups: Path) -> None:
    location = registry.database.location
    migrations = with_step("pass")
    migration = threading.Thread(target=lambda: Database.open(location, migrations=migrations, backups=backups).close())
    with registry.database.write() as connection:
        migration.start()
        migration.join(0.5)
        assert migration.is_alive()
        # Tables that the migration alters: if it held them already, each would wait for the other.
        for table in ("tasks", "versions", "changes", "meta"):
            connection.execute(text(f"SELECT count(*) FROM {table}"))
        connection.execute(insert(meta).values(key="late", value=b"1"))
    migration.join(30)
    assert not migration.is_alive()
    assert revision_of(location) == NEXT
    with registry.database.read() as connection:
        assert connection.execute(select(meta.c.value).where(meta.c.key == "late")).scalar_one() == b"1"


def test_a_newer_schema_is_refused_naming_both(
    registry: Registry, with_step: Callable[[str], Path], backups: Path
) -> None:
    location = registry.database.location
    Database.open(location, migrations=with_step("pass"), backups=backups).close()
    with pytest.raises(SchemaMismatch, match=f"has schema {NEXT} but this Softcue knows schemas up to {NEWEST}"):
        Database.open(location)
    assert revision_of(location) == NEXT


def test_a_newer_schema_that_this_release_can_still_read_is_accepted(
    registry: Registry, with_step: Callable[[str], Path], backups: Path
) -> None:
    location = registry.database.location
    migrations = with_step("pass")
    step = migrations / "versions" / "r9999_extra.py"
    step.write_text(step.read_text().replace("\n\ndef", f'\noldest_reader = "{NEWEST}"\n\ndef', 1))
    Database.open(location, migrations=migrations, backups=backups).close()
    with Database.open(location) as database:
        assert publish(Registry(database)).version.label == "v1001"
        # A later step that says nothing of older code refuses it again.
        with database.write() as connection:
            connection.execute(delete(meta).where(meta.c.key == OLDEST_READER_KEY))
    with pytest.raises(SchemaMismatch):
        Database.open(location)


def test_a_newer_file_is_not_written_when_refused(tmp_path: Path, with_step: Callable[[str], Path]) -> None:
    path = tmp_path / "softcue.db"
    Database.open(path, migrations=with_step("pass")).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = path.read_bytes()
    with pytest.raises(SchemaMismatch):
        Database.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [
        (["prompts", "verify"], 0),
        (["register-base", str(BASE_FOLDER)], 0),
        (["tune", "soft-prompt", "absent.toml"], 1),
    ],
)
def test_every_command_copies_an_older_store_to_where_the_environment_says(
    command: list[str],
    exit_code: int,
    empty_location: str,
    first_migrations: Path,
    backups: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Database.open(empty_location, migrations=first_migrations).close()
    monkeypatch.setenv("SOFTCUE_STORE_BACKUPS", str(backups))
    result = CliRunner().invoke(app, [*command, "--store", empty_location])
    assert result.exit_code == exit_code, result.output
    assert revision_of(empty_location) == NEWEST
    assert len(list(backups.glob("*.schema-0001-*.backup"))) == 1
