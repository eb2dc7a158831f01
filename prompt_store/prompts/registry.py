"""The registry: one object over the store's tasks, bases, versions and aliases; by its bases also over experiments and
routes.

Each method is one transaction; what happens inside is in the module of its noun. Every method may raise
StoreUnavailable, and those that take a task UnknownTask.
"""

from collections.abc import Callable
from dataclasses import fields
from datetime import date, datetime, timedelta
from typing import Any, TypeVar, cast

from pydantic import BaseModel, TypeAdapter
from sqlalchemy import Connection

from prompt_store import idempotency
from prompt_store.access import Principal
from prompt_store.changes import Change, ChangeWatcher, read_changes
from prompt_store.errors import UnknownAlias
from prompt_store.ledger.registry import LedgerRegistry
from prompt_store.names import check_text
from prompt_store.prompts import aliases, bases, deleting, listing, lookup, publishing, revisions
from prompt_store.prompts.aliases import UNSET, Alias, AliasMove, Unset
from prompt_store.prompts.bases import CarriedBase
from prompt_store.prompts.listing import ListedVersion, MovePage, VersionPage
from prompt_store.prompts.lookup import Evidence
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.publishing import NewVersion, Published
from prompt_store.prompts.revisions import TaskRevision
from prompt_store.prompts.snapshot import StoreSnapshot, TaskSnapshot, read_snapshot
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import Task
from prompt_store.prompts.tensor_file import Tensor
from prompt_store.prompts.unreadable import UnreadableVersion
from prompt_store.prompts.version import BaseDescription, PromptVersion
from prompt_store.upkeep import collecting
from prompt_store.upkeep.collecting import Collection

__all__ = [
    "UNSET",
    "Alias",
    "AliasMove",
    "BaseDescription",
    "CarriedBase",
    "Change",
    "ChangeWatcher",
    "Collection",
    "Evidence",
    "ListedVersion",
    "MovePage",
    "NewVersion",
    "Published",
    "Registry",
    "StoreSnapshot",
    "TaskRevision",
    "TaskSnapshot",
    "Unset",
    "VersionPage",
]


Moved = TypeVar("Moved", bound=Alias | None)
_MOVED: TypeAdapter[Alias | None] = TypeAdapter(Alias | None)


