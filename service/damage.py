"""Versions whose tensors the store can no longer give back whole: who noticed, and what answers for them instead.

A tensor is hashed whenever it is read, so a damaged one never reaches an engine. What is noticed here only refuses the
version at once, before an engine is asked, and lets aliases fall back where that is wanted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from prompt_store.errors import DamagedArtifact, StoreError, StoreUnavailable, UnknownAlias
from prompt_store.names import AliasSelector, Selector
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.registry import Registry, StoreSnapshot, TaskSnapshot
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.unreadable import Unreadable, readable
from prompt_store.prompts.version import EnsemblePayload, PrefixPayload, PromptVersion, SoftPromptPayload

log = logging.getLogger(__name__)


class Damage:
    """What is known of it. `load` may be called from any thread, `look_again` and `find_instead` from one at a time.

    With `fall_back`, an alias that points at a damaged version is answered by what it pointed at before.
    """

    def __init__(self, registry: Registry, *, fall_back: bool) -> None:
        self._registry = registry
        self._fall_back = fall_back
        self._damaged: dict[str, tuple[PromptVersion, str]] = {}
        self._instead: Mapping[tuple[str, str], str] = {}
        self.noticed = False

    @property
    def versions(self) -> int:
        """How many versions are known to be damaged."""
        return len(self._damaged)

    @property
    def fallen_back(self) -> int:
        """How many aliases are answered by an earlier target."""
        return len(self._instead)

    def load(self, version: PromptVersion) -> SoftPrompt | Prefix:
        """The tensor of a version, for an engine. Raises as `Registry.prompt`, and remembers a DamagedArtifact."""
        try:
            return self._registry.prompt(version.digest)
        except DamagedArtifact as error:
            if version.digest not in self._damaged:
                self._damaged[version.digest] = (version, str(error))
                self.noticed = True
                log.error("%s@%s is refused: %s", version.task, version.label, error)
            raise

    def knows(self, version: PromptVersion) -> bool:
        return version.digest in self._damaged

    def answering(self, version: PromptVersion, task: TaskSnapshot, selector: Selector) -> PromptVersion:
        """The version that may answer for the one that `selector` named. Raises DamagedArtifact where none may."""
        reason = self._reason(version)
        if reason is None:
            return version
        if isinstance(selector, AliasSelector):
            instead = self._instead.get((task.name, selector.name))
            if instead is not None:
                return readable(task.versions[instead])
        raise DamagedArtifact(reason)

    def look_again(self, snapshot: StoreSnapshot) -> None:
        """Forgets versions that are gone, or whole again because they were repaired."""
        for digest, (version, _) in list(self._damaged.items()):
            task = snapshot.tasks.get(version.task)
            if task is not None and digest in task.versions:
                try:
                    self._registry.prompt(digest)
                except DamagedArtifact:
                    continue
                log.warning("%s@%s can be read again", version.task, version.label)
            del self._damaged[digest]

    def find_instead(self, snapshot: StoreSnapshot) -> dict[tuple[str, str], str]:
        """What answers, by task and alias, where a damaged version would: `use` puts it in force."""
        self.noticed = False
        found: dict[tuple[str, str], str] = {}
        for task in snapshot.tasks.values() if self._fall_back and self._damaged else ():
            for alias, target in task.aliases.items():
                version = task.versions[target]
                if not isinstance(version, Unreadable) and self._reason(version) is not None:
                    instead = self._before(task, alias)
                    if instead is not None:
                        found[task.name, alias] = instead.digest
                        if self._instead.get((task.name, alias)) != instead.digest:
                            log.warning(
                                "%s@%s is answered by %s because %s is damaged",
                                *(task.name, alias, instead.label, version.label),
                            )
        return found

    def use(self, instead: Mapping[tuple[str, str], str]) -> None:
        self._instead = instead

    def _before(self, task: TaskSnapshot, alias: str) -> PromptVersion | None:
        """The newest earlier target of an alias that is whole."""
        try:
            moves = self._registry.alias_history(task.name, alias)
        except UnknownAlias:
            return None
        for move in reversed(moves):
            version = task.versions.get(move.previous or "")
            if version is not None and not isinstance(version, Unreadable) and self._is_whole(version, task):
                return version
        return None

    def _is_whole(self, version: PromptVersion, task: TaskSnapshot) -> bool:
        try:
            for member in task.members(version):
                if isinstance(member.payload, SoftPromptPayload | PrefixPayload):
                    self.load(member)
        except StoreUnavailable:
            raise
        except StoreError:
            return False
        return True

    def _reason(self, version: PromptVersion) -> str | None:
        """What is said of a damaged version, or of an ensemble with a damaged member; None of others."""
        if not self._damaged:
            return None
        payload = version.payload
        parts = payload.members if isinstance(payload, EnsemblePayload) else (version.digest,)
        return next((self._damaged[digest][1] for digest in parts if digest in self._damaged), None)
