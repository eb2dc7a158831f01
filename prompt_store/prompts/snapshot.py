"""Everything a service needs to route requests, read at one moment and without tensor bytes or reports.

A snapshot is made of one immutable value a task. The next one reads only the tasks that the change log names since, and
of those only the rows that it does not have: versions and revisions come and go, and all that ever changes of one is
the day on which its model is shut down.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, Select, Table, select

from prompt_store.changes import current_sequence
from prompt_store.errors import InvalidName, SchemaMismatch
from prompt_store.experiments.allocating import allocations_in_force, read_allocations
from prompt_store.experiments.experiment import Experiment
from prompt_store.experiments.keeping import read_running
from prompt_store.experiments.records import NumberedAllocation
from prompt_store.names import AliasSelector, DigestSelector, NumberSelector, Selector
from prompt_store.prompts.bases import read_bases
from prompt_store.prompts.lookup import read_row, select_versions
from prompt_store.prompts.revisions import TaskRevision, require_task, to_revision
from prompt_store.prompts.unreadable import Unreadable, UnreadableVersion, readable
from prompt_store.prompts.version import BaseDescription, EnsemblePayload, PromptVersion
from prompt_store.routing.calibrations import Calibration, read_calibrations
from prompt_store.routing.revisions import read_routes
from prompt_store.routing.routes import TaskRoute
from prompt_store.tables import aliases, changes, task_revisions, tasks, versions

T = TypeVar("T")

# So many names or digests are asked for one by one; of more, all rows are read.
_MOST_NAMED = 500


@dataclass(frozen=True)
class TaskSnapshot:
    """One task. Treat the mappings as read-only.

    `revisions` and `versions` are by digest, `versions` in order of their numbers. Every digest in `numbers` and
    `aliases` is a key of `versions`, that of every readable version's task revision a key of `revisions`.
    `calibrations` are by version digest and measure, `allocations` by the name of the split in the route, and
    `experiments` are the running ones by theirs, without those whose document this code cannot read.
    """

    name: str
    revision: TaskRevision | Unreadable
    revisions: Mapping[str, TaskRevision | Unreadable]
    versions: Mapping[str, PromptVersion | UnreadableVersion]
    numbers: Mapping[int, str]
    aliases: Mapping[str, str]
    route: TaskRoute | Unreadable
    calibrations: Mapping[tuple[str, str], Calibration]
    allocations: Mapping[str, NumberedAllocation] = field(default_factory=dict)
    experiments: Mapping[str, Experiment] = field(default_factory=dict)

    def find(self, selector: Selector) -> PromptVersion | UnreadableVersion | None:
        """The version that a selector names, None where there is none. Raises InvalidName where it fits several."""
        match selector:
            case AliasSelector(name):
                digest = self.aliases.get(name)
            case NumberSelector(number):
                digest = self.numbers.get(number)
            case DigestSelector(prefix):
                digest = prefix if prefix in self.versions else self._by_prefix(prefix)
        return None if digest is None else self.versions[digest]

    def members(self, version: PromptVersion) -> tuple[PromptVersion, ...]:
        """The versions that answer for a version of this task: those of an ensemble, else itself.

        Raises SchemaMismatch where one of them cannot be read.
        """
        if isinstance(version.payload, EnsemblePayload):
            return tuple(readable(self.versions[digest]) for digest in version.payload.members)
        return (version,)

    def _by_prefix(self, prefix: str) -> str | None:
        place = bisect_left(self._digests, prefix)
        found = [digest for digest in self._digests[place : place + 2] if digest.startswith(prefix)]
        if len(found) > 1:
            raise InvalidName(f"{prefix!r} fits several versions of task {self.name!r}; give more of the digest")
        return found[0] if found else None

    @cached_property
    def _digests(self) -> list[str]:
        return sorted(self.versions)


@dataclass(frozen=True)
class StoreSnapshot:
    """The store as of change `sequence`: tasks by name, bases by fingerprint. Treat the mappings as read-only."""

    sequence: int
    tasks: Mapping[str, TaskSnapshot]
    bases: Mapping[str, BaseDescription]


def read_snapshot(connection: Connection, previous: StoreSnapshot | None = None) -> StoreSnapshot:
    """The store as the caller's one reading transaction sees it.

    What did not change since `previous` is shared with it. `previous` must be of the same store.
    """
    sequence = current_sequence(connection)
    if previous is None or previous.sequence > sequence:
        # Fewer changes than before: a backup was restored, so nothing is known any more.
        everything = _read_tasks(connection, None, {})
        return StoreSnapshot(sequence, everything, _read_bases(connection))
    rows = connection.execute(
        select(changes.c.kind, changes.c.task).where(changes.c.sequence > previous.sequence).distinct()
    ).all()
    changed = {row.task for row in rows if row.task is not None}
    kept = {name: task for name, task in previous.tasks.items() if name not in changed}
    return StoreSnapshot(
        sequence=sequence,
        tasks={**kept, **_read_tasks(connection, changed, previous.tasks)} if changed else previous.tasks,
        bases=_read_bases(connection) if any(row.kind == "base" for row in rows) else previous.bases,
    )


def read_task_snapshot(connection: Connection, name: str) -> TaskSnapshot:
    """One task as the caller's transaction sees it. Raises UnknownTask."""
    require_task(connection, name)
    return _read_tasks(connection, [name], {})[name]


