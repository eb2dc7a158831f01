"""A store in one SQLite file: for one machine, with nothing to set up. Write-ahead log, every commit on disk."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError

from prompt_store.errors import StoreError, StoreUnavailable

BUSY_TIMEOUT_S = 30.0

# What SQLite calls pages that are damaged, or that the disk does not give back.
_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR")

# The execution option of a connection whose next transaction is BEGIN IMMEDIATE.
_WRITES = "softcue_writes"


class SqliteStorage:
    """The file at `path`; `place` is what messages call it, `location` what opens it again."""

    kind = "sqlite"
    driver_error: type[Exception] = sqlite3.Error

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = self.location = str(path)
        self.backups = path.parent
        self.journal = Path(f"{path}.journal")
        self.engine = _create_engine(path)

    @classmethod
    def at(cls, path: str) -> "SqliteStorage":
        """Raises StoreError for what is no file."""
        if path in ("", ":memory:"):
            raise StoreError(
                "the store needs a file that other processes can open; give a path such as .softcue/softcue.db"
            )
        return cls(Path(path).expanduser())

    @property
    def lock_file(self) -> Path:
        """Held by whoever changes the schema."""
        return self.path.with_name(self.path.name + ".lock")

    def prepare(self, *, create: bool) -> None:
        """Makes the folder. Raises StoreUnavailable where it cannot, or where the file is absent and not wanted."""
        if not create and not self.path.exists():
            raise StoreUnavailable(
                f"there is no store at {self.path}; start `softcue serve` to create it, or name another with --store"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(
                f"cannot create {self.path.parent} ({error.strerror}); choose another --store"
            ) from error

    def is_configured(self, connection: Connection) -> bool:
        """Whether the file keeps a write-ahead log, so that readers never wait for a writer."""
        return str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()) == "wal"

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """The one connection at a time that may change the schema, in explicit transactions of its user's."""
        with FileLock(self.lock_file), self.engine.connect() as connection:
            # It is closed for good afterwards, it does not go back to the pool: its settings differ.
            connection.detach()
            # Both settings must come before a transaction, so through the driver. Foreign keys are off because SQLite
            # alters a table by copying and dropping it; they are checked before the commit instead.
            connection.connection.cursor().execute("PRAGMA journal_mode=WAL")
            connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
            yield self.writing(connection)

    def dangling_rows(self, connection: Connection) -> list[str]:
        """A table's name for each row that refers to none."""
        return [str(row[0]) for row in connection.exec_driver_sql("PRAGMA foreign_key_check")]

    def integrity(self, connection: Connection) -> list[str]:
        """What SQLite complains of in its own pages and indexes; nothing when they are whole."""
        complaints = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
        return [] if complaints == ["ok"] else complaints

    def is_damage(self, error: DBAPIError) -> bool:
        """Whether a read failed on what the file holds rather than on our way to it."""
        name = getattr(error.orig, "sqlite_errorname", "")
        # The driver, not SQLite, finds text that is none.
        return name.startswith(_DAMAGE) or "Could not decode" in str(error.orig)

    def reading(self, connection: Connection) -> Connection:
        return connection

    def writing(self, connection: Connection) -> Connection:
        """One writer at a time: its next transaction begins by taking the write lock."""
        return connection.execution_options(**{_WRITES: True})

    def begin_write(self, connection: Connection) -> None:
        """Nothing: BEGIN IMMEDIATE has waited for the lock."""

    def announce(self, connection: Connection) -> None:
        """Nothing: whoever watches sees `PRAGMA data_version` change."""

    def watch(self, poll_s: float) -> "SqliteWatch":
        return SqliteWatch(self.path, poll_s)

    def lead(self, name: str) -> "SqliteLead":
        return SqliteLead(self.path.with_name(f"{self.path.name}.{name}.lock"))

    def copy_to(self, target: Path) -> dict[str, int]:
        """A copy as of one moment, beside running writers; returns how many rows each table has."""
        with (
            closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as source,
            closing(sqlite3.connect(target, isolation_level=None)) as copy,
        ):
            source.execute("BEGIN")
            counts = _row_counts(source)
            source.backup(copy)
            # One file, without a log beside it.
            copy.execute("PRAGMA journal_mode=DELETE")
        return counts

    def row_counts(self) -> dict[str, int]:
        """How many rows each table has."""
        with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)) as connection:
            return _row_counts(connection)

    def explain(self, error: Exception) -> str | None:
        """Fact and remedy where the file or its disk is at fault; None for a mistake of ours."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        # Exactly DatabaseError is how the driver says "malformed" and "not a database"; its other subclasses are bugs.
        environmental = isinstance(error, OperationalError | sqlite3.OperationalError) or (
            type(cause) is sqlite3.DatabaseError
        )
        return f"{cause}; {_remedy(str(cause))}" if environmental else None


class SqliteWatch:
    """Sees other connections' commits through `PRAGMA data_version`, on a connection held for this alone."""

    def __init__(self, path: Path, poll_s: float) -> None:
        self._path = path
        self._poll_s = poll_s
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._connection: sqlite3.Connection | None = None
        self._seen: int | None = None

    def news(self) -> bool:
        """Whether anything was committed since the last call that was True; costs microseconds."""
        with self._lock:
            if self._closing.is_set():
                return False
            if self._connection is None:
                self._connection = sqlite3.connect(
                    self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
                )
            version = int(self._connection.execute("PRAGMA data_version").fetchone()[0])
            changed, self._seen = version != self._seen, version
            return changed

    def missed(self) -> None:
        """What the last news was about could not be read: there is news again."""
        self._seen = None

    def wait(self, timeout_s: float) -> None:
        """Returns when it is time to look for news again, or when closed."""
        self._closing.wait(min(self._poll_s, timeout_s))

    def close(self) -> None:
        self._closing.set()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


