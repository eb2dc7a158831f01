"""Bringing a database's schema up to date, safely.

One process at a time, in one explicit transaction (Alembic would run DDL outside of any on SQLite), after a copy of a
database that already holds something. Interrupted at any point, the old schema stays. Migrations expand first and
contract a release later: one that only adds names its `oldest_reader`, and code of that schema goes on beside it.
"""

import errno
import os
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, LargeBinary, MetaData, delete, event, insert, inspect, select, update
from sqlalchemy.exc import DBAPIError

from prompt_store.errors import SchemaMismatch, StoreError, StoreUnavailable
from prompt_store.postgresql import PostgresqlStorage
from prompt_store.sqlite import SqliteStorage
from prompt_store.tables import change_counter, meta, metadata

MIGRATIONS = Path(__file__).parent / "migrations"

# The oldest schema whose code still works with this one. Without it, code that does not know the schema refuses it.
OLDEST_READER_KEY = "schema_oldest_reader"

_ROWS_AT_ONCE = 200
# A tensor may have 64 MB.
_LARGE_ROWS_AT_ONCE = 4

Storage = SqliteStorage | PostgresqlStorage


def bring_up_to_date(storage: Storage, *, create: bool = True, migrations: Path = MIGRATIONS) -> None:
    """Creates or migrates the schema where needed.

    Raises SchemaMismatch, StoreError for a foreign database, StoreUnavailable for an empty one without `create`.
    """
    scripts = ScriptDirectory(str(migrations))
    with storage.engine.connect() as connection, connection.begin():
        if _is_current(connection, scripts, storage) and storage.is_configured(connection):
            return
        if not create and schema_revision(connection) is None:
            raise StoreUnavailable(
                f"there is no store at {storage.place}; start `softcue serve` to create it, or name another with "
                "--store"
            )
    with storage.migrating() as connection:
        with connection.begin():
            # Another process may have migrated while this one waited.
            if _is_current(connection, scripts, storage):
                return
            found = schema_revision(connection)
        if found is not None:
            back_up(storage, found, migrations)
        with connection.begin():
            if found is not None:
                # Code of the old schema may be writing: it waits, so that its locks and ours never wait for each other.
                storage.begin_write(connection)
            _upgrade(connection, migrations, "head")
            _write_oldest_reader(connection, scripts)
            broken = storage.dangling_rows(connection)
            if broken:
                raise StoreError(
                    f"the migration would leave {len(broken)} dangling rows, first in {broken[0]!r}; report this"
                )


