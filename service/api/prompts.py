"""The prompt store over HTTP: `/v1/prompts` with its tasks and versions, and `/v1/bases`. Aliases are beside it.

What was written is read back from the store itself, not from the catalog, and always in a thread: handlers without
`async` run in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from litestar import Controller, Request, Response, delete, get, post
from litestar.concurrency import sync_to_thread
from litestar.datastructures import ResponseHeader
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, HeaderParameter, QueryParameter

from prompt_store.errors import BaseMismatch, InvalidArtifact, UnknownVersion
from prompt_store.prompts.artifact import Artifact, decode_artifact, encode_artifact
from prompt_store.prompts.listing import DEFAULT_PAGE, LARGEST_PAGE
from prompt_store.prompts.publishing import Published
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.version import (
    EnsemblePayload,
    RemoteModelPayload,
    TextPayload,
    parse_ensemble,
    payload_tensors,
)
from service.api.answers import errors, success
from service.api.bodies import JSON, SAFETENSORS, bounded_body, content_type, parse_body
from service.api.callers import principal_of
from service.api.conditions import etag
from service.api.prompt_shapes import (
    BaseBody,
    BaseListBody,
    EnsembleBody,
    PublishBody,
    PublishedBody,
    PublishOperation,
    TaskBody,
    VersionListBody,
    WholeVersionBody,
)
from service.api.queries import require_known_query

PageSize = Annotated[int, QueryParameter(ge=1, le=LARGEST_PAGE)]
ETAG = ResponseHeader(name="etag", description="The version's digest, in quotes", documentation_only=True)
LOCATION = ResponseHeader(name="location", description="Where the version is", documentation_only=True)
IdempotencyKey = Annotated[str | None, HeaderParameter(name="idempotency-key")]


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """How large a body may be that publishes JSON, or a tensor."""

    json_bytes: int
    prompt_bytes: int


@dataclass(frozen=True, slots=True)
class _Stated:
    """What the query says of a tensor beside its file, whose own word counts where the query has none."""

    base: str | None
    alias: str | None
    notes: str | None
    tags: tuple[str, ...]
    author: str | None
    reason: str | None


class PromptController(Controller):
    """Tasks and versions as the store has them."""

    path = "/v1/prompts"
    tags = ("Prompts",)
    before_request = staticmethod(require_known_query)

    @get(sync_to_thread=True, responses=errors(400, 404, 500, 503))
    def list_versions(
        self,
        registry: NamedDependency[Registry],
        task: FromQuery[str | None] = None,
        kind: FromQuery[Literal["soft_prompt", "prefix", "text", "remote_model", "ensemble"] | None] = None,
        base: FromQuery[str | None] = None,
        tag: FromQuery[str | None] = None,
        alias: FromQuery[str | None] = None,
        after: FromQuery[str | None] = None,
        limit: PageSize = DEFAULT_PAGE,
    ) -> VersionListBody:
        """Versions by task, newest first, that every given filter lets through; `base` is a name or fingerprint."""
        page = registry.page(task=task, kind=kind, base=base, tag=tag, alias=alias, after=after, limit=limit)
        return VersionListBody.of(page)

    @get("/{task:str}", sync_to_thread=True, responses=errors(400, 404, 500, 503))
    def show_task(self, task: FromPath[str], registry: NamedDependency[Registry]) -> TaskBody:
        """A task's current revision, its aliases and how many versions it has."""
        return TaskBody.of(registry.task(task), registry.aliases(task), registry.version_counts(task))

    @get("/{task:str}/versions", sync_to_thread=True, responses=errors(400, 404, 500, 503))
    def list_versions_of_task(
        self,
        task: FromPath[str],
        registry: NamedDependency[Registry],
        after: FromQuery[str | None] = None,
        limit: PageSize = DEFAULT_PAGE,
    ) -> VersionListBody:
        """A task's versions, newest first."""
        return VersionListBody.of(registry.page(task=task, after=after, limit=limit))

    @post(
        "/{task:str}/versions",
        operation_class=PublishOperation,
        # The body's kind decides how large it may be, so the handler reads it itself.
        request_max_body_size=None,
        opt={"content_types": (JSON, *SAFETENSORS)},
        response_headers=[ETAG, LOCATION],
        responses=success(200, PublishedBody) | errors(400, 404, 409, 413, 415, 422, 500, 503),
    )
    async def publish(
        self,
        request: Request[Any, Any, Any],
        task: FromPath[str],
        registry: NamedDependency[Registry],
        limits: NamedDependency[BodyLimits],
        base: FromQuery[str | None] = None,
        alias: FromQuery[str | None] = None,
        notes: FromQuery[str | None] = None,
        tag: FromQuery[list[str] | None] = None,
        author: FromQuery[str | None] = None,
        reason: FromQuery[str | None] = None,
        idempotency_key: IdempotencyKey = None,
    ) -> Response[PublishedBody]:
        """Publish a version: a tensor as safetensors, its facts in the query and the file, or anything else as JSON.

        201 for a new version. 200 where the store had the same content: the alias moves, all else stays as it was.
        """
        stated = _Stated(base, alias, notes, tuple(tag or ()), author, reason)
        if content_type(request) == JSON:
            if stated != _Stated(None, None, None, (), None, None):
                raise InvalidArtifact("a version in JSON says everything in its body; leave the query out")
            body = parse_body(PublishBody, await bounded_body(request, limits.json_bytes, "server.max_body_bytes"))
            new = await sync_to_thread(_from_json, registry, task, body)
            alias, reason = body.alias, body.reason
        else:
            data = await bounded_body(request, limits.prompt_bytes, "server.max_prompt_bytes")
            new = await sync_to_thread(_from_file, registry, task, data, stated)
        published: Published = await sync_to_thread(
            registry.publish, new, alias, reason or "", principal_of(request), idempotency_key=idempotency_key
        )
        version = published.version
        return Response(
            PublishedBody.of(version, created=published.created),
            status_code=201 if published.created else 200,
            headers={"etag": etag(version.digest), "location": f"/v1/prompts/{task}/versions/{version.label}"},
        )

    @get(
        "/{task:str}/versions/{selector:str}",
        sync_to_thread=True,
        response_headers=[ETAG],
        responses=errors(400, 404, 500, 503),
    )
    def show_version(
        self, task: FromPath[str], selector: FromPath[str], registry: NamedDependency[Registry]
    ) -> Response[WholeVersionBody]:
        """A version by number, digest or alias, with its provenance, report and recipe."""
        version = registry.version(task, selector)
        evidence = registry.evidence(version.digest)
        body = WholeVersionBody.of(
            version, provenance=version.provenance, report=evidence.report, recipe=evidence.recipe
        )
        return Response(body, headers={"etag": etag(version.digest)})

    @get(
        "/{task:str}/versions/{selector:str}/tensor",
        sync_to_thread=True,
        media_type=SAFETENSORS[0],
        response_headers=[ETAG],
        responses=errors(400, 404, 500, 503),
    )
    def download(
        self, task: FromPath[str], selector: FromPath[str], registry: NamedDependency[Registry]
    ) -> Response[bytes]:
        """The soft prompt or prefix as a safetensors file, as a publish takes it."""
        version = registry.version(task, selector)
        if not payload_tensors(version.payload):
            raise UnknownVersion(
                version.label,
                where=f" with a tensor in task {task!r}",
                remedy=f"it is of kind {version.payload.kind}, all of it is in /v1/prompts/{task}/versions/{selector}",
            )
        prompt = registry.prompt(version.digest)
        artifact = Artifact(prompt, task, version.base_fingerprint, version.provenance, version.notes)
        headers = {
            "etag": etag(version.digest),
            "content-disposition": f'attachment; filename="{task}-{version.label}.safetensors"',
        }
        return Response(encode_artifact(artifact), media_type=SAFETENSORS[0], headers=headers)

    @delete("/{task:str}/versions/{selector:str}", sync_to_thread=True, responses=errors(400, 404, 409, 500, 503))
    def delete_version(
        self,
        request: Request[Any, Any, Any],
        task: FromPath[str],
        selector: FromPath[str],
        registry: NamedDependency[Registry],
        reason: FromQuery[str] = "",
    ) -> None:
        """Delete a version that nothing needs; 409 names what does."""
        registry.delete_version(task, selector, reason=reason, principal=principal_of(request))