class Registry(LedgerRegistry):
    """Threads may share one. `now` gives the time that rows are stamped with."""

    def register_base(self, base: BaseDescription, principal: Principal) -> None:
        """Makes a base known, once. Raises Conflict when its fingerprint is known with other sizes."""
        with self.database.read() as connection:
            if base in bases.read_bases(connection):
                return
        with self.database.write() as connection:
            bases.register_base(connection, base, principal, self._now())

    def bases(self) -> list[BaseDescription]:
        with self.database.read() as connection:
            return bases.read_bases(connection)

    def carried_by_bases(self) -> list[CarriedBase]:
        """Every base with the versions that are bound to it, and the tasks that a move to it still needs."""
        with self.database.read() as connection:
            return bases.carried_by_bases(connection)

    def find_base(self, name_or_fingerprint: str) -> BaseDescription:
        """By name, fingerprint or unique prefix of it. Raises UnknownBase or InvalidName."""
        return bases.find_base(self.bases(), name_or_fingerprint)

    def apply_task(self, task: Task, principal: Principal) -> TaskRevision:
        """Makes `task` the current revision of its name; see `revisions.apply_task` for equal content."""
        with self.database.write() as connection:
            return revisions.apply_task(connection, task, principal, self._now())

    def add_task_revision(self, task: Task, principal: Principal) -> TaskRevision:
        """Stores `task` beside the current revision of its name, which stays current; makes a task that is unknown."""
        with self.database.write() as connection:
            return revisions.add_task_revision(connection, task, principal, self._now())

    def task(self, name: str) -> TaskRevision:
        """The task's current revision."""
        with self.database.read() as connection:
            return revisions.current_revision(connection, name)

    def task_revision(self, digest: str) -> TaskRevision:
        """Raises UnknownVersion."""
        with self.database.read() as connection:
            return revisions.read_revision(connection, digest)

    def tasks(self) -> list[TaskRevision]:
        """The current revision of every task, by name."""
        with self.database.read() as connection:
            return revisions.current_revisions(connection)

    def publish(
        self,
        new: NewVersion,
        alias: str | None,
        reason: str,
        principal: Principal,
        *,
        idempotency_key: str | None = None,
    ) -> Published:
        """Checks everything, then writes version, tensors, audit entry, change and alias in one transaction.

        The same content twice is one version: the second time only the alias moves, and the first publisher's report,
        notes and provenance stay. Raises UnknownTask, UnknownBase, BaseMismatch, InvalidArtifact, InvalidName or
        NotYetSupported, all before anything is written. A key that this principal used for the same request before
        brings the same answer again, and KeyReused for another.
        """
        check_text("reason", reason)
        asked = idempotency.asked(
            idempotency_key, principal, {"action": "publish", "alias": alias, "reason": reason, **_plain(new)}
        )
        with self.database.read() as connection:
            done = idempotency.answer_to(connection, asked, self._now())
            if done is not None:
                return _published_before(connection, done)
            prepared = publishing.prepare(connection, new, alias)
        with self.database.write() as connection:
            at = self._now()
            # Somebody may have done the same request meanwhile.
            done = idempotency.answer_to(connection, asked, at)
            if done is not None:
                return _published_before(connection, done)
            published = publishing.write(connection, prepared, alias, reason, principal, at)
            answer = {"version": published.version.digest, "created": published.created}
            idempotency.keep_answer(connection, asked, answer, at)
            return published

    def page(
        self,
        *,
        task: str | None = None,
        kind: str | None = None,
        base: str | None = None,
        tag: str | None = None,
        alias: str | None = None,
        after: str | None = None,
        limit: int = listing.DEFAULT_PAGE,
    ) -> VersionPage:
        """Versions by task, newest first, with the aliases that point at them; see `listing.page_versions`."""
        with self.database.read() as connection:
            return listing.page_versions(
                connection, task=task, kind=kind, base=base, tag=tag, alias=alias, after=after, limit=limit
            )

    def version_counts(self, task: str) -> dict[str, int]:
        """How many versions of each kind the task has."""
        with self.database.read() as connection:
            return listing.count_versions(connection, task)

    def version(self, task: str, selector: str) -> PromptVersion:
        """By alias, `v7`, digest or digest prefix. Raises UnknownVersion or UnknownAlias naming the nearest."""
        with self.database.read() as connection:
            return lookup.find_version(connection, task, selector)

    def versions(self, task: str) -> list[PromptVersion | UnreadableVersion]:
        """Newest first."""
        with self.database.read() as connection:
            return lookup.task_versions(connection, task)

    def evidence(self, version: str) -> Evidence:
        """Report and recipe of the version with this full digest. Raises UnknownVersion."""
        with self.database.read() as connection:
            return lookup.read_evidence(connection, version)

    def prompt(self, version: str) -> SoftPrompt | Prefix:
        """The tensor of the version with this full digest, hashed again.

        Raises UnknownVersion, InvalidArtifact where it holds none, DamagedArtifact.
        """
        with self.database.read() as connection:
            return lookup.read_prompt(connection, version)

    def soft_prompt(self, version: str) -> SoftPrompt:
        """As `prompt`. Raises InvalidArtifact where the version holds no soft prompt."""
        with self.database.read() as connection:
            return lookup.read_soft_prompt(connection, version)

    def delete_version(self, task: str, selector: str, *, reason: str, principal: Principal) -> PromptVersion:
        """Removes a version and the tensors that it alone had; returns what it was. Its number is not given again.

        Raises InUse naming the aliases, route and ensembles that need it; otherwise as `version`.
        """
        check_text("reason", reason)
        with self.database.write() as connection:
            return deleting.delete_version(
                connection, task, selector, reason=reason, principal=principal, at=self._now()
            )

    def note_shutdown(self, task: str, selector: str, day: date | None, principal: Principal) -> PromptVersion:
        """Writes down from which day on the model behind a version is gone; None takes that back.

        Raises InvalidArtifact for a version that no remote model is behind; otherwise as `version`.
        """
        with self.database.write() as connection:
            return publishing.note_shutdown(connection, task, selector, day, principal, self._now())

    def move_alias(
        self,
        task: str,
        alias: str,
        selector: str,
        *,
        expected: str | Unset | None = UNSET,
        reason: str,
        principal: Principal,
        idempotency_key: str | None = None,
    ) -> Alias:
        """Compare-and-set: `expected` is where the alias must point now (a digest or `v7`), None for nowhere.

        Raises Conflict saying where it points instead; UnknownVersion, UnknownAlias and InvalidName as `version`.
        """

        def move(connection: Connection, at: datetime) -> Alias:
            return aliases.move_alias(
                connection, task, alias, selector, expected=expected, reason=reason, principal=principal, at=at
            )

        return self._move(move, "move", task, alias, selector, expected, reason, principal, idempotency_key)

    def rollback_alias(
        self,
        task: str,
        alias: str,
        *,
        expected: str | Unset | None = UNSET,
        reason: str,
        principal: Principal,
        idempotency_key: str | None = None,
    ) -> Alias:
        """Takes the alias back to its previous target; a second time, to the one before that.

        Compare-and-set, as `move_alias`. Raises Conflict when `expected` does not hold, when there is no previous
        target or it was deleted; UnknownAlias.
        """

        def move(connection: Connection, at: datetime) -> Alias:
            return aliases.rollback_alias(
                connection, task, alias, expected=expected, reason=reason, principal=principal, at=at
            )

        return self._move(move, "rollback", task, alias, None, expected, reason, principal, idempotency_key)

    def remove_alias(
        self,
        task: str,
        alias: str,
        *,
        expected: str | Unset | None = UNSET,
        reason: str,
        principal: Principal,
        idempotency_key: str | None = None,
    ) -> None:
        """Compare-and-set, as `move_alias`; the history stays.

        Raises Conflict when `expected` does not hold or an applied route names the alias; UnknownAlias.
        """

        def move(connection: Connection, at: datetime) -> None:
            aliases.remove_alias(connection, task, alias, expected=expected, reason=reason, principal=principal, at=at)

        self._move(move, "remove", task, alias, None, expected, reason, principal, idempotency_key)

    def _move(
        self,
        move: Callable[[Connection, datetime], Moved],
        action: str,
        task: str,
        alias: str,
        selector: str | None,
        expected: str | Unset | None,
        reason: str,
        principal: Principal,
        idempotency_key: str | None,
    ) -> Moved:
        """Moves an alias in one transaction, once for each idempotency key."""
        check_text("reason", reason)
        request = {
            "action": action,
            "task": task,
            "alias": alias,
            "selector": selector,
            "expected": [] if isinstance(expected, Unset) else [expected],
            "reason": reason,
        }
        asked = idempotency.asked(idempotency_key, principal, request)
        with self.database.write() as connection:
            at = self._now()
            done = idempotency.answer_to(connection, asked, at)
            if done is not None:
                # The action is part of the request, so what it was answered is of its type.
                return cast(Moved, _MOVED.validate_python(done["alias"]))
            moved = move(connection, at)
            answer = {"alias": _MOVED.dump_python(moved, mode="json")}
            idempotency.keep_answer(connection, asked, answer, at)
            return moved

    def aliases(self, task: str) -> list[Alias]:
        with self.database.read() as connection:
            return aliases.read_aliases(connection, task)

    def alias(self, task: str, alias: str) -> Alias:
        """Raises UnknownAlias naming the nearest."""
        known = {entry.name: entry for entry in self.aliases(task)}
        if alias not in known:
            raise UnknownAlias(alias, known, where=f" of task {task!r}")
        return known[alias]

    def alias_history(self, task: str, alias: str) -> list[AliasMove]:
        """Oldest first."""
        with self.database.read() as connection:
            return aliases.read_alias_history(connection, task, alias)

    def alias_moves(
        self, task: str, alias: str, *, after: str | None = None, limit: int = listing.DEFAULT_PAGE
    ) -> MovePage:
        """Newest first, page by page. Raises UnknownAlias."""
        with self.database.read() as connection:
            return listing.page_moves(connection, task, alias, after=after, limit=limit)

    def rollback_target(self, task: str, alias: str) -> str | None:
        """The digest that `rollback_alias` would return an existing alias to; None where it would be refused."""
        with self.database.read() as connection:
            revisions.require_task(connection, task)
            return aliases.read_rollback_targets(connection, task).get((task, alias))

    def changes_since(self, sequence: int) -> list[Change]:
        """Oldest first."""
        with self.database.read() as connection:
            return read_changes(connection, sequence)

    def watch(self) -> ChangeWatcher:
        """Make it before the first `snapshot`."""
        return ChangeWatcher(self.database)

    def snapshot(self, previous: StoreSnapshot | None = None) -> StoreSnapshot:
        """Everything but tensor bytes and evidence, as of one moment; only what changed since `previous` is read."""
        with self.database.read() as connection:
            return read_snapshot(connection, previous)

    def plan_collection(self, grace: timedelta) -> Collection:
        """What `collect` would remove now: what nothing has named for as long as `grace`."""
        with self.database.read() as connection:
            return collecting.plan_collection(connection, grace, self._now())

    def collect(self, grace: timedelta, principal: Principal, reason: str) -> Collection:
        """Removes what nothing has named for as long as `grace`, in several short transactions; tells what went."""
        check_text("reason", reason)
        return collecting.collect(self.database, grace, reason=reason, principal=principal, now=self._now())


def _plain(new: NewVersion) -> dict[str, Any]:
    """All that is asked with a new version as JSON values, tensors by their digests."""

    def value(given: Any) -> Any:
        if isinstance(given, Tensor):
            return given.digest
        if isinstance(given, date):
            return given.isoformat()
        return given.model_dump(mode="json") if isinstance(given, BaseModel) else given

    return {field.name: value(getattr(new, field.name)) for field in fields(new)}


def _published_before(connection: Connection, answer: dict[str, Any]) -> Published:
    """Raises UnknownVersion where the version was deleted since."""
    return Published(lookup.read_version(connection, answer["version"]), answer["created"])
