"""A version as a folder that stands by itself: what another store needs to publish it there, and the checks on it.

    version.json         which version it is, and what is known about it
    task.json            the task revision that it answers, keys in their author's order
    prompt.safetensors   its tensor, for a soft prompt or prefix
    report.json recipe.json   where there are any

The folder bears the version's digest as its name, in a folder with its task's name; both are recomputed from what lies
inside. What no version's digest covers (report, recipe, provenance, tags, notes, author) is held against accidents
only: version.json has a hash of each file beside it, and whoever can write the folder can write that too.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prompt_store.canonical import canonical_json
from prompt_store.errors import InvalidArtifact, InvalidTask, SchemaMismatch
from prompt_store.files import read_bounded
from prompt_store.prompts.artifact import MAX_REPORT_BYTES, Artifact, decode_artifact, encode_artifact
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.soft_prompt import MAX_FILE_BYTES, MAX_HEADER_BYTES, SoftPrompt
from prompt_store.prompts.task import Task, parse_task
from prompt_store.prompts.tensor_file import without_repeats
from prompt_store.prompts.version import (
    BaseDescription,
    Digest,
    EnsemblePayload,
    Payload,
    PrefixPayload,
    PromptVersion,
    Provenance,
    RemoteModelPayload,
    SoftPromptPayload,
    TextPayload,
    payload_base,
    payload_tensors,
    version_digest,
)

SHARED_SCHEMA = "softcue.shared/1"

VERSION_FILE = "version.json"
TASK_FILE = "task.json"
PROMPT_FILE = "prompt.safetensors"
REPORT_FILE = "report.json"
RECIPE_FILE = "recipe.json"

# The largest that each file may be, in bytes.
FILE_LIMITS = {
    VERSION_FILE: 4 * 2**20,
    TASK_FILE: 4 * 2**20,
    PROMPT_FILE: MAX_FILE_BYTES + MAX_HEADER_BYTES,
    REPORT_FILE: MAX_REPORT_BYTES,
    RECIPE_FILE: 4 * 2**20,
}

Content = SoftPrompt | Prefix | TextPayload | RemoteModelPayload | EnsemblePayload

_FROZEN = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
_REMEDY = "remove the folder and push the version again"

# PostgreSQL's text cannot hold a NUL.
_Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
_Size = Annotated[int, Field(ge=1, lt=2**31)]


class SharedBase(BaseModel):
    """A `BaseDescription` as JSON: all that a store needs to know of a base it never loaded."""

    model_config = _FROZEN

    fingerprint: Annotated[_Text, Field(min_length=1, max_length=128)]
    name: Annotated[_Text, Field(min_length=1)]
    hidden_size: _Size
    layers: _Size
    context_length: _Size
    vocabulary_size: _Size
    architecture: _Text
    kv_heads: _Size | None = None
    head_size: _Size | None = None

    def description(self) -> BaseDescription:
        return BaseDescription(**self.model_dump())


class SharedVersion(BaseModel):
    """What version.json says. `label` is the version's number in the store that pushed it, `author` who made it.

    `files` are the names of the files beside it, each with the SHA-256 of its bytes.
    """

    model_config = _FROZEN

    schema_: Literal["softcue.shared/1"] = Field("softcue.shared/1", alias="schema")
    task: str
    kind: str
    digest: Digest
    task_revision: Digest
    payload: Payload
    provenance: Provenance
    tags: tuple[_Text, ...]
    notes: _Text
    author: _Text
    created_at: datetime
    label: Annotated[str, Field(pattern=r"^v[1-9][0-9]{0,8}$")]
    base: SharedBase | None
    files: dict[Literal["task.json", "prompt.safetensors", "report.json", "recipe.json"], Digest]

    @property
    def members(self) -> tuple[str, ...]:
        """The digests of the versions that it cannot do without."""
        return self.payload.members if isinstance(self.payload, EnsemblePayload) else ()


@dataclass(frozen=True)
class VersionFolder:
    """A version folder that was found whole. `content` is the tensor, or the payload of a kind that has none."""

    version: SharedVersion
    task: Task
    content: Content
    report: dict[str, Any] | None
    recipe: dict[str, Any] | None


def make_version_folder(
    registry: Registry, version: PromptVersion, bases: Mapping[str, BaseDescription]
) -> dict[str, bytes]:
    """The files of a version's folder, by name; `bases` are the store's by fingerprint.

    Raises InvalidArtifact for a version that is damaged in the store.
    """
    evidence = registry.evidence(version.digest)
    files = {TASK_FILE: to_json(registry.task_revision(version.task_revision).task.document())}
    if isinstance(version.payload, SoftPromptPayload | PrefixPayload):
        prompt = registry.prompt(version.digest)
        files[PROMPT_FILE] = encode_artifact(
            Artifact(prompt, version.task, version.base_fingerprint, version.provenance, version.notes)
        )
    for name, document in ((REPORT_FILE, evidence.report), (RECIPE_FILE, evidence.recipe)):
        if document is not None:
            files[name] = to_json(document)
    base = bases[version.base_fingerprint] if version.base_fingerprint is not None else None
    try:
        shared = SharedVersion(
            task=version.task,
            kind=version.payload.kind,
            digest=version.digest,
            task_revision=version.task_revision,
            payload=version.payload,
            provenance=version.provenance,
            tags=version.tags,
            notes=version.notes,
            author=version.author or version.principal,
            created_at=version.created_at,
            label=version.label,
            base=SharedBase(**asdict(base)) if base is not None else None,
            files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        )
    except ValidationError as error:
        raise InvalidArtifact(
            f"version {version.label} of task {version.task!r} cannot be shared: {_first_problem(error)}; publish it "
            "again without that"
        ) from error
    return {VERSION_FILE: to_json(shared.model_dump(mode="json", by_alias=True)), **files}


def read_shared_version(folder: Path) -> SharedVersion:
    """What a version folder's version.json says, held against the folder's name and nothing else in it.

    Raises InvalidArtifact naming the file and what is wrong with it, or SchemaMismatch.
    """
    refuse_links(folder.parent, folder)
    path = folder / VERSION_FILE
    document = read_object(path, FILE_LIMITS[VERSION_FILE])
    schema = document.get("schema")
    if schema != SHARED_SCHEMA:
        raise SchemaMismatch(
            f"{path}: has schema {str(schema)[:80]!r} and this release reads {SHARED_SCHEMA!r}; upgrade Softcue, or "
            "push the version again with this release"
        )
    try:
        shared = SharedVersion.model_validate(document)
    except ValidationError as error:
        raise InvalidArtifact(f"{path}: {_first_problem(error)}; {_REMEDY}") from error
    if (shared.digest, shared.task) != (folder.name, folder.parent.name):
        raise InvalidArtifact(
            f"{path}: is of version {shared.digest[:12]} of task {shared.task[:80]!r}, which is not where it lies; "
            f"{_REMEDY}"
        )
    return shared


def read_version_folder(folder: Path) -> VersionFolder:
    """Reads and checks all of a version folder. Raises as `read_shared_version`, naming the file."""
    shared = read_shared_version(folder)
    found: dict[str, bytes] = {name: read_file(folder / name, FILE_LIMITS[name]) for name in shared.files}
    for name, digest in shared.files.items():
        if hashlib.sha256(found[name]).hexdigest() != digest:
            raise InvalidArtifact(f"{folder / name}: is not what {VERSION_FILE} says was pushed; {_REMEDY}")
    if TASK_FILE not in found:
        raise InvalidArtifact(f"{folder / VERSION_FILE}: names no {TASK_FILE}; {_REMEDY}")
    try:
        task = parse_task(_object(found[TASK_FILE], folder / TASK_FILE), source=str(folder / TASK_FILE))
    except InvalidTask as error:
        raise InvalidArtifact(f"{error}; {_REMEDY}") from error
    if (task.name, task.digest) != (shared.task, shared.task_revision):
        raise InvalidArtifact(f"{folder / TASK_FILE}: is not the revision that the version answers; {_REMEDY}")
    _check_payload(shared, folder)
    return VersionFolder(
        version=shared,
        task=task,
        content=_read_content(shared, found.get(PROMPT_FILE), folder),
        report=_object(found[REPORT_FILE], folder / REPORT_FILE) if REPORT_FILE in found else None,
        recipe=_object(found[RECIPE_FILE], folder / RECIPE_FILE) if RECIPE_FILE in found else None,
    )


def read_object(path: Path, limit_bytes: int) -> dict[str, Any]:
    """A JSON object. Raises InvalidArtifact naming the file."""
    return _object(read_file(path, limit_bytes), path)


def read_file(path: Path, limit_bytes: int) -> bytes:
    """As `read_bounded`, of a file that is no link: a shared folder must not lead to what lies outside of it."""
    refuse_links(path)
    return read_bounded(path, limit_bytes)


def refuse_links(*paths: Path) -> None:
    """Raises InvalidArtifact naming the first path that is a symbolic link."""
    for path in paths:
        if path.is_symlink():
            raise InvalidArtifact(f"{path}: is a link; put what it leads to in its place")


def _check_payload(shared: SharedVersion, folder: Path) -> None:
    path = folder / VERSION_FILE
    payload = shared.payload
    if shared.kind != payload.kind:
        raise InvalidArtifact(f"{path}: says both {shared.kind[:80]!r} and {payload.kind!r} of its kind; {_REMEDY}")
    if isinstance(payload, EnsemblePayload) and payload.members != tuple(sorted(set(payload.members))):
        # A store sorts them, so it would give the version another digest.
        raise InvalidArtifact(f"{path}: its members are not in order, each once; {_REMEDY}")
    if version_digest(shared.task_revision, payload) != shared.digest:
        raise InvalidArtifact(f"{path}: its content does not have the digest {shared.digest[:12]}; {_REMEDY}")
    if payload_base(payload) != (shared.base.fingerprint if shared.base is not None else None):
        raise InvalidArtifact(f"{path}: does not describe the base that its payload is bound to; {_REMEDY}")


def _read_content(shared: SharedVersion, data: bytes | None, folder: Path) -> Content:
    payload, path = shared.payload, folder / PROMPT_FILE
    if not isinstance(payload, SoftPromptPayload | PrefixPayload):
        if data is not None:
            raise InvalidArtifact(f"{path}: a {payload.kind} version has no tensor; {_REMEDY}")
        return payload
    if data is None:
        raise InvalidArtifact(f"{folder / VERSION_FILE}: names no {PROMPT_FILE}; {_REMEDY}")
    artifact = decode_artifact(data, str(path))
    prompt = artifact.prompt
    if isinstance(payload, SoftPromptPayload):
        fits = isinstance(prompt, SoftPrompt) and prompt.shape == payload.shape
    else:
        fits = isinstance(prompt, Prefix) and prompt.length == payload.length
    if not fits or prompt.dtype != payload.dtype or [prompt.digest] != list(payload_tensors(payload).values()):
        raise InvalidArtifact(f"{path}: is not the tensor that {VERSION_FILE} describes; {_REMEDY}")
    if artifact.task not in (None, shared.task) or artifact.base_fingerprint not in (None, payload.base_fingerprint):
        raise InvalidArtifact(f"{path}: was made for another task or base than {VERSION_FILE} says; {_REMEDY}")
    return prompt


def _object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(data, object_pairs_hook=without_repeats)
        canonical_json(document)  # no NaN, infinity or broken text, which a store would refuse in the midst of a pull
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(f"{path}: is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(document, dict):
        raise InvalidArtifact(f"{path}: holds no JSON object; {_REMEDY}")
    return document


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(step) for step in problem["loc"]) or "its top"
    return f"{place}: {problem['msg']}"


def to_json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=2).encode() + b"\n"
