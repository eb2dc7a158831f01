"""Finding versions by selector, and reading their tensors."""

import json

from pydantic import ValidationError
from sqlalchemy import Connection, Row, select

from prompt_store.errors import InvalidArtifact, InvalidName, SchemaMismatch, UnknownAlias, UnknownVersion
from prompt_store.names import AliasSelector, DigestSelector, NumberSelector, Selector, parse_selector
from prompt_store.prompts.revisions import require_task
from prompt_store.prompts.soft_prompt import SoftPrompt, tensor_digest
from prompt_store.prompts.version import PAYLOAD, PromptVersion, Provenance, SoftPromptPayload
from prompt_store.tables import aliases, tensors, version_tensors, versions


def find_version(connection: Connection, task: str, selector: str) -> PromptVersion:
    """The version that `selector` names. Raises UnknownTask, UnknownVersion or UnknownAlias, or InvalidName."""
    return to_version(_find_row(connection, task, parse_selector(selector), selector))


def find_digest(connection: Connection, task: str, selector: str) -> str:
    """As `find_version`, only its digest."""
    return str(_find_row(connection, task, parse_selector(selector), selector).digest)


def task_versions(connection: Connection, task: str) -> list[PromptVersion]:
    """Every version of a task, newest first. Raises UnknownTask."""
    require_task(connection, task)
    rows = connection.execute(select(versions).where(versions.c.task == task).order_by(versions.c.number.desc()))
    return [to_version(row) for row in rows]


def read_version(connection: Connection, digest: str) -> PromptVersion:
    """The version of that full digest, whichever task it belongs to. Raises UnknownVersion."""
    row = connection.execute(select(versions).where(versions.c.digest == digest)).one_or_none()
    if row is None:
        raise UnknownVersion(digest)
    return to_version(row)


def read_soft_prompt(connection: Connection, version: str) -> SoftPrompt:
    """The tensor of a version given by full digest, hashed again on the way.

    Raises UnknownVersion, or InvalidArtifact when the version holds no soft prompt or its bytes are damaged.
    """
    payload = read_version(connection, version).payload
    if not isinstance(payload, SoftPromptPayload):
        raise InvalidArtifact(f"version {version[:12]} holds a {payload.kind} payload, not a soft prompt; serve it so")
    row = connection.execute(
        select(tensors)
        .join(version_tensors, version_tensors.c.tensor == tensors.c.digest)
        .where(version_tensors.c.version == version, version_tensors.c.name == "soft_prompt")
    ).one_or_none()
    if row is None or row.digest != payload.tensor_digest:
        raise InvalidArtifact(f"the tensor of version {version[:12]} is missing; restore the store from a backup")
    # Judged by the payload's shape and dtype, so that neither those columns nor the bytes can be wrong unnoticed.
    data = bytes(row.data)
    if tensor_digest(payload.dtype, payload.shape, data) != payload.tensor_digest:
        raise InvalidArtifact(
            f"the tensor of version {version[:12]} is damaged on disk (its bytes no longer have digest "
            f"{payload.tensor_digest[:12]}); restore the store from a backup or publish the prompt again elsewhere"
        )
    return SoftPrompt(payload.dtype, payload.shape, data)


def to_version(row: Row[tuple[object, ...]]) -> PromptVersion:
    """Raises SchemaMismatch for a payload or provenance that this code cannot read."""
    try:
        return PromptVersion(
            task=row.task,
            number=row.number,
            digest=row.digest,
            task_revision=row.task_revision,
            payload=PAYLOAD.validate_json(row.payload),
            provenance=Provenance.model_validate_json(row.provenance),
            report=json.loads(row.report) if row.report is not None else None,
            notes=row.notes,
            tags=tuple(json.loads(row.tags)),
            created_at=row.created_at,
            principal=row.principal,
            author=row.author,
        )
    except (ValidationError, ValueError) as error:
        raise SchemaMismatch(
            f"version v{row.number} of task {row.task!r} was written by another release of Softcue, or is damaged, and "
            "cannot be read; upgrade Softcue or restore a backup"
        ) from error


def _find_row(connection: Connection, task: str, selector: Selector, text: str) -> Row[tuple[object, ...]]:
    require_task(connection, task)
    query = select(versions).where(versions.c.task == task)
    match selector:
        case NumberSelector(number):
            query = query.where(versions.c.number == number)
        case DigestSelector(prefix):
            # Digests are lower-case hexadecimal, so the prefix holds no pattern characters and 'g' ends its range.
            query = query.where(versions.c.digest >= prefix, versions.c.digest < prefix + "g")
        case AliasSelector(name):
            query = query.join(aliases, aliases.c.version == versions.c.digest).where(
                aliases.c.task == task, aliases.c.name == name
            )
    rows = connection.execute(query.limit(2)).all()
    if len(rows) > 1:
        raise InvalidName(f"{text!r} fits several versions of task {task!r}; give more of the digest")
    if rows:
        return rows[0]
    named = connection.execute(select(aliases.c.name).where(aliases.c.task == task)).scalars().all()
    numbers = connection.execute(select(versions.c.number, versions.c.digest).where(versions.c.task == task)).all()
    where = f" of task {task!r}"
    if not numbers:
        remedy = "the task has no version yet; publish one with `softcue tune` or `softcue prompts publish`"
        if isinstance(selector, AliasSelector):
            raise UnknownAlias(text, where=where, remedy=remedy)
        raise UnknownVersion(text, where=where, remedy=remedy)
    labels = [f"v{number}" for number, _ in numbers]
    if isinstance(selector, AliasSelector):
        raise UnknownAlias(text, [*named, *labels], where=where)
    if isinstance(selector, DigestSelector):
        raise UnknownVersion(text, [digest[: len(text)] for _, digest in numbers], where=where)
    raise UnknownVersion(text, labels, where=where)
