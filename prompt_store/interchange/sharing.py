"""Sharing versions between stores, by way of a directory or a model repository of the Hugging Face hub.

    README.md                 a model card, made anew at each push from what lies there
    TASK/aliases.json         what the aliases of the stores that pushed pointed at: the last to push a name is believed
    TASK/DIGEST/              one version: see version_folder

A version's folder is written whole or not at all and never changed afterwards, so stores may push to one place at once.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from prompt_store.access import Principal
from prompt_store.errors import (
    Conflict,
    InvalidArtifact,
    InvalidName,
    StoreError,
    UnknownAlias,
    UnknownTask,
    UnknownVersion,
)
from prompt_store.files import write_folder, write_whole
from prompt_store.interchange import hub
from prompt_store.interchange.hub import HubRepository
from prompt_store.interchange.model_card import CARD_FILE, MAX_CARD_BYTES, make_card, may_write_card
from prompt_store.interchange.version_folder import (
    FILE_LIMITS,
    VERSION_FILE,
    SharedVersion,
    VersionFolder,
    make_version_folder,
    read_object,
    read_shared_version,
    read_version_folder,
    refuse_links,
    to_json,
)
from prompt_store.names import (
    AliasSelector,
    DigestSelector,
    NumberSelector,
    check_alias,
    check_task_name,
    parse_selector,
)
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.unreadable import readable
from prompt_store.prompts.version import EnsemblePayload, PromptVersion

ALIASES_FILE = "aliases.json"
MAX_ALIASES_BYTES = 2**20
MAX_VERSIONS = 10_000  # of one task in one place

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LOCK_FILE = ".softcue.lock"
_ATTEMPTS = 5
_MAX_LABELS = 10  # in a commit's message


@dataclass(frozen=True, slots=True)
class Directory:
    path: Path

    def __str__(self) -> str:
        return str(self.path)


Place = Directory | HubRepository


@dataclass(frozen=True, slots=True)
class Pushed:
    """`written` are the versions that were not there yet, `present` those that were, members of ensembles among them.

    `commit` is the address of the commit, None for a directory.
    """

    place: str
    written: tuple[PromptVersion, ...]
    present: tuple[PromptVersion, ...]
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Pulled:
    """A version as it is in this store now, and its label in the store that pushed it.

    `created` is False when it was here already; `alias` is the one that was set on it, None for none.
    """

    version: PromptVersion
    label_there: str
    created: bool
    alias: str | None


def parse_place(text: str) -> Place:
    """A directory's path, or `hf://owner/repo[@revision]`. Raises InvalidName for anything else."""
    if text.startswith(hub.SCHEME):
        return hub.parse_repository(text)
    if not text or "://" in text:
        raise InvalidName(f"{text!r} is no place to share at; give a directory, or hf://owner/repo")
    return Directory(Path(text))


def push(registry: Registry, task: str, selector: str | None, place: Place, *, public: bool = False) -> Pushed:
    """Writes one version of a task, or every one, with the members of ensembles; what is there already stays.

    A repository that is not there is made, for its owner alone unless `public`.
    Raises as `Registry.version`; InvalidArtifact where a version is damaged or the place cannot be written; StoreError
    where the task has no version or the hub refuses.
    """
    versions = _with_members(registry, task, selector)
    with _on_disk(place):
        if isinstance(place, Directory):
            place.path.mkdir(parents=True, exist_ok=True)
            with FileLock(place.path / _LOCK_FILE):
                written, commit = _add(registry, task, versions, place.path), None
        else:
            hub.create_repository(place, public=public)
            written, commit = _commit(registry, task, versions, place)
    present = tuple(version for version in versions if version not in written)
    return Pushed(str(place), tuple(written), present, commit)


def pull(
    registry: Registry,
    place: Place,
    task: str | None = None,
    selector: str | None = None,
    *,
    alias: str | None = None,
    principal: Principal,
    reason: str = "",
) -> list[Pulled]:
    """Publishes what lies at a place: every version, those of a task, or one with the members that it needs.

    `selector` is a digest or its beginning, an alias that the place has, or a label that the version had where it was
    pushed. `alias` is set on that version, and needs a selector. Everything is read and checked before anything is
    stored. Task revisions are stored without becoming current; bases are registered by their description.
    Raises UnknownTask, UnknownVersion, UnknownAlias or InvalidName; InvalidArtifact naming the damaged file;
    SchemaMismatch; StoreError where the hub refuses; and as `Registry.publish`.
    """
    if alias is not None:
        check_alias(alias)
        if selector is None:
            raise InvalidName(f"alias {alias!r} can point at one version only; name the version to pull")
    if task is None and selector is not None:
        raise InvalidName(f"{selector!r} is looked for within a task; name the task too")
    if task is not None:
        check_task_name(task)
    with _on_disk(place):
        if isinstance(place, Directory):
            if not place.path.is_dir():
                raise StoreError(f"there is no folder {place}; give one that `softcue prompts push` wrote")
            folders, named = _choose(place.path, task, selector)
            return _publish(registry, folders, named, alias, principal, reason)
        with tempfile.TemporaryDirectory() as temporary:
            snapshot = hub.read_repository(place, Path(temporary) / place.repository)
            snapshot.fetch(_summary_limit)
            folders, named = _choose(snapshot.root, task, selector)
            snapshot.fetch(_content_limit(folders))
            return _publish(registry, folders, named, alias, principal, reason)


