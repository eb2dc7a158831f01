"""What is served right now: a snapshot of the store that follows its change log and is swapped as one reference.

Answers every request from memory; the store is read in a thread. A publish is warmed before it is swapped in, so that
no request pays for it. Requests in flight keep the snapshot that they started with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from prompt_store.database import Database
from prompt_store.errors import StoreError, UnknownAlias, UnknownTask, UnknownVersion
from prompt_store.names import (
    AliasSelector,
    DigestSelector,
    NumberSelector,
    RemoteModel,
    parse_model_name,
    parse_selector,
)
from prompt_store.prompts.registry import ChangeWatcher, Registry, StoreSnapshot, TaskRevision
from prompt_store.prompts.version import EnsemblePayload, PromptVersion, SoftPromptPayload
from prompt_store.routes import DEFAULT_BACKEND, DirectRoute
from service.engines.base import Engine, SoftPromptReference
from service.engines.errors import EngineError, EngineUnavailable
from service.routing.errors import NotServed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name stands for: a version of a task on a backend, or the bare base model (`task` is None)."""

    backend: str
    task: TaskRevision | None = None
    version: PromptVersion | None = None

    @property
    def label(self) -> str:
        """`task@v7`, or empty for the bare base."""
        return f"{self.version.task}@{self.version.label}" if self.version is not None else ""


def members(version: PromptVersion, snapshot: StoreSnapshot) -> tuple[PromptVersion, ...]:
    """The versions that answer for a version: those of an ensemble, else itself."""
    if isinstance(version.payload, EnsemblePayload):
        return tuple(snapshot.versions[digest] for digest in version.payload.members)
    return (version,)


