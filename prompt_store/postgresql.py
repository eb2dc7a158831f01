"""A store in a PostgreSQL database, shared by services, trainers and people on many machines.

As in SQLite there is one writer at a time: a writing transaction begins by locking the change counter's row. So
sequence numbers are given in commit order, and what a transaction has read stays true until it commits.
"""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, create_engine, select, text
from sqlalchemy.exc import DBAPIError

from prompt_store.errors import StoreError
from prompt_store.tables import change_counter

CONNECT_TIMEOUT_S = 10
LOCK_TIMEOUT_S = 30
IDLE_TIMEOUT_S = 60
LEADER_TIMEOUT_S = 180
CHANNEL = "softcue_changes"
DEFAULT_BACKUPS = Path(".softcue/backups")
_JOURNALS = Path(".softcue/journals")

# Notifications can be lost, as through a pooler that lends connections by transaction: then this is the poll.
FALLBACK_POLL_S = 1.0
_SLICE_S = 0.25

# Advisory locks are numbers; this one means "Softcue changes its schema".
_MIGRATION_LOCK = 0x50F7C0E

# Where the URL does not say otherwise. A server that vanished without a word is given up after half a minute.
_DRIVER_DEFAULTS = {"connect_timeout": CONNECT_TIMEOUT_S, "keepalives_idle": 30, "tcp_user_timeout": 30_000}

# SQLSTATE classes and codes in which the server, not the statement, is at fault.
_ENVIRONMENTAL = ("08", "25006", "25P03", "3D", "28", "40", "42501", "53", "55P03", "57", "58", "XX001", "XX002")
# Internal errors and damage, and what the disk does not give back.
_DAMAGE = ("XX", "58")
_REMEDIES = {
    "25006": "it is read-only, maybe a standby; name the primary",
    "28": "check user and password in the URL",
    "3D": "create the database, or name another with --store",
    "40": "another process was in the way; try again",
    "42501": "grant the user the right to create and write tables in its schema",
    "53100": "free disk space there and try again; nothing was written",
    "53300": "it has no connection left; raise max_connections or run fewer services",
    "55P03": "another process holds it for long; try again, or find what holds it",
    "XX001": "it is damaged; restore a backup",
    "XX002": "it is damaged; restore a backup",
}
# Of a connection that was refused the driver passes on the server's words and not its code.
_REFUSALS = {
    "invalid connection option": "take it out of the URL",
    "authentication failed": _REMEDIES["28"],
    "no password supplied": _REMEDIES["28"],
    'FATAL:  role "': _REMEDIES["28"],
    'FATAL:  database "': _REMEDIES["3D"],
    "too many": _REMEDIES["53300"],
    "connection slots": _REMEDIES["53300"],
}


