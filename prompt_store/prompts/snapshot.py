"""Everything a service needs to route requests, read at one moment and without tensor bytes."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, select

from prompt_store.changes import current_sequence
from prompt_store.prompts.bases import read_bases
from prompt_store.prompts.lookup import to_version
from prompt_store.prompts.revisions import TaskRevision, to_revision
from prompt_store.prompts.version import BaseDescription, PromptVersion
from prompt_store.routes import DirectRoute, Route, read_routes
from prompt_store.tables import aliases, task_revisions, tasks, versions


@dataclass(frozen=True)
class StoreSnapshot:
    """The store as of change `sequence`. Treat the mappings as read-only.

    Every task has an entry in `tasks`, `numbers`, `aliases` and `routes`, if only an empty or default one; every
    digest in `numbers`, `aliases` and `PromptVersion.task_revision` is a key of `versions` or `revisions`.
    """

    sequence: int
    tasks: Mapping[str, TaskRevision]
    revisions: Mapping[str, TaskRevision]
    versions: Mapping[str, PromptVersion]
    numbers: Mapping[str, Mapping[int, str]]
    aliases: Mapping[str, Mapping[str, str]]
    routes: Mapping[str, Route]
    bases: Mapping[str, BaseDescription]


def read_snapshot(connection: Connection) -> StoreSnapshot:
    """All of it within the caller's one reading transaction."""
    revisions = {row.digest: to_revision(row) for row in connection.execute(select(task_revisions))}
    current = {row.name: revisions[row.current_revision] for row in connection.execute(select(tasks))}
    numbers: defaultdict[str, dict[int, str]] = defaultdict(dict)
    by_digest: dict[str, PromptVersion] = {}
    for row in connection.execute(select(versions).order_by(versions.c.task, versions.c.number)):
        by_digest[row.digest] = to_version(row)
        numbers[row.task][row.number] = row.digest
    targets: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for row in connection.execute(select(aliases)):
        targets[row.task][row.name] = row.version
    applied = read_routes(connection)
    return StoreSnapshot(
        sequence=current_sequence(connection),
        tasks=current,
        revisions=revisions,
        versions=by_digest,
        numbers={task: numbers[task] for task in current},
        aliases={task: targets[task] for task in current},
        routes={task: applied.get(task, DirectRoute()) for task in current},
        bases={base.fingerprint: base for base in read_bases(connection)},
    )
