"""The database behind the store: opening, transactions and durability. SQLite, one file.

What the rows mean belongs to other modules. A Database may be shared by threads; each process opens its own.
"""

import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import URL, Connection, Engine, create_engine, event, insert, make_url, select
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from prompt_store.errors import NotYetSupported, StoreError, StoreUnavailable
from prompt_store.migrating import MIGRATIONS, WRITE_OPTION, bring_up_to_date
from prompt_store.tables import meta

BUSY_TIMEOUT_S = 30.0
SIGNING_KEY_BYTES = 32

_SIGNING_KEY = "signing_key"


class Database:
    """Open with `Database.open`; use `read()` and `write()` for transactions; `close()` at the end."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self._engine = engine
        self._watch_lock = threading.Lock()
        self._watch_connection: sqlite3.Connection | None = None

    @classmethod
    def open(cls, url_or_path: str | Path, *, create: bool = True, migrations: Path = MIGRATIONS) -> "Database":
        """Opens the store at a path or `sqlite:///` URL, creating its folder and bringing its schema up to date.

        With `create=False` a missing file is an error. Raises StoreUnavailable where the file cannot be used,
        SchemaMismatch where a newer Softcue wrote it, NotYetSupported for other databases.
        """
        path = _file_path(url_or_path)
        if not create and not path.exists():
            raise StoreUnavailable(
                f"there is no store at {path}; start `softcue serve` to create it, or name another with --store"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(f"cannot create {path.parent} ({error.strerror}); choose another --store") from error
        engine = _create_engine(path)
        try:
            with _translated(path):
                bring_up_to_date(engine, path, migrations)
        except BaseException:
            engine.dispose()
            raise
        return cls(path, engine)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database throughout, and never waits for a writer."""
        with _translated(self.path), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """The one writing transaction at a time: it waits for its turn, then commits whole or leaves no trace."""
        with _translated(self.path), self._engine.connect() as connection:
            connection = connection.execution_options(**{WRITE_OPTION: True})
            with connection.begin():
                yield connection

    def data_version(self) -> int:
        """A number that differs after any other connection, here or in another process, has committed.

        Costs one PRAGMA on a connection held for this alone; a lock makes it safe to call from any thread. Only
        equality between two calls on the same Database means anything.
        """
        with self._watch_lock, _translated(self.path):
            if self._watch_connection is None:
                self._watch_connection = sqlite3.connect(
                    self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
                )
            return int(self._watch_connection.execute("PRAGMA data_version").fetchone()[0])

    def signing_key(self) -> bytes:
        """32 random bytes, made once per store, with which every replica signs and checks generation ids."""
        query = select(meta.c.value).where(meta.c.key == _SIGNING_KEY)
        with self.read() as connection:
            key = connection.execute(query).scalar_one_or_none()
        if key is None:
            with self.write() as connection:
                # Another replica may have made it since.
                key = connection.execute(query).scalar_one_or_none()
                if key is None:
                    key = secrets.token_bytes(SIGNING_KEY_BYTES)
                    connection.execute(insert(meta).values(key=_SIGNING_KEY, value=key))
        return bytes(key)

    def close(self) -> None:
        """Gives up every connection; safe to call twice."""
        with self._watch_lock:
            if self._watch_connection is not None:
                self._watch_connection.close()
                self._watch_connection = None
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _file_path(url_or_path: str | Path) -> Path:
    text = str(url_or_path)
    if isinstance(url_or_path, Path) or "://" not in text:
        path = text
    else:
        try:
            url = make_url(text)
        except ArgumentError as error:
            raise StoreError("the store's URL cannot be read; use a file path or sqlite:///PATH") from error
        if url.get_backend_name() != "sqlite":
            raise NotYetSupported(
                f"a store on {url.get_backend_name()} needs the extra softcue[postgres], which a later release brings; "
                "use a file path or sqlite:///PATH for now"
            )
        path = url.database or ""
    if path in ("", ":memory:"):
        raise StoreError(
            "the store needs a file that other processes can open; give a path such as .softcue/softcue.db"
        )
    return Path(path).expanduser()


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
        writes = connection.get_execution_options().get(WRITE_OPTION, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """What SQLite says about a busy, full or damaged file, as StoreUnavailable; our own mistakes pass unchanged."""
    try:
        yield
    except (DatabaseError, sqlite3.DatabaseError) as error:
        cause = error.orig if isinstance(error, DatabaseError) else error
        # Exactly DatabaseError is how the driver says "malformed" and "not a database"; its other subclasses are bugs.
        environmental = isinstance(error, OperationalError | sqlite3.OperationalError) or (
            type(cause) is sqlite3.DatabaseError
        )
        if not environmental:
            raise
        raise StoreUnavailable(f"the store {path} cannot be used now: {cause}; {_remedy(str(cause))}") from error


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
