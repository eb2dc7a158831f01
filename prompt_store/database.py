"""The database behind the store: opening it, transactions, and what it says when it cannot be used.

`sqlite` and `postgresql` are the two kinds of database, `migrating` keeps their schema. What the rows mean belongs to
other modules. A Database may be shared by threads; each process opens its own.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from sqlalchemy import Connection, Table, event, insert, make_url, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from prompt_store.errors import NotYetSupported, StoreError, StoreUnavailable
from prompt_store.migrating import MIGRATIONS, Storage, bring_up_to_date
from prompt_store.postgresql import PostgresqlStorage
from prompt_store.sqlite import SqliteStorage
from prompt_store.tables import meta

SIGNING_KEY_BYTES = 32

_SIGNING_KEY = "signing_key"


class Watch(Protocol):
    """Notices that somebody committed. Use from one thread at a time; `close` may come from another."""

    def news(self) -> bool: ...

    def missed(self) -> None: ...

    def wait(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...


class Lead(Protocol):
    """A role that one of all who share the store has at a time. Any thread may use it."""

    def held(self) -> bool: ...

    def close(self) -> None: ...


class Database:
    """Open with `Database.open`; use `read()` and `write()` for transactions; `close()` at the end.

    `healthy` is False from a transaction that the database failed until the next one that it did not.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.healthy = True
        self._closed = False
        event.listen(storage.engine, "checkin", self._close_late)

    @classmethod
    def open(
        cls,
        url_or_path: str | Path,
        *,
        create: bool = True,
        backups: Path | None = None,
        migrations: Path = MIGRATIONS,
    ) -> "Database":
        """Opens the store at a path, a `sqlite:///` or a `postgresql+psycopg://` URL, its schema brought up to date.

        A store that already holds something is copied into the folder `backups` before its schema changes: by default
        beside a SQLite file, and in `.softcue/backups` for PostgreSQL. With `create=False` a missing store is an error.
        Raises StoreUnavailable where the database cannot be used, SchemaMismatch where a newer Softcue wrote it,
        NotYetSupported for other databases.
        """
        storage = _storage(url_or_path)
        if backups is not None:
            storage.backups = backups
        try:
            storage.prepare(create=create)
            with _translated(storage):
                bring_up_to_date(storage, create=create, migrations=migrations)
        except BaseException:
            storage.engine.dispose()
            raise
        return cls(storage)

    @property
    def location(self) -> str:
        """The path or URL that opens this store again; a URL with its password, so not for messages."""
        return self.storage.location

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database throughout, and never waits for a writer."""
        with self.checked(), self.storage.engine.connect() as connection:
            connection = self.storage.reading(connection)
            with connection.begin():
                yield connection

    @contextmanager
    def write(self, *, announced: bool = True) -> Iterator[Connection]:
        """The one writing transaction at a time: it waits for its turn, then commits whole or leaves no trace.

        Whoever watches is told, unless it writes nothing that a snapshot has.
        """
        with self.checked(), self.storage.engine.connect() as connection:
            connection = self.storage.writing(connection)
            with connection.begin():
                self.storage.begin_write(connection)
                yield connection
                if announced:
                    self.storage.announce(connection)

    @contextmanager
    def checked(self) -> Iterator[None]:
        """What the database says when it is busy, full, away or damaged becomes StoreUnavailable."""
        try:
            with _translated(self.storage):
                yield
        except StoreUnavailable:
            self.healthy = False
            raise
        self.healthy = True

    def watch(self, poll_s: float) -> Watch:
        """Notices commits of others; a kind of database that has to be asked is asked every `poll_s` seconds."""
        return self.storage.watch(poll_s)

    def lead(self, name: str) -> Lead:
        """The role of that name, taken when it is first asked for; see `leadership`, which says what failed."""
        return self.storage.lead(name)

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
        """Gives up every connection, those in use as they come back; safe to call twice."""
        self._closed = True
        self.storage.engine.dispose()

    def _close_late(self, _: object, entry: ConnectionPoolEntry) -> None:
        # A thread that was reading when the pool was disposed of would leave its connection to the garbage collector.
        if self._closed:
            entry.invalidate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def insert_into(connection: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that can be told, by `on_conflict_...`, what becomes of rows that are there already."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def _storage(url_or_path: str | Path) -> Storage:
    text = str(url_or_path)
    if isinstance(url_or_path, Path) or "://" not in text:
        return SqliteStorage.at(text)
    try:
        # As some hosts of databases still write it.
        url = make_url(text.replace("postgres://", "postgresql://", 1))
    except (ArgumentError, ValueError) as error:
        raise StoreError(
            "the store's URL cannot be read; use a file path, sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME"
        ) from error
    match url.get_backend_name():
        case "sqlite":
            return SqliteStorage.at(url.database or "")
        case "postgresql":
            return PostgresqlStorage(url)
        case other:
            raise NotYetSupported(
                f"a store on {other} is not supported; use a file path, sqlite:///PATH or "
                "postgresql+psycopg://USER@HOST/NAME"
            )


@contextmanager
def _translated(storage: Storage) -> Iterator[None]:
    try:
        yield
    except (DBAPIError, storage.driver_error) as error:
        explanation = storage.explain(error)
        if explanation is None:
            raise
        raise StoreUnavailable(f"the store {storage.place} cannot be used now: {explanation}") from error
    except PoolTimeout as error:
        raise StoreUnavailable(
            f"the store {storage.place} cannot be used now: this process has all its connections to it in use; "
            "try again, or ask it less at once"
        ) from error
