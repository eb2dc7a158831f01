"""The change log: what was written, in commit order, and a cheap way to notice that there is more.

Whoever writes calls `record` inside the same transaction, which appends to the log and to the audit trail together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, insert, select, update

from prompt_store.access import Principal
from prompt_store.canonical import canonical_json
from prompt_store.database import Database
from prompt_store.tables import audit, change_counter, changes

ChangeKind = Literal["base", "task", "version", "alias", "route", "calibration", "backend", "experiment", "unit"]


@dataclass(frozen=True, slots=True)
class Change:
    """`subject` is what changed: a base's fingerprint, a revision's or version's digest, an alias, a route's number.

    A calibration's is its version's digest, a backend's or an experiment's its name.
    """

    sequence: int
    kind: ChangeKind
    task: str | None
    subject: str
    at: datetime
    principal: str


def record(
    connection: Connection,
    kind: ChangeKind,
    *,
    action: str,
    task: str | None,
    subject: str,
    principal: Principal,
    at: datetime,
    reason: str = "",
    details: Mapping[str, Any] | None = None,
) -> int:
    """Appends one change and its audit entry; returns the sequence number that both carry.

    Updating the one counter row makes concurrent writers wait for each other, so sequence order is commit order.
    """
    connection.execute(update(change_counter).values(sequence=change_counter.c.sequence + 1))
    sequence = current_sequence(connection)
    row = {"sequence": sequence, "task": task, "subject": subject, "at": at, "principal": principal.name}
    connection.execute(insert(changes).values(kind=kind, **row))
    text = canonical_json(dict(details or {})).decode()
    connection.execute(insert(audit).values(action=action, reason=reason, details=text, **row))
    return sequence


def current_sequence(connection: Connection) -> int:
    """The number of the last committed change; 0 in an empty store."""
    return int(connection.execute(select(change_counter.c.sequence)).scalar_one())


def read_changes(connection: Connection, after: int) -> list[Change]:
    """Every change with a greater sequence number, oldest first."""
    rows = connection.execute(select(changes).where(changes.c.sequence > after).order_by(changes.c.sequence))
    return [Change(**row._mapping) for row in rows]


class ChangeWatcher:
    """Tells whether the store changed since the last look.

    Make the watcher first and take the snapshot after it: then no change falls between the two. One watcher belongs to
    one thread at a time; several may share a Database. `poll_s` is how often a database is asked that cannot tell by
    itself.
    """

    def __init__(self, database: Database, poll_s: float = 0.1) -> None:
        self._database = database
        self._watch = database.watch(poll_s)
        try:
            with database.checked():
                self._watch.news()
            self.sequence = self._read_sequence()
        except BaseException:
            self._watch.close()
            raise

    def poll(self) -> bool:
        """True when something was committed since the last poll, by any process. Costs microseconds when not.

        `sequence` is then the newest change.
        """
        with self._database.checked():
            if not self._watch.news():
                return False
        try:
            sequence = self._read_sequence()
        except BaseException:
            self._watch.missed()
            raise
        changed = sequence != self.sequence
        self.sequence = sequence
        return changed

    def wait(self, timeout_s: float) -> bool:
        """As `poll`, but waits for a change for up to `timeout_s`, or for as long as the database cares to wait."""
        with self._database.checked():
            self._watch.wait(timeout_s)
        return self.poll()

    def close(self) -> None:
        """Gives its connection back; a `wait` in another thread returns soon."""
        self._watch.close()

    def _read_sequence(self) -> int:
        with self._database.read() as connection:
            return current_sequence(connection)
