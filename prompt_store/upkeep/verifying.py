"""Verifying a store: everything is hashed again and every reference followed.

It goes on after a problem and names each. Nothing is written.
"""

from collections.abc import Callable, Iterator

from sqlalchemy import Connection

from prompt_store.database import Database
from prompt_store.migrating import Storage
from prompt_store.upkeep.contents import check_backends, check_calibrations, check_tasks, check_tensors, check_versions
from prompt_store.upkeep.divided import check_allocations, check_experiments
from prompt_store.upkeep.histories import check_aliases, check_log, check_routes
from prompt_store.upkeep.problems import RESTORE, Checked, Damage, Problem, Reader

__all__ = ["Checked", "Problem", "examine", "verify"]


def verify(database: Database, checked: Checked | None = None) -> Iterator[Problem]:
    """Every problem of a store as of one moment, as it is found; none when the store is whole.

    `checked` is counted up on the way. Raises StoreUnavailable where the database cannot be reached.

        checked = Checked()
        for problem in verify(database, checked):
            print(problem)
    """
    with database.read() as connection:
        yield from examine(database.storage, connection, Checked() if checked is None else checked)
        # SQLite refuses to commit, even nothing, after it has met a damaged page.
        connection.rollback()


def examine(storage: Storage, connection: Connection, checked: Checked) -> Iterator[Problem]:
    """As `verify`, within the caller's transaction."""
    reader = Reader(storage, connection)
    for name, check in _CHECKS.items():
        try:
            yield from check(reader, checked)
        except Damage as error:
            yield Problem("damaged", name, f"not all of it can be read ({error})", RESTORE)


def _check_database(reader: Reader, _: Checked) -> Iterator[Problem]:
    for complaint in reader.integrity():
        yield Problem("damaged", "the database", complaint, RESTORE)
    for table in reader.dangling():
        yield Problem("missing", f"table {table!r}", "a row refers to one that is not there", RESTORE)


_CHECKS: dict[str, Callable[[Reader, Checked], Iterator[Problem]]] = {
    "the database": _check_database,
    "the tensors": check_tensors,
    "the tasks": check_tasks,
    "the versions": check_versions,
    "the calibrations": check_calibrations,
    "the backends": check_backends,
    "the aliases": check_aliases,
    "the routes": check_routes,
    "the experiments": check_experiments,
    "the allocations": check_allocations,
    "the logs": check_log,
}
