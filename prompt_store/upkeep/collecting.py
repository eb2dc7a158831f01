"""Collecting what nothing names: versions after a grace period, tensors without a version, answers to old requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, func, select

from prompt_store.access import Principal
from prompt_store.changes import current_sequence
from prompt_store.database import Database
from prompt_store.idempotency import LIFETIME
from prompt_store.prompts.aliases import read_rollback_targets
from prompt_store.prompts.deleting import Use, erase_version, read_uses
from prompt_store.tables import alias_moves, calibrations, idempotency_keys, tensors, version_tensors, versions

# Publishers wait for each transaction, so it is kept short.
_VERSIONS_AT_ONCE = 50


@dataclass(frozen=True, slots=True)
class UnnamedVersion:
    """A version that neither an alias, a route, an ensemble that stays, nor an alias's rollback would name.

    `size_bytes` counts its tensors, also those that it shares. `unnamed_since` is when the last alias left it, or when
    it was published if none ever named it.
    """

    task: str
    number: int
    digest: str
    kind: str
    size_bytes: int
    unnamed_since: datetime

    @property
    def label(self) -> str:
        """`task@v7`."""
        return f"{self.task}@v{self.number}"


@dataclass(frozen=True, slots=True)
class OrphanedTensor:
    """A tensor that belongs to no version."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Collection:
    """What a collection removes, or has removed, and how many bytes of tensors that frees.

    `calibrations` counts those that go with the versions, `answers` expired idempotency keys. `waiting` are unnamed
    versions that the grace period alone keeps.
    """

    versions: tuple[UnnamedVersion, ...]
    tensors: tuple[OrphanedTensor, ...]
    calibrations: int
    answers: int
    size_bytes: int
    waiting: tuple[UnnamedVersion, ...]


def plan_collection(connection: Connection, grace: timedelta, now: datetime) -> Collection:
    """What a collection would remove now. Raises SchemaMismatch as `read_uses`."""
    uses = read_uses(connection)
    kept = {digest for digest, found in uses.items() if any(use.ensemble is None for use in found)}
    kept.update(read_rollback_targets(connection).values())
    sizes, owners = _read_tensors(connection)
    unnamed = {version.digest: version for version in _read_versions(connection, sizes, owners, kept)}
    old = {digest for digest, version in unnamed.items() if version.unnamed_since <= now - grace}
    removed = _closed(old, uses)
    waiting = _closed(set(unnamed), uses) - removed
    orphans = tuple(OrphanedTensor(digest, sizes[digest]) for digest in sorted(sizes.keys() - owners.keys()))
    freed = [sizes[tensor] for tensor, having in owners.items() if tensor in sizes and having <= removed]
    expired = select(func.count()).where(idempotency_keys.c.created_at < now - LIFETIME)
    return Collection(
        versions=tuple(version for digest, version in unnamed.items() if digest in removed),
        tensors=orphans,
        calibrations=_count_calibrations(connection, removed),
        answers=connection.execute(expired).scalar_one(),
        size_bytes=sum(freed) + sum(tensor.size_bytes for tensor in orphans),
        waiting=tuple(version for digest, version in unnamed.items() if digest in waiting),
    )


def collect(database: Database, grace: timedelta, *, reason: str, principal: Principal, now: datetime) -> Collection:
    """Removes what nothing names and tells what went.

    In transactions of a few versions each. Wherever somebody has written since the one before, it is decided anew what
    goes: what is named meanwhile stays. Interrupted, it leaves a whole store with less collected.
    """
    gone: list[UnnamedVersion] = []
    orphans: list[OrphanedTensor] = []
    measured = answers = freed = 0
    sequence: int | None = None
    while True:
        with database.write() as connection:
            if current_sequence(connection) != sequence:
                plan = plan_collection(connection, grace, now)
                orphans += plan.tensors
                freed += sum(tensor.size_bytes for tensor in plan.tensors)
                connection.execute(delete(tensors).where(tensors.c.digest.not_in(select(version_tensors.c.tensor))))
                answers += plan.answers
                connection.execute(delete(idempotency_keys).where(idempotency_keys.c.created_at < now - LIFETIME))
                # Ensembles first, so that none is ever without its members.
                left = sorted(plan.versions, key=lambda version: version.kind != "ensemble")
            batch, left = left[:_VERSIONS_AT_ONCE], left[_VERSIONS_AT_ONCE:]
            measured += _count_calibrations(connection, {version.digest for version in batch})
            for version in batch:
                freed += erase_version(
                    connection,
                    version.task,
                    version.digest,
                    number=version.number,
                    kind=version.kind,
                    reason=reason,
                    principal=principal,
                    at=now,
                )
            sequence = current_sequence(connection)
        gone += batch
        if not left:
            gone.sort(key=lambda version: (version.task, version.number))
            return Collection(tuple(gone), tuple(orphans), measured, answers, freed, plan.waiting)


def _count_calibrations(connection: Connection, digests: set[str]) -> int:
    """How many there are of those versions. There are few of them, so they are counted one by one."""
    return sum(digest in digests for digest in connection.execute(select(calibrations.c.version)).scalars())


def _read_tensors(connection: Connection) -> tuple[dict[str, int], dict[str, set[str]]]:
    """Each tensor's size in bytes, and the versions that have it."""
    sizes = {row.digest: row.size_bytes for row in connection.execute(select(tensors.c.digest, tensors.c.size_bytes))}
    owners: dict[str, set[str]] = {}
    for row in connection.execute(select(version_tensors.c.tensor, version_tensors.c.version)):
        owners.setdefault(row.tensor, set()).add(row.version)
    return sizes, owners


def _read_versions(
    connection: Connection, sizes: Mapping[str, int], owners: Mapping[str, set[str]], kept: set[str]
) -> list[UnnamedVersion]:
    left = select(alias_moves.c.previous, func.max(alias_moves.c.at).label("at")).group_by(alias_moves.c.previous)
    left_at = {row.previous: row.at for row in connection.execute(left)}
    held: dict[str, int] = {}
    for tensor, having in owners.items():
        for digest in having:
            held[digest] = held.get(digest, 0) + sizes.get(tensor, 0)
    rows = connection.execute(
        select(versions.c.task, versions.c.number, versions.c.digest, versions.c.kind, versions.c.created_at).order_by(
            versions.c.task, versions.c.number
        )
    )
    return [
        UnnamedVersion(
            row.task,
            row.number,
            row.digest,
            row.kind,
            held.get(row.digest, 0),
            max(row.created_at, left_at.get(row.digest, row.created_at)),
        )
        for row in rows
        if row.digest not in kept
    ]


def _closed(candidates: set[str], uses: Mapping[str, list[Use]]) -> set[str]:
    """Those candidates that only ensembles among the candidates need."""
    chosen = candidates
    while True:
        needed = {digest for digest in chosen for use in uses.get(digest, []) if use.ensemble not in chosen}
        if not needed:
            return chosen
        chosen = chosen - needed
