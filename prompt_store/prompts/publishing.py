"""Publishing a version: every check first, then one transaction that writes all of it or nothing."""

import json
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, assert_never

from sqlalchemy import Connection, insert, select, update

from prompt_store.access import Principal
from prompt_store.canonical import canonical_json
from prompt_store.changes import record
from prompt_store.errors import BaseMismatch, InvalidArtifact, UnknownBase
from prompt_store.names import check_alias, check_texts
from prompt_store.prompts.aliases import set_alias
from prompt_store.prompts.bases import read_bases
from prompt_store.prompts.lookup import find_version, read_version
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.revisions import TaskRevision, current_revision, read_revision
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.template import template_fields
from prompt_store.prompts.tensor_file import Tensor
from prompt_store.prompts.version import (
    BaseDescription,
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
from prompt_store.tables import tasks, tensors, version_tensors, versions


@dataclass(frozen=True)
class NewVersion:
    """What is to be published. `task_revision` is the digest of the revision it answers, by default the current one.

    A soft prompt or prefix needs `base_fingerprint`; a text prompt may name the base it was judged on. An ensemble
    answers the revision that its members answer, and brings their base. `recipe` is the document that `provenance`
    hashes; `author` is who made it, where that is not who publishes it; `shutdown_date` is the first day without the
    remote model.
    """

    task: str
    payload_content: SoftPrompt | Prefix | TextPayload | RemoteModelPayload | EnsemblePayload
    base_fingerprint: str | None = None
    task_revision: str | None = None
    provenance: Provenance = field(default_factory=Provenance)
    report: dict[str, Any] | None = None
    notes: str = ""
    tags: tuple[str, ...] = ()
    recipe: dict[str, Any] | None = None
    author: str | None = None
    shutdown_date: date | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """`created` is False when the same content was there already; `version` is then the first one, unchanged."""

    version: PromptVersion
    created: bool


@dataclass(frozen=True)
class Prepared:
    """A checked version, ready to be written: nothing about it can fail for the publisher's fault any more."""

    digest: str
    task_revision: TaskRevision
    payload: Payload
    tensors: dict[str, Tensor]
    columns: dict[str, Any]


def prepare(connection: Connection, new: NewVersion, alias: str | None) -> Prepared:
    """Every check, within a reading transaction.

    Raises UnknownTask, UnknownBase, BaseMismatch, InvalidArtifact or InvalidName.
    """
    if alias is not None:
        check_alias(alias)
    check_texts("notes", new.notes)
    check_texts("author", new.author)
    check_texts("tags", new.tags)
    check_texts("provenance", new.provenance.model_dump())
    if isinstance(new.payload_content, TextPayload | RemoteModelPayload):
        check_texts("payload", new.payload_content.model_dump())
    revision = current_revision(connection, new.task)
    if new.task_revision is not None and new.task_revision != revision.digest:
        revision = read_revision(connection, new.task_revision)
        if revision.task.name != new.task:
            raise InvalidArtifact(
                f"revision {revision.digest[:12]} belongs to task {revision.task.name!r}, not {new.task!r}; "
                "publish for the task it was made for"
            )
    base = _find_base(connection, new.base_fingerprint) if new.base_fingerprint is not None else None
    provenance = new.provenance
    content = new.payload_content
    needed: dict[str, Tensor] = {}
    if isinstance(content, SoftPrompt):
        payload: Payload = _check_soft_prompt(content, base)
        needed = {"soft_prompt": content}
    elif isinstance(content, Prefix):
        payload = _check_prefix(content, base)
        needed = {"prefix": content}
    elif isinstance(content, TextPayload):
        _check_text(content, revision)
        payload = content
        if base is not None and provenance.base_fingerprint is None:
            provenance = provenance.model_copy(update={"base_fingerprint": base.fingerprint})
    elif isinstance(content, EnsemblePayload):
        revision = _ensemble_revision(connection, content, new)
        payload = _in_order(content)
    elif isinstance(content, RemoteModelPayload):
        payload = content
    else:
        assert_never(content)
    if new.shutdown_date is not None:
        _check_shutdown(payload)
    return Prepared(
        digest=version_digest(revision.digest, payload),
        task_revision=revision,
        payload=payload,
        tensors=needed,
        columns={
            "provenance": provenance.model_dump_json(),
            "report": _text_of("report", new.report) if new.report is not None else None,
            "notes": new.notes,
            "tags": json.dumps(list(dict.fromkeys(new.tags)), ensure_ascii=False),
            "recipe": _text_of("recipe", new.recipe) if new.recipe is not None else None,
            "author": new.author,
            "shutdown_date": new.shutdown_date,
        },
    )


def write(
    connection: Connection, prepared: Prepared, alias: str | None, reason: str, principal: Principal, at: datetime
) -> Published:
    """Version row, tensors, audit entry, change and alias, within the caller's writing transaction.

    Of a version that is there already, tensors that were damaged since are put right.
    """
    task = prepared.task_revision.task.name
    known = connection.execute(select(versions.c.digest).where(versions.c.digest == prepared.digest)).one_or_none()
    if known is None:
        if isinstance(prepared.payload, EnsemblePayload):
            # A member may have been deleted since it was checked.
            for member in prepared.payload.members:
                read_version(connection, member)
        connection.execute(update(tasks).where(tasks.c.name == task).values(last_version=tasks.c.last_version + 1))
        number = connection.execute(select(tasks.c.last_version).where(tasks.c.name == task)).scalar_one()
        connection.execute(
            insert(versions).values(
                digest=prepared.digest,
                task=task,
                number=number,
                task_revision=prepared.task_revision.digest,
                kind=prepared.payload.kind,
                base_fingerprint=payload_base(prepared.payload),
                payload=prepared.payload.model_dump_json(),
                created_at=at,
                principal=principal.name,
                **prepared.columns,
            )
        )
        for name, digest in payload_tensors(prepared.payload).items():
            _write_tensor(connection, prepared.tensors[name], digest)
            connection.execute(insert(version_tensors).values(version=prepared.digest, name=name, tensor=digest))
        record(
            connection,
            "version",
            action="version.publish",
            task=task,
            subject=prepared.digest,
            principal=principal,
            at=at,
            reason=reason,
            details={"number": number, "kind": prepared.payload.kind},
        )
    elif sum(_write_tensor(connection, tensor, tensor.digest) for tensor in prepared.tensors.values()):
        record(
            connection,
            "version",
            action="version.repair",
            task=task,
            subject=prepared.digest,
            principal=principal,
            at=at,
            reason=reason,
        )
    if alias is not None:
        set_alias(connection, task, alias, prepared.digest, reason=reason, principal=principal, at=at)
    return Published(read_version(connection, prepared.digest), created=known is None)


def note_shutdown(
    connection: Connection, task: str, selector: str, day: date | None, principal: Principal, at: datetime
) -> PromptVersion:
    """Writes down from which day on the model behind a version is gone, None to take that back.

    Raises as `find_version`, and InvalidArtifact for a version that no remote model is behind, unless it has that date
    already.
    """
    version = find_version(connection, task, selector)
    if day == version.shutdown_date:
        return version
    _check_shutdown(version.payload)
    connection.execute(update(versions).where(versions.c.digest == version.digest).values(shutdown_date=day))
    record(
        connection,
        "version",
        action="version.note_shutdown",
        task=task,
        subject=version.digest,
        principal=principal,
        at=at,
        details={"number": version.number, "shutdown_date": day.isoformat() if day is not None else None},
    )
    return read_version(connection, version.digest)


def _check_shutdown(payload: Payload) -> None:
    """Raises InvalidArtifact for what no provider can shut down."""
    if not isinstance(payload, RemoteModelPayload):
        raise InvalidArtifact(
            f"a {payload.kind} payload has no provider that could shut it down; leave the shutdown date out"
        )


def _find_base(connection: Connection, fingerprint: str) -> BaseDescription:
    known = read_bases(connection)
    for base in known:
        if base.fingerprint == fingerprint:
            return base
    raise UnknownBase(fingerprint, [base.fingerprint for base in known])


def _check_soft_prompt(prompt: SoftPrompt, base: BaseDescription | None) -> SoftPromptPayload:
    prompt.check()
    base = _check_room("soft prompt", prompt.length, base)
    if prompt.hidden_size != base.hidden_size:
        raise BaseMismatch(
            f"soft prompt has H={prompt.hidden_size} but base {base.name!r} has H={base.hidden_size}; "
            "retrain it on this base or publish it for another"
        )
    return SoftPromptPayload(
        tensor_digest=prompt.digest,
        dtype=prompt.dtype,
        shape=prompt.shape,
        base_fingerprint=base.fingerprint,
    )


def _check_prefix(prefix: Prefix, base: BaseDescription | None) -> PrefixPayload:
    prefix.check()
    base = _check_room("prefix", prefix.length, base)
    layers, _, kv_heads, _, head_size = prefix.shape
    for what, found, expected in (
        ("layers", layers, base.layers),
        ("KV heads", kv_heads, base.kv_heads),
        ("a head size", head_size, base.head_size),
    ):
        if expected is not None and found != expected:
            raise BaseMismatch(
                f"prefix has {what} of {found} but base {base.name!r} has {expected}; retrain it on this base or "
                "publish it for another"
            )
    return PrefixPayload(
        tensors={"prefix": prefix.digest},
        dtype=prefix.dtype,
        length=prefix.length,
        base_fingerprint=base.fingerprint,
    )


def _check_room(what: str, length: int, base: BaseDescription | None) -> BaseDescription:
    if base is None:
        raise InvalidArtifact(f"a {what} runs only on the base it was trained on; give that base's fingerprint")
    if length >= base.context_length:
        raise BaseMismatch(
            f"{what} has P={length} virtual tokens but base {base.name!r} has a context of {base.context_length}, "
            "which leaves no room for a request; retrain it with fewer virtual tokens"
        )
    return base


def _check_text(payload: TextPayload, revision: TaskRevision) -> None:
    # It may leave inputs out; it must not ask for fields that no request will bring.
    try:
        used = template_fields(payload.messages)
    except ValueError as error:
        raise InvalidArtifact(f"the text prompt's messages are not templates: {error}") from error
    unknown = [name for name in used if name not in revision.task.inputs]
    if unknown:
        raise InvalidArtifact(
            f"the text prompt uses {{{unknown[0]}}}, which is not an input of task {revision.task.name!r}; "
            f"use {', '.join(revision.task.inputs) or 'no placeholder'}, or apply a task that has it"
        )


def _in_order(payload: EnsemblePayload) -> EnsemblePayload:
    # Members have no order, so the same set in another one is the same version.
    return payload.model_copy(update={"members": tuple(sorted(payload.members))})


def _ensemble_revision(connection: Connection, payload: EnsemblePayload, new: NewVersion) -> TaskRevision:
    """The revision that all members answer. Raises UnknownVersion, BaseMismatch or InvalidArtifact."""
    if len(set(payload.members)) < len(payload.members):
        raise InvalidArtifact("an ensemble names a member twice; name each version once")
    members = [read_version(connection, digest) for digest in payload.members]
    for member in members:
        where = f"member {member.label} ({member.digest[:12]}) of the ensemble"
        if member.task != new.task:
            raise InvalidArtifact(f"{where} belongs to task {member.task!r}, not {new.task!r}; name versions of one")
        if not isinstance(member.payload, SoftPromptPayload):
            raise InvalidArtifact(f"{where} is of kind {member.payload.kind!r}; name soft prompts")
        if member.base_fingerprint != payload.base_fingerprint:
            raise BaseMismatch(
                f"{where} was tuned on base {member.payload.base_fingerprint[:12]}, not "
                f"{payload.base_fingerprint[:12]}; name members of one base"
            )
        if member.task_revision != (new.task_revision or members[0].task_revision):
            raise InvalidArtifact(
                f"{where} answers revision {member.task_revision[:12]} of the task and not that of the others, so one "
                "request cannot be laid out for all; name members of one revision"
            )
    return read_revision(connection, members[0].task_revision)


def _text_of(what: str, document: dict[str, Any]) -> str:
    try:
        return canonical_json(document).decode()
    except ValueError as error:
        raise InvalidArtifact(
            f"the {what} cannot be stored as JSON: {error}; write NaN and infinity as null"
        ) from error


def _write_tensor(connection: Connection, tensor: Tensor, digest: str) -> bool:
    """Stores a tensor where the store has none of that digest, or has it damaged; returns whether it did."""
    here = tensors.c.digest == digest
    columns = {
        "dtype": tensor.dtype,
        "shape": json.dumps(list(tensor.shape)),
        "size_bytes": tensor.size_bytes,
        "data": tensor.data,
    }
    stored = connection.execute(select(*(tensors.c[name] for name in columns)).where(here)).one_or_none()
    if stored is not None and tuple(stored) == tuple(columns.values()):
        return False
    if stored is None:
        connection.execute(insert(tensors).values(digest=digest, **columns))
    else:
        connection.execute(update(tensors).where(here).values(**columns))
    return True