@get(
    "/v1/bases",
    sync_to_thread=True,
    tags=["Prompts"],
    before_request=require_known_query,
    responses=errors(400, 500, 503),
)
def list_bases(registry: NamedDependency[Registry]) -> BaseListBody:
    """The base models that the store has seen, and which tasks have no version for each."""
    return BaseListBody(data=[BaseBody.of(carried) for carried in registry.carried_by_bases()])


def _from_file(registry: Registry, task: str, data: bytes, stated: _Stated) -> NewVersion:
    artifact = decode_artifact(data, "the body")
    if artifact.task is not None and artifact.task != task:
        raise InvalidArtifact(f"the body was made for task {artifact.task!r}, not {task!r}; publish it for its own")
    fingerprint = artifact.base_fingerprint
    if stated.base is not None:
        base = registry.find_base(stated.base)
        if fingerprint is not None and fingerprint != base.fingerprint:
            raise BaseMismatch(
                f"the body was made for base {fingerprint[:12]}, not {base.name!r} ({base.fingerprint[:12]}); leave "
                "base out, or retrain it on that base"
            )
        fingerprint = base.fingerprint
    return NewVersion(
        task=task,
        payload_content=artifact.prompt,
        base_fingerprint=fingerprint,
        provenance=artifact.provenance,
        notes=artifact.notes if stated.notes is None else stated.notes,
        tags=stated.tags,
        author=stated.author,
    )


def _from_json(registry: Registry, task: str, body: PublishBody) -> NewVersion:
    content: TextPayload | RemoteModelPayload | EnsemblePayload
    if isinstance(body.payload, EnsembleBody):
        if body.base is not None:
            raise InvalidArtifact("an ensemble brings its members' base; leave base out")
        members = [registry.version(task, selector) for selector in body.payload.members]
        digests = [member.digest for member in members]
        content = parse_ensemble(digests, members[0].base_fingerprint, body.payload.vote)
    else:
        content = body.payload
    return NewVersion(
        task=task,
        payload_content=content,
        base_fingerprint=registry.find_base(body.base).fingerprint if body.base is not None else None,
        provenance=body.provenance,
        report=body.report,
        notes=body.notes,
        tags=tuple(body.tags),
        recipe=body.recipe,
        author=body.author,
    )
