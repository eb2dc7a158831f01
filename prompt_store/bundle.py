"""Loading a folder of examples into a store: tasks, their tuned prompts and an alias, without disturbing what is there.

A bundle is a folder whose subfolders each hold `task.toml` and maybe `prompt.safetensors` with `report.json`.
"""

from dataclasses import dataclass
from pathlib import Path

from prompt_store.access import Principal
from prompt_store.errors import Conflict, InvalidArtifact, StoreError, UnknownTask, UnknownVersion
from prompt_store.prompts.artifact import read_artifact, read_report
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.task import Task, load_task

TASK_FILE = "task.toml"
PROMPT_FILE = "prompt.safetensors"
REPORT_FILE = "report.json"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading did for one task. `version` is the label of the bundle's prompt, None where it was not published.

    `skipped` says why the prompt was left out, if it was.
    """

    task: str
    task_applied: bool
    version: str | None
    version_created: bool
    alias_set: bool
    skipped: str | None = None

    @property
    def changed(self) -> bool:
        return self.task_applied or self.version_created or self.alias_set


def load_bundle(registry: Registry, folder: Path, alias: str, principal: Principal) -> list[Loaded]:
    """Applies each task that is absent, publishes its prompt, and sets `alias` where the task has no such alias.

    A task that somebody edited stays edited, and an alias that somebody moved stays moved. A prompt is published for
    the revision in the bundle; where the store never had that revision, it is skipped. Loading twice changes nothing
    the second time. Raises StoreError naming the file for whatever cannot be loaded; folders before it are loaded then.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}; give one whose subfolders hold {TASK_FILE}")
    return [_load_one(registry, path.parent, alias, principal) for path in sorted(folder.glob(f"*/{TASK_FILE}"))]


def _load_one(registry: Registry, folder: Path, alias: str, principal: Principal) -> Loaded:
    task = load_task(folder / TASK_FILE)
    applied = _apply_if_absent(registry, task, principal)
    path = folder / PROMPT_FILE
    if not path.exists():
        return Loaded(task.name, applied, None, False, False, skipped=f"no {PROMPT_FILE}")
    if not applied and not _has_revision(registry, task):
        reason = (
            f"the store has another edition of this task; `softcue prompts apply-task {folder / TASK_FILE}` takes this"
        )
        return Loaded(task.name, False, None, False, False, skipped=reason)
    artifact = read_artifact(path)
    if artifact.task is not None and artifact.task != task.name:
        raise InvalidArtifact(
            f"{path}: was made for task {artifact.task!r}, not {task.name!r}; put it in its own folder"
        )
    report = read_report(folder / REPORT_FILE) if (folder / REPORT_FILE).exists() else None
    published = registry.publish(
        NewVersion(
            task=task.name,
            payload_content=artifact.prompt,
            base_fingerprint=artifact.base_fingerprint,
            task_revision=task.digest,
            provenance=artifact.provenance,
            report=report,
            notes=artifact.notes,
        ),
        None,
        f"loaded from {folder}",
        principal,
    )
    alias_set = _set_if_absent(registry, task.name, alias, published.version.digest, str(folder), principal)
    return Loaded(task.name, applied, published.version.label, published.created, alias_set)


def _apply_if_absent(registry: Registry, task: Task, principal: Principal) -> bool:
    try:
        registry.task(task.name)
    except UnknownTask:
        registry.apply_task(task, principal)
        return True
    return False


def _has_revision(registry: Registry, task: Task) -> bool:
    try:
        registry.task_revision(task.digest)
    except UnknownVersion:
        return False
    return True


def _set_if_absent(registry: Registry, task: str, alias: str, version: str, folder: str, principal: Principal) -> bool:
    if any(entry.name == alias for entry in registry.aliases(task)):
        return False
    try:
        registry.move_alias(task, alias, version, expected=None, reason=f"loaded from {folder}", principal=principal)
    except Conflict:
        # Set by somebody else a moment ago: theirs stays.
        return False
    return True
