"""What is served right now: a snapshot of the store that follows its changes and is swapped as one reference.

Answers every request from memory; the store is read in a thread of the catalog's own. A publish is warmed before it is
swapped in, so that no request pays for it. Requests in flight keep the snapshot that they started with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import TypeVar

from prompt_store.database import Database
from prompt_store.errors import (
    DamagedArtifact,
    InvalidName,
    SchemaMismatch,
    StoreError,
    StoreUnavailable,
    UnknownAlias,
    UnknownTask,
    UnknownVersion,
)
from prompt_store.names import (
    AliasSelector,
    DigestSelector,
    NumberSelector,
    RemoteModel,
    Selector,
    parse_model_name,
    parse_selector,
)
from prompt_store.prompts.registry import ChangeWatcher, Evidence, Registry, StoreSnapshot, TaskRevision, TaskSnapshot
from prompt_store.prompts.unreadable import Unreadable, readable
from prompt_store.prompts.version import Payload, PrefixPayload, PromptVersion, SoftPromptPayload
from prompt_store.routing.routes import DirectRoute, Route, TaskRoute, leaves, route_selectors
from service.damage import Damage
from service.engines.base import SoftPromptReference
from service.engines.errors import EngineError, EngineUnavailable
from service.routing.backends import Backends
from service.routing.plan import Plan, Target

log = logging.getLogger(__name__)

T = TypeVar("T")

_CACHED_NAMES = 4096
_LONGEST_WAIT_S = 1.0


class Catalog:
    """The snapshot that requests are answered from, and the task that keeps it fresh.

    `on_refresh` is told the sequence after each swap, `on_failure` of each read or warm-up that failed.
    """

    def __init__(
        self,
        database: Database,
        registry: Registry,
        backends: Backends,
        *,
        base_name: str,
        base_fingerprint: str,
        poll_s: float,
        fall_back_when_damaged: bool = False,
        on_refresh: Callable[[int], object],
        on_failure: Callable[[], object],
    ) -> None:
        self._database = database
        self._registry = registry
        self._watcher = ChangeWatcher(database, poll_s)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="softcue-catalog")
        self.backends = backends
        self._warming = [
            backend.engine
            for backend in backends.values()
            if backend.engine.capabilities().payload_kinds & {"soft_prompt", "prefix"}
        ]
        self.base_name = base_name
        self._base_fingerprint = base_fingerprint
        self._poll_s = poll_s
        self._on_refresh = on_refresh
        self._on_failure = on_failure
        self.damage = Damage(registry, fall_back=fall_back_when_damaged)
        # What ought to be warm, by tensor digest; of it, what is, and what waits for its turn.
        self._wanted: dict[str, PromptVersion] = {}
        self._warmed: set[str] = set()
        self._cold: dict[str, PromptVersion] = {}
        # Whether what aliases point at, as far as it was read, is warm or known to be at fault.
        self.settled = False
        self._snapshot: StoreSnapshot | None = None

    @property
    def snapshot(self) -> StoreSnapshot:
        """Raises EngineUnavailable while the service is starting."""
        if self._snapshot is None:
            raise EngineUnavailable("the service is starting; send the request again in a moment")
        return self._snapshot

    @property
    def loaded(self) -> bool:
        return self._snapshot is not None

    @property
    def store_reachable(self) -> bool:
        """Whether the store answered when it was last asked."""
        return self._database.healthy

    async def load(self) -> None:
        """Read the store for the first time; `follow` then warms what aliases point at. Raises StoreError.

        No tensor is read before requests are served: of a store with many tasks, that would take the start long.
        """
        await self._in_thread(self._watcher.poll)
        self._snapshot = await self._in_thread(self._registry.snapshot)
        self._wanted = self._pointed_at(self._snapshot)
        self._cold = dict(self._wanted)
        self._on_refresh(self._snapshot.sequence)

    async def follow(self) -> None:
        """Follow the store until cancelled. While it cannot be read, the last snapshot keeps serving."""
        failing = False
        stale, wait_s = False, 0.0
        while True:
            try:
                changed = await self._in_thread(self._watcher.wait, wait_s)
                stale = stale or changed or self.damage.noticed
                if stale:
                    self.settled = False
                    await self._refresh()
                    stale = False
                wait_s = await self._warm_next()
                self.settled = not self._cold and not self.damage.noticed
                if failing:
                    log.warning("the store can be read again")
                    failing = False
            except Exception as error:  # whatever it is, what is known can still be served
                self._on_failure()
                if not failing:
                    unexpected = None if isinstance(error, StoreError) else error
                    log.error("the store cannot be read, serving what is known: %s", error, exc_info=unexpected)
                    failing = True
                await asyncio.sleep(self._poll_s)

    def close(self) -> None:
        """Stop watching the store, once what is being read has come or failed: blocks until then."""
        self._watcher.close()
        self._thread.shutdown(cancel_futures=True)

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def _refresh(self) -> None:
        """Read, warm what is newly pointed at, swap. What waits to be warmed since before does not hold that up."""
        snapshot = await self._in_thread(self._registry.snapshot, self._snapshot)
        await self._in_thread(self.damage.look_again, snapshot)
        targets = self._pointed_at(snapshot)
        # What could not be warmed before gets another chance, but nothing waits for it.
        self._cold = {digest: version for digest, version in targets.items() if digest not in self._warmed}
        await self._warm(self._cold.keys() - self._wanted.keys())
        instead = await self._in_thread(self.damage.find_instead, snapshot)
        stand_ins = self._to_warm((snapshot.tasks[task], digest) for (task, _), digest in instead.items())
        self._cold |= {digest: version for digest, version in stand_ins.items() if digest not in self._warmed}
        await self._warm(stand_ins.keys() & self._cold.keys())
        self._snapshot, self._wanted = snapshot, {**targets, **stand_ins}
        self.damage.use(instead)
        self._on_refresh(snapshot.sequence)
        for digest in self._warmed - self._wanted.keys():
            for engine in self._warming:
                await engine.release(digest)
        self._warmed &= self._wanted.keys()

    async def _warm_next(self) -> float:
        """Warm one of those that wait for it; returns how long news may be waited for before the next one."""
        if not await self._warm(list(islice(self._cold, 1))):
            return self._poll_s
        return 0.0 if self._cold or self.damage.noticed else _LONGEST_WAIT_S

    def _pointed_at(self, snapshot: StoreSnapshot) -> dict[str, PromptVersion]:
        return self._to_warm((task, digest) for task in snapshot.tasks.values() for digest in _named_by(task))

    def _to_warm(self, pointed_at: Iterable[tuple[TaskSnapshot, str]]) -> dict[str, PromptVersion]:
        """Of versions by task and digest, those that this base serves with a tensor, themselves or in an ensemble.

        By tensor digest.
        """
        found: dict[str, PromptVersion] = {}
        for task, digest in pointed_at:
            version = task.versions[digest]
            try:
                members = task.members(readable(version))
            except SchemaMismatch:
                continue  # whoever asks for it is told
            for member in members:
                tensor = _tensor(member.payload)
                if tensor is not None and member.base_fingerprint == self._base_fingerprint:
                    found[tensor] = member
        return found

    async def _warm(self, digests: Iterable[str]) -> bool:
        """Warm these of the cold ones. What is at fault itself is logged, and cold no longer.

        False when engine or store is away: neither is waited for, and what is left stays cold.
        """
        for digest in digests:
            version = self._cold[digest]
            if not self.damage.knows(version):
                if not all(engine.stats().ready for engine in self._warming):
                    return False
                try:
                    for engine in self._warming:
                        await engine.warm(self.reference(version))
                except (EngineUnavailable, StoreUnavailable):
                    return False
                except DamagedArtifact:
                    self._on_failure()
                except (EngineError, StoreError) as error:
                    self._on_failure()
                    log.error("%s@%s cannot be warmed: %s", version.task, version.label, error)
                else:
                    self._warmed.add(digest)
            del self._cold[digest]
        return True

    def references(self, task: TaskSnapshot, version: PromptVersion) -> tuple[SoftPromptReference, ...]:
        """The soft prompts or prefixes that answer for a version: its own, or its members' where it is an ensemble.

        Raises SchemaMismatch for an ensemble with a member that cannot be read.
        """
        return tuple(self.reference(member) for member in task.members(version))

    def reference(self, version: PromptVersion) -> SoftPromptReference:
        """How an engine comes to a version's soft prompt or prefix. The version's payload must be one."""
        payload = version.payload
        assert isinstance(payload, SoftPromptPayload | PrefixPayload)
        return SoftPromptReference(
            # A prefix in a form that is not served has no tensor of its own, and loading it says so.
            digest=_tensor(payload) or version.digest,
            length=payload.length if isinstance(payload, PrefixPayload) else payload.shape[0],
            base_fingerprint=payload.base_fingerprint,
            load=lambda: self.damage.load(version),
        )

    def evidence(self, version: str) -> Evidence:
        """Report and recipe of a version by digest, read from the store. Raises StoreError."""
        return self._registry.evidence(version)

    def task(self, name: str) -> TaskSnapshot:
        """Raises UnknownTask naming the nearest."""
        task = self.snapshot.tasks.get(name)
        if task is None:
            raise UnknownTask(name, self.snapshot.tasks, remedy="GET /v1/models lists what is served")
        return task

    def resolve(self, model: str) -> Plan:
        """What a request's `model` names: the base, `task`, `task@alias`, `task@v7`, `task@<digest>`, `ft:<id>`.

        Raises NotFound (naming the nearest), NotServed, InvalidName for text outside the grammar, SchemaMismatch for
        what this release cannot read, or DamagedArtifact.
        """
        if self.base_name and model == self.base_name:
            return Plan(Target(self.backends.of_base()))
        name = _parse_model(model)
        if isinstance(name, RemoteModel):
            return Plan(Target(self.backends.of_model(name.id), remote_model=name.id))
        return self.resolve_task(name.task, name.selector)

    def resolve_task(self, task: str, selector: str | None) -> Plan:
        """The version of a task that a selector names; without one, what the task's route says."""
        found = self.task(task)
        known = found.route
        if isinstance(known, Unreadable):
            if selector is None:
                raise SchemaMismatch(known.reason)
            known = TaskRoute()  # a version that is asked for is served whatever became of the route
        route, target = known.route, None
        if selector is not None:
            target = self._named(found, route, selector)
        elif isinstance(route, DirectRoute):
            target = self.target(found, route)
        return Plan(target, found, route, known.deadline_s, known.daily_cost_ceiling)

    def target(self, task: TaskSnapshot, leaf: DirectRoute) -> Target:
        """Who answers for a leaf of the task's route. Raises as `resolve`."""
        version = self.version(task, leaf.version)
        backend = leaf.backend or self.backends.serving(version.payload)
        return Target(backend, self._revision(task, version), version)

    def _named(self, task: TaskSnapshot, route: Route, selector: str) -> Target:
        """Who answers for a version that is asked for: the backend that the route has for it, where it has one."""
        version = self.version(task, selector)
        at = next((leaf for _, leaf in leaves(route) if task.find(_parse_selector(leaf.version)) is version), route)
        backend = self.backends.serving(version.payload, at.backend if isinstance(at, DirectRoute) else None)
        return Target(backend, self._revision(task, version), version)

    def version(self, task: TaskSnapshot, selector: str) -> PromptVersion:
        """What answers for a version of a task that is named so. Raises as `resolve`."""
        parsed = _parse_selector(selector)
        found = task.find(parsed)
        if found is None:
            raise _unknown(task, parsed)
        return self.damage.answering(readable(found), task, parsed)

    def _revision(self, task: TaskSnapshot, version: PromptVersion) -> TaskRevision:
        return readable(task.revisions[version.task_revision])


