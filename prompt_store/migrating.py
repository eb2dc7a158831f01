"""Bringing a database file's schema up to date, safely.

One process at a time (a lock file beside the database), in one explicit transaction (Alembic would run DDL outside of
any on SQLite), after a copy of a database that already holds something. Interrupted at any point, the old schema stays.
"""

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock
from sqlalchemy import Connection, Engine, inspect, select

from prompt_store.errors import SchemaMismatch, StoreError
from prompt_store.tables import meta, metadata

MIGRATIONS = Path(__file__).parent / "migrations"

# A later migration that only adds may write the oldest revision whose code still works beside it under this key; then
# that older code goes on during a rolling upgrade. Without the key, a newer schema is refused.
OLDEST_READER_KEY = "schema_oldest_reader"

# The execution option of a connection whose next transaction is BEGIN IMMEDIATE.
WRITE_OPTION = "softcue_write"


def bring_up_to_date(engine: Engine, path: Path, migrations: Path = MIGRATIONS) -> None:
    """Creates or migrates the schema where needed. Raises SchemaMismatch, or StoreError for a foreign database."""
    scripts = ScriptDirectory(str(migrations))
    with engine.connect() as connection, connection.begin():
        if _is_current(connection, scripts, path) and _journal_mode(connection) == "wal":
            return
    with FileLock(path.with_name(path.name + ".lock")), engine.connect() as connection:
        # This connection is closed for good afterwards, it does not go back to the pool: its settings differ.
        connection.detach()
        # WAL is kept in the file from now on. Both settings must come before the transaction. Foreign keys are off
        # because SQLite alters a table by copying and dropping it; they are checked before the commit instead.
        _set(connection, "PRAGMA journal_mode=WAL")
        _set(connection, "PRAGMA foreign_keys=OFF")
        with connection.begin():
            # Another process may have migrated while this one waited.
            if _is_current(connection, scripts, path):
                return
            found = _revision(connection)
        if found is not None:
            back_up(path, found)
        connection = connection.execution_options(**{WRITE_OPTION: True})
        with connection.begin():
            _upgrade(connection, migrations)


def back_up(path: Path, revision: str) -> Path:
    """A consistent copy of the database beside it, named after the schema it holds and the time; returns its path."""
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    copy = path.with_name(f"{path.name}.schema-{revision}-{moment}.backup")
    unfinished = copy.with_name(copy.name + ".unfinished")
    unfinished.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(unfinished)) as target:
        source.backup(target)
    unfinished.rename(copy)
    return copy


def _is_current(connection: Connection, scripts: ScriptDirectory, path: Path) -> bool:
    found = _revision(connection)
    head = scripts.get_current_head()
    if found is None:
        foreign = inspect(connection).get_table_names()
        if foreign:
            raise StoreError(
                f"{path} is a database of something else (it has a table {foreign[0]!r}); name another with --store"
            )
        return False
    known = {script.revision for script in scripts.walk_revisions()}
    if found in known:
        return found == head
    oldest_reader = connection.execute(select(meta.c.value).where(meta.c.key == OLDEST_READER_KEY)).scalar_one_or_none()
    if oldest_reader is not None and bytes(oldest_reader).decode() in known:
        return True
    raise SchemaMismatch(
        f"the store {path} has schema {found} but this Softcue knows schemas up to {head}; upgrade Softcue, or open a "
        "backup that was made before the migration"
    )


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return MigrationContext.configure(connection).get_current_revision()


def _journal_mode(connection: Connection) -> str:
    return str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one())


def _set(connection: Connection, pragma: str) -> None:
    # Through the driver: SQLAlchemy would open a transaction first.
    connection.connection.cursor().execute(pragma)


def _upgrade(connection: Connection, migrations: Path) -> None:
    config = Config(attributes={"connection": connection, "target_metadata": metadata})
    config.set_main_option("path_separator", "os")
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    command.upgrade(config, "head")
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
    if broken:
        raise StoreError(
            f"the migration would leave {len(broken)} dangling rows, first in {broken[0][0]!r}; report this"
        )