@contextmanager
def _on_disk(place: Place) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidArtifact(
            f"{place}: cannot be used ({error.strerror or error}); check the path, its rights and free disk space"
        ) from error


# Pushing --------------------------------------------------------------------------------------------------------------


def _with_members(registry: Registry, task: str, selector: str | None) -> list[PromptVersion]:
    """The versions to push, oldest first, each once. Raises SchemaMismatch for one that cannot be read."""
    if selector is None:
        named = [readable(version) for version in registry.versions(task)]
    else:
        named = [registry.version(task, selector)]
    if not named:
        raise StoreError(f"task {task!r} has no version yet; publish one before you push it")
    found = {version.digest: version for version in named}
    for version in named:
        if isinstance(version.payload, EnsemblePayload):
            found |= {digest: registry.version(task, digest) for digest in version.payload.members}
    return sorted(found.values(), key=lambda version: version.number)


def _add(registry: Registry, task: str, versions: Sequence[PromptVersion], root: Path) -> list[PromptVersion]:
    """Adds the folders that are not there, then aliases and card; returns the versions that were added."""
    refuse_links(root / task)
    (root / task).mkdir(exist_ok=True)
    bases = {base.fingerprint: base for base in registry.bases()}
    written = []
    for version in versions:
        folder = _folder(root, version)
        refuse_links(folder)
        if not folder.exists():
            write_folder(folder, make_version_folder(registry, version, bases))
            written.append(version)
    there = {folder.name for folder in _version_folders(root, task)}
    aliases = _read_aliases(root, task) | {alias.name: alias.version for alias in registry.aliases(task)}
    aliases = {name: digest for name, digest in sorted(aliases.items()) if digest in there}
    write_whole(root / task / ALIASES_FILE, to_json(aliases))
    if may_write_card(root / CARD_FILE):
        folders = [folder for name in _tasks(root) for folder in _version_folders(root, name)]
        write_whole(root / CARD_FILE, make_card(folders))
    return written


def _commit(
    registry: Registry, task: str, versions: Sequence[PromptVersion], place: HubRepository
) -> tuple[list[PromptVersion], str]:
    """As `_add`, in one commit whose address comes back too; again when somebody else committed meanwhile."""
    for attempt in range(1, _ATTEMPTS + 1):
        with tempfile.TemporaryDirectory() as temporary:
            snapshot = hub.read_repository(place, Path(temporary) / place.repository)
            snapshot.fetch(_summary_limit)
            written = _add(registry, task, versions, snapshot.root)
            names = [CARD_FILE, f"{task}/{ALIASES_FILE}"]
            for version in written:
                names += [f"{task}/{version.digest}/{file.name}" for file in _folder(snapshot.root, version).iterdir()]
            labels = ", ".join(version.label for version in written) or "aliases"
            added = labels if len(written) <= _MAX_LABELS else f"{len(written)} versions"
            try:
                return written, hub.commit(snapshot, names, f"Add {added} of {task}")
            except Conflict:
                if attempt == _ATTEMPTS:
                    raise
    raise AssertionError("the last attempt returns or raises")


def _folder(root: Path, version: PromptVersion) -> Path:
    return root / version.task / version.digest


# Pulling --------------------------------------------------------------------------------------------------------------


def _choose(root: Path, task: str | None, selector: str | None) -> tuple[list[Path], str | None]:
    """The version folders to pull, members before their ensemble, and the digest that `selector` names."""
    tasks = _tasks(root)
    if task is None:
        folders, named = [folder for name in tasks for folder in _version_folders(root, name)], None
        if not folders:
            raise StoreError(f"{root}: holds no version; give a place that `softcue prompts push` wrote")
    elif task not in tasks:
        raise UnknownTask(task, tasks, where=f" in {root}", remedy="push it there first")
    elif selector is None:
        folders, named = _version_folders(root, task), None
    else:
        folder = _select(root, task, selector)
        folders, named = [folder], folder.name
    shared = {folder: read_shared_version(folder) for folder in folders}
    for folder, version in list(shared.items()):
        for member in version.members:
            path = folder.parent / member
            if not path.is_dir():
                raise InvalidArtifact(
                    f"{path}: is not there, but the ensemble {folder.name[:12]} needs it; push the ensemble again"
                )
            shared.setdefault(path, read_shared_version(path))
    return sorted(shared, key=lambda folder: _age(shared[folder])), named