class PostgresqlStorage:
    """The database that `url` names; `place` is what messages call it, without the password."""

    kind = "postgresql"

    def __init__(self, url: URL) -> None:
        if url.get_driver_name() not in ("psycopg", "psycopg2"):
            raise StoreError(f"the driver {url.get_driver_name()!r} is not used here; write postgresql+psycopg://...")
        url = url.set(drivername="postgresql+psycopg")
        self.place = url.difference_update_query(["password", "sslpassword"]).render_as_string(hide_password=True)
        self.location = url.render_as_string(hide_password=False)
        self.backups = DEFAULT_BACKUPS
        self.journal = _JOURNALS / hashlib.sha256(self.place.encode()).hexdigest()[:16]
        self._arguments = {name: value for name, value in _DRIVER_DEFAULTS.items() if name not in url.query}
        try:
            self.engine = create_engine(
                url,
                hide_parameters=True,
                connect_args=self._arguments,
                pool_size=4,
                max_overflow=12,
                # A connection from before the server's restart is replaced instead of failing its user.
                pool_pre_ping=True,
            )
        except ImportError as error:
            raise StoreError(
                f"a store on PostgreSQL needs the driver psycopg ({_first_line(error)}); "
                "pip install 'softcue[postgres]'"
            ) from error
        self.driver_error: type[Exception] = self.engine.dialect.loaded_dbapi.Error

    def connect(self) -> Any:
        """The driver's own connection, committing each statement by itself."""
        driver: Any = self.engine.dialect.loaded_dbapi
        positional, named = self.engine.dialect.create_connect_args(self.engine.url)
        return driver.connect(*positional, **named, **self._arguments, autocommit=True)

    def prepare(self, *, create: bool) -> None:
        """Nothing to make: the database is there or connecting fails."""

    def is_configured(self, _: Connection) -> bool:
        return True

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """The one connection at a time that may change the schema, in explicit transactions of its user's."""
        with self.engine.connect() as connection:
            connection = self.writing(connection)
            with connection.begin():
                connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            try:
                yield connection
            finally:
                # The lock lasts as long as the connection, which does not go back to the pool.
                connection.invalidate()

    def dangling_rows(self, _: Connection) -> list[str]:
        """None: PostgreSQL checks its foreign keys itself."""
        return []

    def integrity(self, _: Connection) -> list[str]:
        """Nothing: a page that is damaged is found when it is read."""
        return []

    def is_damage(self, error: DBAPIError) -> bool:
        """Whether a read failed on what the tables hold rather than on our way to them."""
        return (getattr(error.orig, "sqlstate", None) or "").startswith(_DAMAGE)

    def reading(self, connection: Connection) -> Connection:
        """Its next transaction sees one state throughout."""
        return connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    def writing(self, connection: Connection) -> Connection:
        """Each statement of its next transaction sees what was committed before, so nothing is lost after the wait."""
        # None leaves it to the server: False, to which a returned connection is reset, would ask for more than the
        # server's settings allow, and in words that a standby does not understand.
        return connection.execution_options(isolation_level="READ COMMITTED", postgresql_readonly=None)

    def begin_write(self, connection: Connection) -> None:
        """Waits until no other transaction writes. A writer that sits idle meanwhile is thrown out by the server."""
        connection.execute(
            text(
                f"SELECT set_config('lock_timeout', '{LOCK_TIMEOUT_S}s', true), "
                f"set_config('idle_in_transaction_session_timeout', '{IDLE_TIMEOUT_S}s', true)"
            )
        )
        connection.execute(select(change_counter.c.sequence).with_for_update())

    def announce(self, connection: Connection) -> None:
        """Tells every watcher, at the commit."""
        connection.execute(text(f"NOTIFY {CHANNEL}"))

    def watch(self, poll_s: float) -> "PostgresqlWatch":
        return PostgresqlWatch(self)

    def lead(self, name: str) -> "PostgresqlLead":
        return PostgresqlLead(self, name)

    def explain(self, error: Exception) -> str | None:
        """Fact and remedy where the server or the way to it is at fault; None for a mistake of ours."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        state = getattr(cause, "sqlstate", None)
        if state is None:
            fact = _first_line(cause)
            remedy = next((remedy for words, remedy in _REFUSALS.items() if words in fact), None)
            if remedy is None and isinstance(cause, self.engine.dialect.loaded_dbapi.OperationalError):
                remedy = "check that the server runs and can be reached"
            return f"{fact}; {remedy}" if remedy is not None else None
        if not state.startswith(_ENVIRONMENTAL):
            return None
        remedy = next((text for code, text in _REMEDIES.items() if state.startswith(code)), "check the server's log")
        return f"{_first_line(cause)}; {remedy}"


class PostgresqlWatch:
    """Hears of commits by LISTEN, on a connection held for this alone; one that is lost is made anew."""

    def __init__(self, storage: PostgresqlStorage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._closed = False
        self._connection: Any = None
        self._heard = True
        self._looked_at_s = 0.0

    def news(self) -> bool:
        """Whether anything may have been committed since the last call that was True."""
        with self._lock:
            self._listen(0.0)
            now_s = time.monotonic()
            changed = not self._closed and (self._heard or now_s - self._looked_at_s >= FALLBACK_POLL_S)
            self._heard = False
            if changed:
                self._looked_at_s = now_s
            return changed

    def missed(self) -> None:
        """What the last news was about could not be read: there is news again."""
        self._heard = True

    def wait(self, timeout_s: float) -> None:
        """Returns when it is time to look for news again, or when closed."""
        until_s = time.monotonic() + min(timeout_s, FALLBACK_POLL_S)
        while not self._closed and not self._heard and (left_s := until_s - time.monotonic()) > 0:
            with self._lock:
                self._listen(min(left_s, _SLICE_S))

    def close(self) -> None:
        """Ends a `wait` in another thread within a moment, and waits that long itself."""
        self._closed = True
        with self._lock:
            self._drop()

    def _listen(self, timeout_s: float) -> None:
        if self._closed:
            return
        try:
            if self._connection is None:
                self._connection = self._storage.connect()
                self._connection.execute(f"LISTEN {CHANNEL}")
                # What happened before was not heard.
                self._heard = True
            else:
                for _ in self._connection.notifies(timeout=timeout_s, stop_after=1):
                    self._heard = True
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class PostgresqlLead:
    """An advisory lock on a connection held for this alone: whoever loses the connection leads no more."""

    def __init__(self, storage: PostgresqlStorage, name: str) -> None:
        self._storage = storage
        self._number = int.from_bytes(hashlib.sha256(f"softcue lead {name}".encode()).digest()[:8], signed=True)
        self._lock = threading.Lock()
        self._closed = False
        self._connection: Any = None

    def held(self) -> bool:
        """Whether this holds the lock now, which it takes where nobody has it."""
        with self._lock:
            if self._closed:
                return False
            try:
                if self._connection is None or self._connection.closed:
                    self._connect()
                # Who has the lock is given it once more: that it is still ours is asked where it is kept.
                query = "SELECT pg_try_advisory_lock(%s)"
                held = bool(self._connection.execute(query, [self._number]).fetchone()[0])
            except BaseException:
                self._drop()
                raise
            if not held:
                self._drop()
            return held

    def close(self) -> None:
        """Gives the lock up."""
        with self._lock:
            self._closed = True
            self._drop()

    def _connect(self) -> None:
        self._connection = self._storage.connect()
        # The server itself ends the lead of a host that vanished, or a process that was stopped (since version 14).
        setting = "SELECT set_config(name, %s, false) FROM pg_settings WHERE name = 'idle_session_timeout'"
        self._connection.execute(setting, [f"{LEADER_TIMEOUT_S}s"])

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