class Catalog:
    """The snapshot that requests are answered from, and the task that keeps it fresh.

    `on_refresh` is told the sequence after each swap, `on_failure` of each read or warm-up that failed.
    """

    def __init__(
        self,
        database: Database,
        registry: Registry,
        engine: Engine,
        *,
        base_name: str,
        base_fingerprint: str,
        poll_s: float,
        on_refresh: Callable[[int], object],
        on_failure: Callable[[], object],
    ) -> None:
        self._registry = registry
        self._watcher = ChangeWatcher(database)
        self._engine = engine
        self.base_name = base_name
        self._base_fingerprint = base_fingerprint
        self._poll_s = poll_s
        self._on_refresh = on_refresh
        self._on_failure = on_failure
        self._warmed: set[str] = set()
        self._snapshot: StoreSnapshot | None = None
        self._by_task: dict[str, tuple[PromptVersion, ...]] = {}

    @property
    def snapshot(self) -> StoreSnapshot:
        """Raises EngineUnavailable while the service is starting."""
        if self._snapshot is None:
            raise EngineUnavailable("the service is starting; send the request again in a moment")
        return self._snapshot

    @property
    def loaded(self) -> bool:
        return self._snapshot is not None

    async def load(self) -> None:
        """Read the store for the first time, and warm what aliases point at. Raises StoreError."""
        await asyncio.to_thread(self._watcher.poll)
        await self._refresh()

    async def follow(self) -> None:
        """Poll the store until cancelled. While it cannot be read, the last snapshot keeps serving."""
        failing = False
        pending = False
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                changed = await asyncio.to_thread(self._watcher.poll)
                if changed or pending:
                    pending = True
                    pending = not await self._refresh()
                if failing:
                    log.warning("the store can be read again")
                    failing = False
            except StoreError as error:
                self._on_failure()
                if not failing:
                    log.error("the store cannot be read, serving what is known: %s", error)
                    failing = True

    async def _refresh(self) -> bool:
        """Read, warm, swap. False when the engine was away, so that something is left to be warmed."""
        complete = True
        snapshot = await asyncio.to_thread(self._registry.snapshot)
        wanted = self._to_warm(snapshot)
        for digest, version in wanted.items():
            if digest not in self._warmed:
                try:
                    await self._engine.warm(self.reference(version))
                except EngineUnavailable:
                    complete = False
                except (EngineError, StoreError) as error:
                    self._on_failure()
                    log.error("%s@%s cannot be warmed: %s", version.task, version.label, error)
                else:
                    self._warmed.add(digest)
        by_task: dict[str, list[PromptVersion]] = {}
        for version in sorted(snapshot.versions.values(), key=lambda version: version.number):
            by_task.setdefault(version.task, []).append(version)
        self._snapshot, self._by_task = snapshot, {task: tuple(versions) for task, versions in by_task.items()}
        self._on_refresh(snapshot.sequence)
        for digest in self._warmed - set(wanted):
            await self._engine.release(digest)
        self._warmed &= set(wanted)
        return complete

    def _to_warm(self, snapshot: StoreSnapshot) -> dict[str, PromptVersion]:
        """Soft prompts that an alias points at, itself or through an ensemble, and that this base can serve.

        By tensor digest.
        """
        versions = (snapshot.versions[digest] for aliases in snapshot.aliases.values() for digest in aliases.values())
        return {
            member.payload.tensor_digest: member
            for version in versions
            for member in members(version, snapshot)
            if isinstance(member.payload, SoftPromptPayload)
            and member.payload.base_fingerprint == self._base_fingerprint
        }

    def references(self, version: PromptVersion) -> tuple[SoftPromptReference, ...]:
        """The soft prompts that answer for a version: its own, or its members' where it is an ensemble."""
        return tuple(self.reference(member) for member in members(version, self.snapshot))

    def reference(self, version: PromptVersion) -> SoftPromptReference:
        """How an engine comes to a version's soft prompt. The version's payload must be one."""
        payload = version.payload
        assert isinstance(payload, SoftPromptPayload)
        return SoftPromptReference(
            digest=payload.tensor_digest,
            length=payload.shape[0],
            base_fingerprint=payload.base_fingerprint,
            load=lambda: self._registry.soft_prompt(version.digest),
        )

    def task(self, name: str) -> TaskRevision:
        """A task's current revision. Raises UnknownTask naming the nearest."""
        revision = self.snapshot.tasks.get(name)
        if revision is None:
            raise UnknownTask(name, self.snapshot.tasks, remedy="GET /v1/models lists what is served")
        return revision

    def resolve(self, model: str) -> Target:
        """What a request's `model` names: the base, `task`, `task@alias`, `task@v7`, `task@<digest>`.

        Raises NotFound (naming the nearest) or NotServed, InvalidName for text outside the grammar.
        """
        if model == self.base_name:
            return Target(DEFAULT_BACKEND)
        name = parse_model_name(model)
        if isinstance(name, RemoteModel):
            raise NotServed(f"no backend here serves '{model}'; name a task: GET /v1/models lists them")
        return self.resolve_task(name.task, name.selector)

    def resolve_task(self, task: str, selector: str | None) -> Target:
        """The version of a task that a selector names; without one, the version that the task's route names."""
        snapshot = self.snapshot
        current = self.task(task)
        route = snapshot.routes.get(task) or DirectRoute()
        assert isinstance(route, DirectRoute), "the store refuses routes of other kinds"
        version = self._select(task, selector or route.version)
        return Target(route.backend, snapshot.revisions.get(version.task_revision, current), version)

    def versions(self, task: str) -> tuple[PromptVersion, ...]:
        """A task's versions in order of their numbers."""
        return self._by_task.get(task, ())

    def _select(self, task: str, selector: str) -> PromptVersion:
        where = f" of task '{task}'"
        versions = self.versions(task)
        match parse_selector(selector):
            case NumberSelector(number):
                found = [version for version in versions if version.number == number]
                known = [version.label for version in versions]
            case DigestSelector(prefix):
                found = [version for version in versions if version.digest.startswith(prefix)]
                known = [version.digest[:12] for version in versions]
            case AliasSelector(alias):
                aliases = self.snapshot.aliases.get(task, {})
                if alias in aliases:
                    return self.snapshot.versions[aliases[alias]]
                names = ", ".join(f"{task}@{name}" for name in [*aliases, *(version.label for version in versions)])
                remedy = f"ask for {names}, or point the alias at one: `softcue prompts alias {task} {alias} VERSION`"
                if not names:
                    remedy = "publish a version of it: `softcue tune soft-prompt RECIPE` or `softcue prompts publish`"
                raise UnknownAlias(alias, aliases, where=where, remedy=remedy)
        if len(found) != 1:
            raise UnknownVersion(selector, known, where=where, remedy="GET /v1/models lists the versions")
        return found[0]
