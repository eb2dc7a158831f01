"""What can be wrong with a store, and reading one so that damage in one place does not end the reading."""

from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Connection, Row, Select, select
from sqlalchemy.exc import DBAPIError

from prompt_store.migrating import Storage
from prompt_store.tables import task_revisions, version_tensors, versions

T = TypeVar("T")

RESTORE = "restore a backup"
UPGRADE = "upgrade Softcue"

# What pydantic says of a document with something new in it; a damaged one lacks something or is no JSON.
_SAYS_MORE = frozenset({"extra_forbidden", "union_tag_invalid", "literal_error"})


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, what, and what to do about it.

    `damaged`: content that no longer has its digest, or cannot be read. `missing`: something is referred to and not
    there. `contradictory`: rows disagree. `unreadable`: another release wrote it, so that nothing can be said of it.
    `versions` are those that cannot be relied on because of it, as `task@v7`.
    """

    kind: Literal["damaged", "missing", "contradictory", "unreadable"]
    where: str
    message: str
    remedy: str
    versions: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {self.message}; {self.remedy}"


@dataclass(slots=True)
class Checked:
    """How much was looked at; `size_bytes` are the tensors'."""

    tasks: int = 0
    revisions: int = 0
    versions: int = 0
    tensors: int = 0
    size_bytes: int = 0
    aliases: int = 0
    changes: int = 0


class Damage(Exception):
    """The database cannot read something; says in its words why."""


class Reader:
    """One moment of a store. What every check needs is read once, when it is asked for. Its methods raise Damage."""

    def __init__(self, storage: Storage, connection: Connection) -> None:
        self.storage = storage
        self.connection = connection

    def rows(self, query: Select[Any]) -> list[Row[Any]]:
        return self._attempt(lambda: list(self.connection.execute(query)))

    def row(self, query: Select[Any]) -> Row[Any] | None:
        return self._attempt(lambda: self.connection.execute(query).one_or_none())

    def integrity(self) -> list[str]:
        """What the database's own check complains of."""
        return self._attempt(lambda: self.storage.integrity(self.connection))

    def dangling(self) -> list[str]:
        """A table's name for each row that refers to none."""
        return self._attempt(lambda: self.storage.dangling_rows(self.connection))

    @cached_property
    def numbers(self) -> dict[str, tuple[str, int]]:
        """Task and number of each version, by digest; without those whose row cannot be read."""
        query = select(versions.c.digest, versions.c.task, versions.c.number)
        return {row.digest: (row.task, row.number) for row in self._readable(query, versions.c.digest)}

    @cached_property
    def revisions(self) -> dict[str, str]:
        """Each task revision's task, by its digest; without those whose row cannot be read."""
        query = select(task_revisions.c.digest, task_revisions.c.task)
        return {row.digest: row.task for row in self._readable(query, task_revisions.c.digest)}

    @cached_property
    def tensors(self) -> dict[str, dict[str, str]]:
        """Each version's tensors, name to digest."""
        found: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for row in self.rows(select(version_tensors)):
            found[row.version][row.name] = row.tensor
        return found

    def labels(self, digests: Collection[str]) -> tuple[str, ...]:
        """Versions as people name them, in order."""
        known = sorted(self.numbers[digest] for digest in digests if digest in self.numbers)
        unknown = sorted(digest[:12] for digest in digests if digest not in self.numbers)
        return (*(f"{task}@v{number}" for task, number in known), *unknown)

    def _readable(self, query: Select[Any], key: ColumnElement[str]) -> list[Row[Any]]:
        """All rows at once, or where that fails those that can be read one by one; keys come from an index."""
        try:
            return self.rows(query)
        except Damage:
            found: list[Row[Any]] = []
            for entry in self.rows(select(key)):
                with suppress(Damage):
                    found += self.rows(query.where(key == entry[0]))
            return found

    def _attempt(self, read: Callable[[], T]) -> T:
        try:
            # A savepoint, because PostgreSQL would refuse everything else in a transaction that failed.
            with self.connection.begin_nested():
                return read()
        except DBAPIError as error:
            if not self.storage.is_damage(error):
                raise
            raise Damage(str(error.orig)) from error
        except ValueError as error:
            # A value that its column's type cannot take, as a time that is none.
            raise Damage(str(error)) from error


def from_another_release(error: BaseException | None) -> bool:
    """Whether a document that was refused only says more than this release knows."""
    return isinstance(error, ValidationError) and all(
        problem["type"] in _SAYS_MORE for problem in error.errors(include_url=False, include_input=False)
    )


def refused_document(where: str, what: str, error: BaseException | None, versions: tuple[str, ...] = ()) -> Problem:
    """The problem with a document that this code cannot read: another release's, or damaged."""
    if from_another_release(error):
        return Problem("unreadable", where, f"{what} was written by another release of Softcue", UPGRADE, versions)
    return Problem("damaged", where, f"{what} cannot be read", RESTORE, versions)
