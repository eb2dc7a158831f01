"""The bodies of `/v1/prompts` in both directions, as pydantic models."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema
from pydantic import BaseModel, ConfigDict, Field

from prompt_store.prompts.registry import (
    Alias,
    AliasMove,
    CarriedBase,
    ListedVersion,
    MovePage,
    TaskRevision,
    VersionPage,
)
from prompt_store.prompts.task import Task
from prompt_store.prompts.unreadable import UnreadableVersion
from prompt_store.prompts.version import (
    MAX_MEMBERS,
    Payload,
    PromptVersion,
    Provenance,
    RemoteModelPayload,
    TextPayload,
    Vote,
)
from service.api.bodies import JSON, SAFETENSORS


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


# What is sent ---------------------------------------------------------------------------------------------------------


class EnsembleBody(_Body):
    """Soft-prompt versions of the task that answer together: numbers, digests or aliases, kept by their digests."""

    kind: Literal["ensemble"]
    members: list[str] = Field(min_length=2, max_length=MAX_MEMBERS)
    vote: Vote = "majority"


class PublishBody(_Body):
    """A version without a tensor. `base` is the base that a text prompt was judged on; `reason` is for the history."""

    payload: Annotated[TextPayload | RemoteModelPayload | EnsembleBody, Field(discriminator="kind")]
    base: str | None = None
    alias: str | None = None
    notes: str = ""
    tags: list[str] = []
    author: str | None = None
    reason: str = ""
    provenance: Provenance = Provenance()
    report: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = None


class MoveBody(_Body):
    """`version` is a number, digest or alias."""

    version: str
    reason: str = ""


class RollbackBody(_Body):
    reason: str = ""


@dataclass
class PublishOperation(Operation):
    """Describes the two kinds of body that a publish takes, which no single annotation can."""

    def __post_init__(self) -> None:
        content = {kind: OpenAPIMediaType(Schema(type="string", format="binary")) for kind in SAFETENSORS}  # type: ignore[arg-type]
        content[JSON] = OpenAPIMediaType(_inlined(PublishBody))  # type: ignore[arg-type]
        self.request_body = RequestBody(content, required=True)


def _inlined(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON schema without references: Litestar collects the components that it finds by itself alone."""
    document = model.model_json_schema()
    definitions = document.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(definitions[value["$ref"].rpartition("/")[2]])
            # A discriminator's mapping points at the definitions, and says nothing that the kinds' constants do not.
            return {key: resolve(inner) for key, inner in value.items() if key != "discriminator"}
        return [resolve(inner) for inner in value] if isinstance(value, list) else value

    return resolve(document)  # type: ignore[no-any-return]


# What is answered -----------------------------------------------------------------------------------------------------


class VersionBody(BaseModel):
    """What a version is. `version` is its number as people write it, `principal` who published it."""

    object: Literal["prompt.version"] = "prompt.version"
    task: str
    version: str
    number: int
    digest: str
    kind: str
    base_fingerprint: str | None
    task_revision: str
    payload: Payload
    tags: list[str]
    notes: str
    author: str | None
    principal: str
    created_at: datetime

    @classmethod
    def of(cls, version: PromptVersion, **more: Any) -> Self:
        return cls(
            task=version.task,
            version=version.label,
            number=version.number,
            digest=version.digest,
            kind=version.payload.kind,
            base_fingerprint=version.base_fingerprint,
            task_revision=version.task_revision,
            payload=version.payload,
            tags=list(version.tags),
            notes=version.notes,
            author=version.author,
            principal=version.principal,
            created_at=version.created_at,
            **more,
        )


class ListedVersionBody(VersionBody):
    """`aliases` are those that point at it now."""

    aliases: list[str]


class UnreadableVersionBody(BaseModel):
    """A version that another release wrote, or that is damaged: what can be read of it, and why no more can."""

    object: Literal["prompt.unreadable_version"] = "prompt.unreadable_version"
    task: str
    version: str
    number: int
    digest: str
    kind: str
    created_at: datetime
    aliases: list[str]
    unreadable: str


class WholeVersionBody(VersionBody):
    """With where it came from and how it was judged."""

    provenance: Provenance
    report: dict[str, Any] | None
    recipe: dict[str, Any] | None


