import multiprocessing
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, insert

from prompt_store.database import Database
from prompt_store.errors import SchemaMismatch
from prompt_store.migrating import MIGRATIONS, OLDEST_READER_KEY
from prompt_store.prompts.registry import Registry
from prompt_store.tables import meta, metadata
from tests.prompt_store import processes
from tests.prompt_store.building import publish

STEP = """
import os
import signal

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table("extra", sa.Column("name", sa.Text(), nullable=False))
    op.execute("UPDATE tasks SET last_version = last_version + 1000")
    with op.batch_alter_table("tasks") as tasks:
        tasks.add_column(sa.Column("colour", sa.Text(), nullable=True))
    {ending}
"""


@pytest.fixture
def with_step(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the migrations with one more step, which ends as given."""

    def make(ending: str) -> Path:
        copy = tmp_path / "migrations"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "versions" / "r0002_extra.py").write_text(STEP.format(ending=ending))
        return copy

    return make


def revision_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def tables_of(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def schema_of(path: Path) -> dict[str, list[str]]:
    """Each table's and index's definition by lines, sorted: the order of constraints is of no consequence."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND tbl_name != 'alembic_version'"
        )
        return {name: sorted(line.strip(" \t,") for line in sql.splitlines()) for name, sql in rows}


def assert_untouched(path: Path) -> None:
    assert revision_of(path) == "0001"
    assert "extra" not in tables_of(path)
    with Database.open(path) as database:
        registry = Registry(database)
        assert registry.version("support_intents", "v1").label == "v1"
        assert publish(registry, seed=9).version.label == "v2"


def test_the_migrations_make_exactly_the_tables_of_the_metadata(database: Database, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'direct.db'}")
    metadata.create_all(engine)
    engine.dispose()
    assert schema_of(database.path) == schema_of(tmp_path / "direct.db")
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_a_current_store_is_opened_without_a_backup(database: Database) -> None:
    database.close()
    Database.open(database.path).close()
    assert list(database.path.parent.glob("*.backup")) == []


def test_an_older_store_is_backed_up_and_migrated(registry: Registry, with_step: Callable[[str], Path]) -> None:
    path = registry.database.path
    publish(registry)
    with Database.open(path, migrations=with_step("pass")):
        pass
    assert revision_of(path) == "0002"
    assert "extra" in tables_of(path)
    (backup,) = path.parent.glob("*.backup")
    assert_untouched(backup)


def test_a_migration_that_fails_leaves_the_old_schema(registry: Registry, with_step: Callable[[str], Path]) -> None:
    publish(registry)
    with pytest.raises(ZeroDivisionError):
        Database.open(registry.database.path, migrations=with_step("1 / 0"))
    assert_untouched(registry.database.path)


def test_a_migration_that_is_killed_leaves_the_old_schema(registry: Registry, with_step: Callable[[str], Path]) -> None:
    path = registry.database.path
    publish(registry)
    registry.database.close()
    migrations = with_step("os.kill(os.getpid(), signal.SIGKILL)")
    process = multiprocessing.get_context("spawn").Process(target=processes.open_with, args=(path, migrations))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert_untouched(path)
    Database.open(path, migrations=with_step("pass")).close()
    assert revision_of(path) == "0002"


def test_a_migration_that_breaks_references_is_rolled_back(
    registry: Registry, with_step: Callable[[str], Path]
) -> None:
    publish(registry)
    with pytest.raises(Exception, match="dangling"):
        Database.open(registry.database.path, migrations=with_step('op.execute("DELETE FROM tensors")'))
    assert_untouched(registry.database.path)


def test_a_newer_schema_is_refused_naming_both(registry: Registry, with_step: Callable[[str], Path]) -> None:
    path = registry.database.path
    Database.open(path, migrations=with_step("pass")).close()
    with pytest.raises(SchemaMismatch, match=r"has schema 0002 but this Softcue knows schemas up to 0001"):
        Database.open(path)
    assert revision_of(path) == "0002"


def test_a_newer_schema_that_this_release_can_still_read_is_accepted(
    registry: Registry, with_step: Callable[[str], Path]
) -> None:
    path = registry.database.path
    Database.open(path, migrations=with_step("pass")).close()
    with registry.database.write() as connection:
        connection.execute(insert(meta).values(key=OLDEST_READER_KEY, value=b"0001"))
    with Database.open(path) as database:
        assert publish(Registry(database)).version.label == "v1001"
    assert revision_of(path) == "0002"