def back_up(storage: Storage, revision: str, migrations: Path = MIGRATIONS) -> Path:
    """A copy of a store of that schema among its backups, named after the schema and the time; returns its path."""
    name = storage.path.name if isinstance(storage, SqliteStorage) else f"{storage.engine.url.database}.db"
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    copy = storage.backups / f"{name}.schema-{revision}-{moment}.backup"
    try:
        storage.backups.mkdir(parents=True, exist_ok=True)
        copy_store(storage, copy, revision, migrations)
    except (OSError, sqlite3.Error, DBAPIError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if not isinstance(cause, OSError | sqlite3.OperationalError):
            raise
        raise StoreUnavailable(
            f"the store {storage.place} must be copied before its schema changes, and {storage.backups} cannot take "
            f"the copy ({cause}); free space there, or name another folder by SOFTCUE_STORE_BACKUPS"
        ) from error
    return copy


def copy_store(
    storage: Storage,
    target: Path,
    revision: str,
    migrations: Path = MIGRATIONS,
    *,
    check: Callable[[SqliteStorage, dict[str, int]], object] | None = None,
) -> None:
    """The whole store, as of one moment, as one SQLite file that only its owner may read: it holds the signing key.

    The copy of a PostgreSQL database has the tables of the same schema, `revision`, and can be opened as a store.
    `check` is given the copy and how many rows each table must have; what it raises undoes the copy. The file appears
    under its name when it is complete and on disk. Raises FileExistsError where something has that name.
    """
    if target.exists():
        raise FileExistsError(errno.EEXIST, "the file exists", str(target))
    with TemporaryDirectory(prefix=f"{target.name}.unfinished-", dir=target.parent) as folder:
        copy = SqliteStorage(Path(folder) / target.name)
        try:
            if isinstance(storage, SqliteStorage):
                counts = storage.copy_to(copy.path)
            else:
                counts = _write_copy(storage, copy, revision, migrations)
            if check is not None:
                check(copy, counts)
        finally:
            copy.engine.dispose()
        copy.path.chmod(0o600)
        _sync(copy.path)
        # Takes the name, or fails where somebody else has it by now.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        copy.path.replace(target)
    _sync(target.parent)


def _write_copy(storage: PostgresqlStorage, copy: SqliteStorage, revision: str, migrations: Path) -> dict[str, int]:
    with copy.migrating() as connection:
        with connection.begin():
            _upgrade(connection, migrations, revision)
        with storage.engine.connect() as source, connection.begin():
            source = storage.reading(source)
            with source.begin():
                counts = copy_rows(source, connection)
        # One file, without a log beside it.
        connection.connection.cursor().execute("PRAGMA journal_mode=DELETE")
    return counts


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_rows(source: Connection, target: Connection) -> dict[str, int]:
    """Puts every row of the source in place of the target's; returns how many each table has now.

    Both must have the same schema. Times stay the same moments, whether a database keeps time zones or not.
    """
    tables = [table for table in _reflect(target).sorted_tables if table.name != "alembic_version"]
    for table in reversed(tables):
        # Other writers wait on the counter's row, which therefore stays.
        if table.name != change_counter.name:
            target.execute(delete(table))
    counts = dict.fromkeys((table.name for table in tables), 0)
    for table in tables:
        if table.name == change_counter.name:
            target.execute(update(table), {"sequence": source.execute(select(table.c.sequence)).scalar_one()})
            counts[table.name] = 1
            continue
        large = any(isinstance(column.type, LargeBinary) for column in table.columns)
        query = select(table).execution_options(yield_per=_LARGE_ROWS_AT_ONCE if large else _ROWS_AT_ONCE)
        for batch in source.execute(query).partitions():
            rows = [{name: _moved(value, target) for name, value in row._mapping.items()} for row in batch]
            target.execute(insert(table), rows)
            counts[table.name] += len(rows)
    return counts


def _reflect(connection: Connection) -> MetaData:
    found = MetaData()

    @event.listens_for(found, "column_reflect")
    def _generic(_inspector: Any, _table: Any, column: Any) -> None:
        # The types of one database are not those of another.
        column["type"] = column["type"].as_generic()

    found.reflect(connection)
    return found


def _moved(value: Any, target: Connection) -> Any:
    if not isinstance(value, datetime):
        return value
    aware = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return aware.replace(tzinfo=None) if target.dialect.name == "sqlite" else aware


def schema_revision(connection: Connection) -> str | None:
    """The schema that a database has; None where it has none of ours."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return MigrationContext.configure(connection).get_current_revision()


def newest_revision(migrations: Path = MIGRATIONS) -> str:
    """The schema that this code writes."""
    return str(ScriptDirectory(str(migrations)).get_current_head())


def _is_current(connection: Connection, scripts: ScriptDirectory, storage: Storage) -> bool:
    found = schema_revision(connection)
    head = scripts.get_current_head()
    if found is None:
        foreign = inspect(connection).get_table_names()
        if foreign:
            raise StoreError(
                f"{storage.place} is a database of something else (it has a table {foreign[0]!r}); "
                "name another with --store"
            )
        return False
    known = {script.revision for script in scripts.walk_revisions()}
    if found in known:
        return found == head
    oldest_reader = connection.execute(select(meta.c.value).where(meta.c.key == OLDEST_READER_KEY)).scalar_one_or_none()
    if oldest_reader is not None and bytes(oldest_reader).decode() in known:
        return True
    raise SchemaMismatch(
        f"the store {storage.place} has schema {found} but this Softcue knows schemas up to {head}; upgrade Softcue, "
        "or open a backup that was made before the migration"
    )


def _upgrade(connection: Connection, migrations: Path, revision: str) -> None:
    config = Config(attributes={"connection": connection, "target_metadata": metadata})
    config.set_main_option("path_separator", "os")
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    command.upgrade(config, revision)


def _write_oldest_reader(connection: Connection, scripts: ScriptDirectory) -> None:
    head = scripts.get_revision("head")
    assert head is not None, "there is a migration"
    connection.execute(delete(meta).where(meta.c.key == OLDEST_READER_KEY))
    oldest = getattr(head.module, "oldest_reader", None)
    if oldest is not None:
        connection.execute(insert(meta).values(key=OLDEST_READER_KEY, value=str(oldest).encode()))