def _read_tasks(
    connection: Connection, names: Collection[str] | None, known: Mapping[str, TaskSnapshot]
) -> dict[str, TaskSnapshot]:
    """The tasks of those names, or all; rows that `known` has are not read again."""
    if names is not None and len(names) > _MOST_NAMED:
        names = None
    before = [task for task in known.values() if names is None or task.name in names]
    revisions = _read_rows(
        connection, select(task_revisions), task_revisions, names, [task.revisions for task in before], _read_revision
    )
    by_digest = _read_rows(connection, select_versions(), versions, names, [task.versions for task in before], read_row)
    _follow_shutdowns(connection, names, by_digest)
    targets: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for row in connection.execute(_of(select(aliases), aliases, names)):
        targets[row.task][row.name] = row.version
    routes = read_routes(connection, names)
    stored = read_allocations(connection, names)
    running = read_running(connection, names)
    calibrations = read_calibrations(connection, names)
    query = select(tasks) if names is None else select(tasks).where(tasks.c.name.in_(names))
    rows = connection.execute(query).all()
    divided = {
        row.name: _divided(routes.get(row.name, TaskRoute()), stored[row.name], running[row.name]) for row in rows
    }
    return {
        row.name: TaskSnapshot(
            name=row.name,
            revision=revisions[row.name].get(row.current_revision) or _missing_revision(row.name),
            revisions=revisions[row.name],
            versions=by_digest[row.name],
            numbers={version.number: digest for digest, version in by_digest[row.name].items()},
            aliases=targets[row.name],
            route=divided[row.name][0],
            calibrations=calibrations.get(row.name, {}),
            allocations=divided[row.name][1],
            experiments={
                name: experiment
                for name, experiment in running[row.name].items()
                if not isinstance(experiment, Unreadable)
            },
        )
        for row in rows
    }


def _divided(
    route: TaskRoute | Unreadable,
    stored: Mapping[str, NumberedAllocation | Unreadable],
    running: Mapping[str, Experiment | Unreadable],
) -> tuple[TaskRoute | Unreadable, dict[str, NumberedAllocation]]:
    """A route with the allocations of its splits; one with a damaged allocation is not served.

    Traffic is split also for an experiment whose document cannot be read.
    """
    if isinstance(route, Unreadable):
        return route, {}
    try:
        return route, allocations_in_force(route.route, stored, running)
    except SchemaMismatch as error:
        return Unreadable(str(error)), {}


def _read_rows(
    connection: Connection,
    query: Select[Any],
    table: Table,
    names: Collection[str] | None,
    known: Iterable[Mapping[str, T]],
    parse: Callable[[Row[Any]], T],
) -> defaultdict[str, dict[str, T]]:
    """Every row of a table by task and digest, in order of numbers. What could not be read before is read again."""
    read = {digest: value for values in known for digest, value in values.items() if not isinstance(value, Unreadable)}
    here = select(table.c.task, table.c.digest).order_by(table.c.task, table.c.number)
    present = connection.execute(_of(here, table, names)).all()
    missing = [digest for _, digest in present if digest not in read]
    parsed: dict[str, T] = {}
    if missing:
        few = len(missing) <= _MOST_NAMED
        wanted = query.where(table.c.digest.in_(missing)) if few else _of(query, table, names)
        parsed = {row.digest: parse(row) for row in connection.execute(wanted) if row.digest not in read}
    found: defaultdict[str, dict[str, T]] = defaultdict(dict)
    for task, digest in present:
        found[task][digest] = read[digest] if digest in read else parsed[digest]
    return found


def _follow_shutdowns(
    connection: Connection,
    names: Collection[str] | None,
    read: Mapping[str, dict[str, PromptVersion | UnreadableVersion]],
) -> None:
    """Gives versions that were read before the shutdown date that they have now."""
    dated = select(versions.c.digest, versions.c.shutdown_date).where(versions.c.shutdown_date.is_not(None))
    dates = {row.digest: row.shutdown_date for row in connection.execute(_of(dated, versions, names))}
    for known in read.values():
        for digest, version in known.items():
            if isinstance(version, PromptVersion) and version.shutdown_date != dates.get(digest):
                known[digest] = version.model_copy(update={"shutdown_date": dates.get(digest)})


def _of(query: Select[Any], table: Table, names: Collection[str] | None) -> Select[Any]:
    return query if names is None else query.where(table.c.task.in_(names))


def _read_revision(row: Row[Any]) -> TaskRevision | Unreadable:
    try:
        return to_revision(row)
    except SchemaMismatch as error:
        return Unreadable(str(error))


def _missing_revision(task: str) -> Unreadable:
    return Unreadable(f"the current revision of task {task!r} is missing; apply the task again or restore a backup")


def _read_bases(connection: Connection) -> dict[str, BaseDescription]:
    return {base.fingerprint: base for base in read_bases(connection)}