class PublishedBody(VersionBody):
    """`created` is false where the same content was there already; it is then the first one, unchanged."""

    created: bool


class VersionListBody(BaseModel):
    """A page of versions; `after` asks for the next one."""

    object: Literal["list"] = "list"
    data: list[ListedVersionBody | UnreadableVersionBody]
    has_more: bool
    after: str | None

    @classmethod
    def of(cls, page: VersionPage) -> Self:
        return cls(data=[_listed(entry) for entry in page.entries], has_more=page.after is not None, after=page.after)


def _listed(entry: ListedVersion) -> ListedVersionBody | UnreadableVersionBody:
    version, aliases = entry.version, list(entry.aliases)
    if not isinstance(version, UnreadableVersion):
        return ListedVersionBody.of(version, aliases=aliases)
    return UnreadableVersionBody(
        task=version.task,
        version=version.label,
        number=version.number,
        digest=version.digest,
        kind=version.kind,
        created_at=version.created_at,
        aliases=aliases,
        unreadable=version.reason,
    )


class AliasBody(BaseModel):
    """Where an alias points, and who moved it there."""

    object: Literal["prompt.alias"] = "prompt.alias"
    task: str
    alias: str
    version: str
    digest: str
    moved_at: datetime
    principal: str

    @classmethod
    def of(cls, alias: Alias) -> Self:
        return cls(
            task=alias.task,
            alias=alias.name,
            version=f"v{alias.number}",
            digest=alias.version,
            moved_at=alias.moved_at,
            principal=alias.principal,
        )


class AliasListBody(BaseModel):
    """Every alias of a task, by name."""

    object: Literal["list"] = "list"
    data: list[AliasBody]


class AliasMoveBody(BaseModel):
    """A move from one digest to another; null is nowhere. `undoes` is the sequence of a move that was taken back."""

    object: Literal["prompt.alias_move"] = "prompt.alias_move"
    sequence: int
    task: str
    alias: str
    previous: str | None
    target: str | None
    reason: str
    undoes: int | None
    at: datetime
    principal: str

    @classmethod
    def of(cls, move: AliasMove) -> Self:
        return cls(**{name: getattr(move, name) for name in cls.model_fields if name != "object"})


class AliasMoveListBody(BaseModel):
    """A page of moves, newest first; `after` asks for older ones."""

    object: Literal["list"] = "list"
    data: list[AliasMoveBody]
    has_more: bool
    after: str | None

    @classmethod
    def of(cls, page: MovePage) -> Self:
        moves = [AliasMoveBody.of(move) for move in page.moves]
        return cls(data=moves, has_more=page.after is not None, after=page.after)


class TaskBody(BaseModel):
    """A task's current revision, its aliases, and how many versions of each kind it has."""

    object: Literal["prompt.task"] = "prompt.task"
    name: str
    task: Task
    revision: int
    revision_digest: str
    revised_at: datetime
    principal: str
    aliases: list[AliasBody]
    versions: dict[str, int]

    @classmethod
    def of(cls, revision: TaskRevision, aliases: list[Alias], versions: dict[str, int]) -> Self:
        return cls(
            name=revision.task.name,
            task=revision.task,
            revision=revision.number,
            revision_digest=revision.digest,
            revised_at=revision.created_at,
            principal=revision.principal,
            aliases=[AliasBody.of(alias) for alias in aliases],
            versions=versions,
        )


class BaseBody(BaseModel):
    """A base model by its fingerprint, how many versions are bound to it, and the tasks without one that is."""

    object: Literal["base"] = "base"
    fingerprint: str
    name: str
    hidden_size: int
    layers: int
    context_length: int
    vocabulary_size: int
    architecture: str
    kv_heads: int | None
    head_size: int | None
    versions: int
    tasks_without: list[str]

    @classmethod
    def of(cls, carried: CarriedBase) -> Self:
        own = ("object", "versions", "tasks_without")
        facts = {name: getattr(carried.base, name) for name in cls.model_fields if name not in own}
        return cls(**facts, versions=carried.count, tasks_without=list(carried.missing))


class BaseListBody(BaseModel):
    """Every base model, in the order in which they were registered."""

    object: Literal["list"] = "list"
    data: list[BaseBody]