class SqliteLead:
    """A lock on a file beside the database, which the operating system takes back when its process ends."""

    def __init__(self, file: Path) -> None:
        self._file = file
        # Whichever thread asks, it is the same process that leads.
        self._file_lock = FileLock(file, blocking=False, thread_local=False)
        self._lock = threading.Lock()
        self._closed = False

    def held(self) -> bool:
        """Whether this holds the lock now, which it takes where nobody has it. Raises StoreUnavailable."""
        with self._lock:
            if self._closed or self._file_lock.is_locked:
                return not self._closed
            try:
                self._file_lock.acquire()
            except Timeout:
                return False
            except OSError as error:
                raise StoreUnavailable(
                    f"{self._file} cannot be locked ({error.strerror}); check its and its folder's permissions"
                ) from error
            return True

    def close(self) -> None:
        """Gives the lock up."""
        with self._lock:
            self._closed = True
            self._file_lock.release()


def _row_counts(connection: sqlite3.Connection) -> dict[str, int]:
    names = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT IN ('alembic_version', 'sqlite_sequence')"
    ).fetchall()
    # Another program's table may have any name.
    quoted = {name: name.replace('"', '""') for (name,) in names}
    return {
        name: int(connection.execute(f'SELECT count(*) FROM "{text}"').fetchone()[0]) for name, text in quoted.items()
    }


def _create_engine(path: Path) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        # Errors end up in logs; what is stored does not belong there.
        hide_parameters=True,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
        pool_size=4,
        max_overflow=60,
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: Any) -> None:
        # Otherwise the driver would open and commit transactions on its own, DDL outside of any.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=ON")
        # FULL, not NORMAL: in WAL mode NORMAL may lose the last commits on power failure, and a publish that was
        # acknowledged must last. It costs one fsync per commit, and commits are rare.
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A write transaction takes the write lock at once: one that starts by reading and upgrades later can fail
        # without ever having waited.
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _remedy(message: str) -> str:
    if "locked" in message or "busy" in message:
        return "another process holds it for long; try again, or find what holds it"
    if "full" in message:
        return "free disk space and try again; nothing was written"
    if "readonly" in message or "unable to open" in message:
        return "check the file's and its folder's permissions"
    if "malformed" in message or "not a database" in message:
        return "the file is damaged or not a store; restore a backup or name another with --store"
    return "check the file and its disk"
