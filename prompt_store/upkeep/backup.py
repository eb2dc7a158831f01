"""The whole store as one file, and a store from such a file, both checked.

The file is itself a store in SQLite, whichever database the rows came from, and holds the key that signs generation
ids, so only its owner may read it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import Connection, select

from prompt_store.database import Database
from prompt_store.errors import Conflict, InvalidArtifact, SchemaMismatch, StoreError, StoreUnavailable
from prompt_store.migrating import bring_up_to_date, copy_rows, copy_store, newest_revision, schema_revision
from prompt_store.sqlite import SqliteStorage
from prompt_store.tables import change_counter, meta, metadata
from prompt_store.upkeep.verifying import Checked, Problem, examine, verify

_PROBLEMS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Backup:
    """A file that was written, and what was found whole in it."""

    file: Path
    size_bytes: int
    checked: Checked


def back_up_store(database: Database, file: Path) -> Backup:
    """Writes the store as of one moment to a new file, beside running writers.

    The copy is verified before it gets its name. Raises Conflict where the file exists, StoreUnavailable where the
    folder cannot be written or the store is damaged, SchemaMismatch for a store of a newer release.
    """
    checked = Checked()

    def check(copy: SqliteStorage, counts: dict[str, int]) -> None:
        if copy.row_counts() != counts:
            raise StoreUnavailable(f"the copy of {database.storage.place} is not complete; check the disk of {file}")
        damage = _damage(verify(Database(copy), checked))
        if damage:
            raise StoreUnavailable(
                f"the store {database.storage.place} is damaged, so it was not backed up: {damage}; "
                "`softcue prompts verify` names everything"
            )

    with database.read() as connection:
        revision = _require_newest(connection, database.storage.place)
    try:
        # Two kinds of database may fail here, the store's and the copy's.
        with Database(SqliteStorage(file)).checked(), database.checked():
            copy_store(database.storage, file, revision, check=check)
    except FileExistsError as error:
        raise Conflict(f"{file} exists and is kept; name a new file for the backup") from error
    except OSError as error:
        raise StoreUnavailable(
            f"the backup {file} cannot be written ({error.strerror}); name a file in a folder that can be written"
        ) from error
    return Backup(file, file.stat().st_size, checked)


def restore_store(file: Path, location: str | Path) -> Checked:
    """Fills the empty store at `location`, which may not be there yet, from a backup; tells what was restored.

    All or nothing, in one transaction. The file is checked first and stays as it is; one of an older schema is brought
    up to date in a temporary copy. The signing key comes along, so ids that were given out stay valid.
    Raises InvalidArtifact where the file is damaged or no store, SchemaMismatch where a newer release wrote it,
    Conflict where the store holds anything, StoreUnavailable.
    """
    if not file.is_file():
        raise InvalidArtifact(f"there is no file {file}; name a backup that `softcue prompts backup` wrote")
    with TemporaryDirectory(prefix="softcue-restore-") as folder, _opened(file, Path(folder)) as source:
        damage = _damage(verify(source))
        if damage:
            raise InvalidArtifact(f"{file} is damaged, so nothing was restored: {damage}; restore another backup")
        checked = Checked()
        with Database.open(location) as target, source.read() as origin, target.write() as connection:
            _require_newest(connection, target.storage.place)
            _require_empty(connection, target.storage.place)
            copy_rows(origin, connection)
            damage = _damage(examine(target.storage, connection, checked))
            if damage:
                raise StoreUnavailable(
                    f"what was written to {target.storage.place} is not whole, so it was taken back: {damage}; check "
                    "its disk"
                )
    return checked


def _opened(file: Path, folder: Path) -> Database:
    """A temporary copy of the file, with the newest schema; messages name the file."""
    original, storage = SqliteStorage(file), SqliteStorage(folder / "softcue.db")
    storage.place = str(file)
    copy = Database(storage)
    try:
        with Database(original).checked(), copy.checked():
            original.copy_to(storage.path)
            bring_up_to_date(storage, create=False)
        with copy.read() as connection:
            _require_newest(connection, storage.place)
    except SchemaMismatch:
        copy.close()
        raise
    except StoreError as error:
        copy.close()
        raise InvalidArtifact(f"{file} cannot be restored: {error}") from error
    return copy


def _require_newest(connection: Connection, place: str) -> str:
    """Rows of a schema that this code does not know would be lost on the way."""
    found, newest = schema_revision(connection), newest_revision()
    if found != newest:
        raise SchemaMismatch(
            f"{place} has schema {found} but this Softcue copies schema {newest}; use the release that wrote it"
        )
    return newest


def _require_empty(connection: Connection, place: str) -> None:
    for table in metadata.sorted_tables:
        if table.name in (meta.name, change_counter.name):
            continue
        if connection.execute(select(table).limit(1)).first() is not None:
            raise Conflict(f"the store {place} has {table.name} already; restore into an empty or a new one")


def _damage(problems: Iterable[Problem]) -> str:
    """The first problems in words; empty when there are none but documents of another release."""
    found = [str(problem) for problem in problems if problem.kind != "unreadable"]
    more = f" (and {len(found) - _PROBLEMS_SHOWN} more)" if len(found) > _PROBLEMS_SHOWN else ""
    return ", ".join(found[:_PROBLEMS_SHOWN]) + more