_parse_model = lru_cache(_CACHED_NAMES)(parse_model_name)
_parse_selector = lru_cache(_CACHED_NAMES)(parse_selector)


def _named_by(task: TaskSnapshot) -> Iterator[str]:
    """The digests of what a task's aliases and its route point at."""
    yield from task.aliases.values()
    if not isinstance(task.route, Unreadable):
        for selector in route_selectors(task.route.route):
            with suppress(InvalidName):  # a digest that fits several by now, which whoever asks is told
                found = task.find(_parse_selector(selector))
                if found is not None:
                    yield found.digest


def _tensor(payload: Payload) -> str | None:
    """The digest of the one tensor that a payload is served with."""
    match payload:
        case SoftPromptPayload(tensor_digest=digest) | PrefixPayload(tensors={"prefix": digest}):
            return digest
    return None


def _unknown(task: TaskSnapshot, selector: Selector) -> UnknownVersion | UnknownAlias:
    where = f" of task '{task.name}'"
    labels = [version.label for version in task.versions.values()]
    match selector:
        case NumberSelector(number):
            return UnknownVersion(f"v{number}", labels, where=where, remedy="GET /v1/models lists the versions")
        case DigestSelector(prefix):
            known = [digest[:12] for digest in task.versions]
            return UnknownVersion(prefix, known, where=where, remedy="GET /v1/models lists the versions")
        case AliasSelector(alias):
            names = ", ".join(f"{task.name}@{name}" for name in [*task.aliases, *labels])
            remedy = f"ask for {names}, or point the alias at one: `softcue prompts alias {task.name} {alias} VERSION`"
            if not names:
                remedy = "publish a version of it: `softcue tune soft-prompt RECIPE` or `softcue prompts publish`"
            return UnknownAlias(alias, task.aliases, where=where, remedy=remedy)
