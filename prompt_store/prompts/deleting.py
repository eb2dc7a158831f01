"""Deleting versions that nothing needs, and who needs a version.

What a deletion leaves: the history, the audit trail, and the number, which is never given again.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, select

from prompt_store.access import Principal
from prompt_store.changes import record
from prompt_store.errors import InUse
from prompt_store.names import AliasSelector, DigestSelector, NumberSelector, parse_selector
from prompt_store.prompts.aliases import VERSION_DELETED
from prompt_store.prompts.lookup import find_version, to_version
from prompt_store.prompts.unreadable import readable
from prompt_store.prompts.version import EnsemblePayload, PromptVersion
from prompt_store.routing.revisions import read_routes, read_routes_behind
from prompt_store.routing.routes import Route, route_selectors
from prompt_store.tables import aliases, tensors, version_tensors, versions

_KINDS_WITHOUT_MEMBERS = ("soft_prompt", "prefix", "text", "remote_model")


@dataclass(frozen=True, slots=True)
class Use:
    """One reason why a version is needed, in words; `ensemble` is the digest of the ensemble that it is a member of."""

    text: str
    ensemble: str | None = None


def read_uses(connection: Connection, task: str | None = None) -> Mapping[str, list[Use]]:
    """Who needs each version of a task, or of all tasks, by its digest: aliases, routes in force and ensembles.

    And running experiments, which go back to a route when they are stopped; their arms are in the route in force.

    Raises SchemaMismatch for a route or version of another release, as what it needs cannot be told.
    """
    uses: defaultdict[str, list[Use]] = defaultdict(list)
    named = select(aliases.c.task, aliases.c.name, aliases.c.version).order_by(aliases.c.task, aliases.c.name)
    numbered = select(versions.c.task, versions.c.number, versions.c.digest)
    compound = select(versions).where(versions.c.kind.not_in(_KINDS_WITHOUT_MEMBERS))
    if task is None:
        applied = read_routes(connection)
    else:
        named = named.where(aliases.c.task == task)
        numbered = numbered.where(versions.c.task == task)
        compound = compound.where(versions.c.task == task)
        applied = read_routes(connection, [task])
    targets: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for row in connection.execute(named):
        uses[row.version].append(Use(f"alias {row.name!r}"))
        targets[row.task][row.name] = row.version
    numbers: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for row in connection.execute(numbered):
        numbers[row.task][row.number] = row.digest
    for owner, route in applied.items():
        for selector, digest in _named_by(readable(route).route, numbers[owner], targets[owner]):
            uses[digest].append(Use(f"the route in force (by {selector!r})"))
    for owner, experiment, behind in read_routes_behind(connection, None if task is None else [task]):
        for selector, digest in _named_by(readable(behind).route, numbers[owner], targets[owner]):
            uses[digest].append(Use(f"the route that experiment {experiment!r} goes back to (by {selector!r})"))
    for stored in connection.execute(compound):
        ensemble = to_version(stored)
        if isinstance(ensemble.payload, EnsemblePayload):
            for member in ensemble.payload.members:
                uses[member].append(Use(f"ensemble {ensemble.label}", ensemble.digest))
    return uses


def delete_version(
    connection: Connection, task: str, selector: str, *, reason: str, principal: Principal, at: datetime
) -> PromptVersion:
    """Removes the version and the tensors that it alone had; returns what it was.

    Raises InUse naming everyone who needs it; as `find_version` for what is not there.
    """
    version = find_version(connection, task, selector)
    users = tuple(use.text for use in read_uses(connection, task).get(version.digest, []))
    if users:
        raise InUse(
            f"version {version.label} ({version.digest[:12]}) of task {task!r} is needed by {', '.join(users)}; "
            "move, remove or delete what needs it first",
            users=users,
            current=version.digest,
        )
    erase_version(
        connection,
        task,
        version.digest,
        number=version.number,
        kind=version.payload.kind,
        reason=reason,
        principal=principal,
        at=at,
    )
    return version


def erase_version(
    connection: Connection,
    task: str,
    digest: str,
    *,
    number: int,
    kind: str,
    reason: str,
    principal: Principal,
    at: datetime,
) -> int:
    """Removes a version that is known to be unneeded; returns how many bytes of tensors went with it."""
    held = connection.execute(select(version_tensors.c.tensor).where(version_tensors.c.version == digest))
    own = set(held.scalars())
    connection.execute(delete(version_tensors).where(version_tensors.c.version == digest))
    connection.execute(delete(versions).where(versions.c.digest == digest))
    shared = connection.execute(select(version_tensors.c.tensor).where(version_tensors.c.tensor.in_(own)))
    alone = tensors.c.digest.in_(own - set(shared.scalars()))
    freed = connection.execute(select(tensors.c.size_bytes).where(alone)).scalars().all()
    connection.execute(delete(tensors).where(alone))
    record(
        connection,
        "version",
        action=VERSION_DELETED,
        task=task,
        subject=digest,
        principal=principal,
        at=at,
        reason=reason,
        details={"number": number, "kind": kind},
    )
    return sum(freed)


def _named_by(route: Route, numbers: Mapping[int, str], targets: Mapping[str, str]) -> list[tuple[str, str]]:
    """Selector and digest of each version that a route names; a digest prefix names all that it fits."""
    found: list[tuple[str, str]] = []
    for text in sorted(route_selectors(route)):
        match parse_selector(text):
            case NumberSelector(number):
                digests = [numbers[number]] if number in numbers else []
            case DigestSelector(prefix):
                digests = [digest for digest in numbers.values() if digest.startswith(prefix)]
            case AliasSelector(name):
                digests = [targets[name]] if name in targets else []
        found += [(text, digest) for digest in digests]
    return found
