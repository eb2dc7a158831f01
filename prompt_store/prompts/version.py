"""A PromptVersion: an immutable, content-addressed answer to one task revision, and what its digest covers.

The payload is a tagged union by `kind`; which backend serves which kind is the service's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from prompt_store.canonical import canonical_digest
from prompt_store.errors import InvalidArtifact
from prompt_store.prompts.template import Message

VERSION_SCHEMA = "softcue.version/1"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

Vote = Literal["majority", "mean_logprob"]
MAX_MEMBERS = 64
SHUTDOWN_WARNING_DAYS = 60
"""From when on the shutdown of the model behind a version is warned of."""

_FROZEN = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


@dataclass(frozen=True, slots=True)
class BaseDescription:
    """What the store needs to know of a base model: its fingerprint, and the sizes that a soft prompt must fit.

    `kv_heads` and `head_size` are what a prefix must fit besides `layers`; None where they are not known.
    """

    fingerprint: str
    name: str
    hidden_size: int
    layers: int
    context_length: int
    vocabulary_size: int
    architecture: str
    kv_heads: int | None = None
    head_size: int | None = None


class SoftPromptPayload(BaseModel):
    """A learned tensor [P, H]; its bytes stay in the store until `Registry.prompt` asks for them."""

    model_config = _FROZEN

    kind: Literal["soft_prompt"] = "soft_prompt"
    tensor_digest: Digest
    dtype: Literal["F32", "BF16", "F16"]
    shape: tuple[int, int]
    base_fingerprint: str
    placement: Literal["before_all"] = "before_all"


class PrefixPayload(BaseModel):
    """Keys and values of every layer: `tensors` maps `prefix` to the digest of one tensor [L, 2, KV heads, P, D]."""

    model_config = _FROZEN

    kind: Literal["prefix"] = "prefix"
    tensors: dict[str, Digest]
    dtype: Literal["F32", "BF16", "F16"]
    length: int
    base_fingerprint: str
    placement: Literal["before_all"] = "before_all"


class TextPayload(BaseModel):
    """Messages that stand in for the task's own; placeholders are the task's inputs."""

    model_config = _FROZEN

    kind: Literal["text"] = "text"
    messages: tuple[Message, ...] = Field(min_length=1)


class RemoteModelPayload(BaseModel):
    """A fine-tuned model at a provider, by the names that a backend knows both by."""

    model_config = _FROZEN

    kind: Literal["remote_model"] = "remote_model"
    provider: Annotated[str, Field(min_length=1, max_length=64)]
    model: Annotated[str, Field(min_length=1, max_length=256)]


class EnsemblePayload(BaseModel):
    """Soft-prompt versions of one task and base that answer together, by their digests.

    `vote` says how one answer comes of theirs: what most of them say, or what has the highest mean log-probability.
    """

    model_config = _FROZEN

    kind: Literal["ensemble"] = "ensemble"
    members: tuple[Digest, ...] = Field(min_length=2, max_length=MAX_MEMBERS)
    base_fingerprint: str
    vote: Vote = "majority"


Payload = Annotated[
    SoftPromptPayload | PrefixPayload | TextPayload | RemoteModelPayload | EnsemblePayload, Field(discriminator="kind")
]
PAYLOAD: TypeAdapter[Payload] = TypeAdapter(Payload)
PAYLOAD_KINDS: tuple[str, ...] = tuple(kind.model_fields["kind"].default for kind in get_args(get_args(Payload)[0]))


def parse_ensemble(members: Sequence[str], base_fingerprint: str | None, vote: str) -> EnsemblePayload:
    """An ensemble of versions by their digests. Raises InvalidArtifact saying what is wrong with it."""
    try:
        return EnsemblePayload.model_validate(
            {"members": tuple(members), "base_fingerprint": base_fingerprint, "vote": vote}
        )
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise InvalidArtifact(
            f"this is no ensemble: {problem['loc'][0]}: {problem['msg']}; name 2 to {MAX_MEMBERS} soft-prompt versions "
            "of one base, and vote by majority or mean_logprob"
        ) from error


def parse_remote_model(provider: str, model: str) -> RemoteModelPayload:
    """A model at a provider. Raises InvalidArtifact saying what is wrong with it."""
    try:
        return RemoteModelPayload(provider=provider, model=model)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise InvalidArtifact(
            f"this is no remote model: {problem['loc'][0]}: {problem['msg']}; name a provider in 1 to 64 characters "
            "and its model in 1 to 256"
        ) from error


class DatasetUse(BaseModel):
    """A dataset that a version was trained or evaluated on."""

    model_config = _FROZEN

    name: str
    digest: str
    rows: int = Field(ge=0)


class Provenance(BaseModel):
    """Where a version came from; every field may be unknown. Not part of the version's digest."""

    model_config = _FROZEN

    recipe_hash: str | None = None
    datasets: tuple[DatasetUse, ...] = ()
    base_fingerprint: str | None = None
    parent: str | None = None  # digest of the version that this one was initialised from
    code_version: str | None = None
    seed: int | None = None
    run_as: str | None = None  # how the weights were run, such as "float32 on cpu"; recorded, never refused


class PromptVersion(BaseModel):
    """One published version. `digest` names the content; number, notes and the rest are rows beside it.

    `shutdown_date` is the first day without the remote model behind it, where that is announced; it alone may change.
    Its report and recipe stay in the store until `Registry.evidence` asks for them.
    """

    model_config = _FROZEN

    task: str
    number: int
    digest: str
    task_revision: str
    payload: Payload
    provenance: Provenance
    notes: str
    tags: tuple[str, ...]
    created_at: datetime
    principal: str
    author: str | None = None
    shutdown_date: date | None = None

    @property
    def label(self) -> str:
        """The number as people write it: `v7`."""
        return f"v{self.number}"

    @property
    def base_fingerprint(self) -> str | None:
        """The base that the payload is bound to; None for kinds that run anywhere."""
        return payload_base(self.payload)


def payload_base(payload: Payload) -> str | None:
    return None if isinstance(payload, TextPayload | RemoteModelPayload) else payload.base_fingerprint


def payload_tensors(payload: Payload) -> dict[str, str]:
    """The tensors that a payload needs, name to digest."""
    if isinstance(payload, SoftPromptPayload):
        return {"soft_prompt": payload.tensor_digest}
    return dict(payload.tensors) if isinstance(payload, PrefixPayload) else {}


def version_digest(task_revision: str, payload: Payload) -> str:
    """SHA-256 over canonical JSON of schema, kind, task revision, base, placement, tensor digests and other content.

    Every key is always present, null where a kind has nothing to say. A tensor digest covers dtype and shape, so they
    are not repeated; `content` holds what is neither tensor nor binding: messages, a remote id, members and vote.
    """
    content: Any = None
    if isinstance(payload, TextPayload):
        content = [message.model_dump(mode="json") for message in payload.messages]
    elif isinstance(payload, RemoteModelPayload):
        content = {"provider": payload.provider, "model": payload.model}
    elif isinstance(payload, EnsemblePayload):
        content = {"members": list(payload.members), "vote": payload.vote}
    return canonical_digest(
        {
            "schema": VERSION_SCHEMA,
            "kind": payload.kind,
            "task_revision": task_revision,
            "base_fingerprint": payload_base(payload),
            "placement": getattr(payload, "placement", None),
            "tensors": payload_tensors(payload),
            "content": content,
        }
    )