def _age(version: SharedVersion) -> tuple[bool, float, str]:
    return bool(version.members), version.created_at.timestamp(), version.digest


def _select(root: Path, task: str, selector: str) -> Path:
    folders = _version_folders(root, task)
    where = f" of task {task!r} in {root}"
    match parse_selector(selector):
        case DigestSelector(prefix):
            fitting = [folder for folder in folders if folder.name.startswith(prefix)]
        case NumberSelector():
            fitting = [folder for folder in folders if read_shared_version(folder).label == selector]
        case AliasSelector(name):
            aliases = _read_aliases(root, task)
            if name not in aliases:
                raise UnknownAlias(name, aliases, where=where, remedy="name the version by its digest")
            fitting = [folder for folder in folders if folder.name == aliases[name]]
    if not fitting:
        raise UnknownVersion(
            selector, (folder.name[: len(selector)] for folder in folders), where=where, remedy="push it there first"
        )
    if len(fitting) > 1:
        listed = ", ".join(folder.name[:12] for folder in fitting[:5])
        raise InvalidName(f"{selector!r} fits {len(fitting)} versions{where} ({listed}); give more of the digest")
    return fitting[0]


def _publish(
    registry: Registry, folders: Sequence[Path], named: str | None, alias: str | None, principal: Principal, reason: str
) -> list[Pulled]:
    for folder in folders:
        # All are judged before one is stored, and read again for that rather than kept: tensors are large.
        read_version_folder(folder)
    return [
        _publish_one(registry, read_version_folder(folder), alias if folder.name == named else None, principal, reason)
        for folder in folders
    ]


def _publish_one(
    registry: Registry, found: VersionFolder, alias: str | None, principal: Principal, reason: str
) -> Pulled:
    shared = found.version
    if shared.base is not None:
        registry.register_base(shared.base.description(), principal)
    registry.add_task_revision(found.task, principal)
    published = registry.publish(
        NewVersion(
            task=shared.task,
            payload_content=found.content,
            base_fingerprint=shared.base.fingerprint if shared.base is not None else None,
            task_revision=shared.task_revision,
            provenance=shared.provenance,
            report=found.report,
            notes=shared.notes,
            tags=shared.tags,
            recipe=found.recipe,
            author=shared.author,
        ),
        alias,
        reason,
        principal,
    )
    assert published.version.digest == shared.digest, "the digest was recomputed from the same content"
    return Pulled(published.version, shared.label, published.created, alias)


# What lies there ------------------------------------------------------------------------------------------------------


def _tasks(root: Path) -> list[str]:
    """The names of the tasks that have a version there; whatever else lies there is none of ours."""
    return sorted(
        path.name for path in root.iterdir() if _is_task_name(path.name) and _version_folders(root, path.name)
    )


def _is_task_name(name: str) -> bool:
    try:
        check_task_name(name)
    except InvalidName:
        return False
    return True


def _version_folders(root: Path, task: str) -> list[Path]:
    path = root / task
    refuse_links(path)
    if not path.is_dir():
        return []
    folders = sorted(entry for entry in path.iterdir() if _DIGEST.fullmatch(entry.name))
    if len(folders) > MAX_VERSIONS:
        raise InvalidArtifact(f"{path}: holds more than {MAX_VERSIONS} versions; split it up")
    return folders


def _read_aliases(root: Path, task: str) -> dict[str, str]:
    """Alias to digest; empty where no store had any."""
    path = root / task / ALIASES_FILE
    if not path.exists() and not path.is_symlink():
        return {}
    aliases = read_object(path, MAX_ALIASES_BYTES)
    for name, digest in aliases.items():
        check_alias(name)
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise InvalidArtifact(f"{path}: {name!r} points at no digest; remove the file and push the task again")
    return aliases


def _summary_limit(name: str) -> int | None:
    """For the files that say what a repository holds: their largest size in bytes."""
    match name.split("/"):
        case [file] if file == CARD_FILE:
            return MAX_CARD_BYTES
        case [task, file] if _is_task_name(task) and file == ALIASES_FILE:
            return MAX_ALIASES_BYTES
        case [task, digest, file] if _is_task_name(task) and _DIGEST.fullmatch(digest) and file == VERSION_FILE:
            return FILE_LIMITS[file]
    return None


def _content_limit(folders: Iterable[Path]) -> Callable[[str], int | None]:
    """The same for all files of these version folders."""
    chosen = {(folder.parent.name, folder.name) for folder in folders}

    def limit(name: str) -> int | None:
        match name.split("/"):
            case [task, digest, file] if (task, digest) in chosen:
                return FILE_LIMITS.get(file)
        return None

    return limit
