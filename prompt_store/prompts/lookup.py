"""Finding versions by selector, and reading what a row holds: the version, its evidence, its tensors."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection, Row, Select, select

from prompt_store.errors import (
    DamagedArtifact,
    InvalidArtifact,
    InvalidName,
    SchemaMismatch,
    UnknownAlias,
    UnknownVersion,
)
from prompt_store.names import AliasSelector, DigestSelector, NumberSelector, Selector, is_digest, parse_selector
from prompt_store.prompts import prefix, soft_prompt
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.revisions import require_task
from prompt_store.prompts.soft_prompt import SoftPrompt, tensor_digest
from prompt_store.prompts.unreadable import UnreadableVersion
from prompt_store.prompts.version import PAYLOAD, PrefixPayload, PromptVersion, Provenance, SoftPromptPayload
from prompt_store.tables import aliases, tensors, version_tensors, versions

# Reports and recipes are large, and nobody who looks a version up needs them.
_EVIDENCE = ("report", "recipe")
_COLUMNS = [column for column in versions.c if column.name not in _EVIDENCE]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a version's publisher laid beside it: how it was judged and how it was made, None where neither is known."""

    report: dict[str, Any] | None
    recipe: dict[str, Any] | None


_REPAIR = "restore the store from a backup, or publish the same prompt again"


def find_version(connection: Connection, task: str, selector: str) -> PromptVersion:
    """The version that `selector` names. Raises UnknownTask, UnknownVersion or UnknownAlias, or InvalidName."""
    return to_version(_find_row(connection, task, parse_selector(selector), selector))


def find_digest(connection: Connection, task: str, selector: str) -> str:
    """As `find_version`, only its digest."""
    return str(_find_row(connection, task, parse_selector(selector), selector).digest)


def task_versions(connection: Connection, task: str) -> list[PromptVersion | UnreadableVersion]:
    """Every version of a task, newest first. Raises UnknownTask."""
    require_task(connection, task)
    rows = connection.execute(select_versions().where(versions.c.task == task).order_by(versions.c.number.desc()))
    return [read_row(row) for row in rows]


def read_version(connection: Connection, digest: str) -> PromptVersion:
    """The version of that full digest, whichever task it belongs to. Raises UnknownVersion."""
    return to_version(_read_row(connection, select_versions(), digest))


def read_evidence(connection: Connection, version: str) -> Evidence:
    """The evidence of a version given by full digest. Raises UnknownVersion, or SchemaMismatch for what is no JSON."""
    row = _read_row(connection, select(versions.c.report, versions.c.recipe), version)
    try:
        return Evidence(*(json.loads(text) if text is not None else None for text in row))
    except ValueError as error:
        raise SchemaMismatch(
            f"the report or recipe of version {version[:12]} is damaged and cannot be read; restore a backup"
        ) from error


def read_soft_prompt(connection: Connection, version: str) -> SoftPrompt:
    """As `read_prompt`, for those who take nothing but a soft prompt. Raises InvalidArtifact for a prefix."""
    prompt = read_prompt(connection, version)
    if not isinstance(prompt, SoftPrompt):
        raise InvalidArtifact(f"version {version[:12]} holds a prefix payload, not a soft prompt; serve it so")
    return prompt


def read_prompt(connection: Connection, version: str) -> SoftPrompt | Prefix:
    """The tensor of a version given by full digest, hashed again on the way.

    Raises UnknownVersion, InvalidArtifact when the version holds neither soft prompt nor prefix, or DamagedArtifact
    when its bytes are missing or no longer those that were published.
    """
    payload = read_version(connection, version).payload
    match payload:
        case SoftPromptPayload():
            name, digest = soft_prompt.TENSOR_NAME, payload.tensor_digest
        case PrefixPayload(tensors={prefix.PREFIX_TENSOR_NAME: digest}):
            name = prefix.PREFIX_TENSOR_NAME
        case _:
            raise InvalidArtifact(
                f"version {version[:12]} holds a {payload.kind} payload, not a soft prompt or prefix; serve it so"
            )
    row = connection.execute(
        select(tensors)
        .join(version_tensors, version_tensors.c.tensor == tensors.c.digest)
        .where(version_tensors.c.version == version, version_tensors.c.name == name)
    ).one_or_none()
    if row is None or row.digest != digest:
        raise DamagedArtifact(f"the tensor of version {version[:12]} is missing; {_REPAIR}")
    # A soft prompt is judged by its payload's shape and dtype; a prefix's payload has only the length, so its row's
    # shape is hashed too. Neither those columns nor the bytes can be wrong unnoticed.
    shape = payload.shape if isinstance(payload, SoftPromptPayload) else _prefix_shape(row.shape)
    data = bytes(row.data)
    if shape is None or tensor_digest(payload.dtype, shape, data) != digest:
        raise DamagedArtifact(
            f"the tensor of version {version[:12]} is damaged on disk (its bytes no longer have digest {digest[:12]}); "
            f"{_REPAIR}"
        )
    return Prefix(payload.dtype, shape, data) if len(shape) == 5 else SoftPrompt(payload.dtype, shape, data)


def select_versions() -> Select[Any]:
    """The columns that `to_version` reads."""
    return select(*_COLUMNS)


def read_row(row: Row[Any]) -> PromptVersion | UnreadableVersion:
    """A row of `select_versions`, whether or not this code can read all of it."""
    try:
        return to_version(row)
    except SchemaMismatch as error:
        return UnreadableVersion(str(error), row.task, row.number, row.digest, row.kind, row.created_at)


def to_version(row: Row[Any]) -> PromptVersion:
    """A row of `select_versions`. Raises SchemaMismatch for a payload or provenance that this code cannot read."""
    try:
        return PromptVersion(
            task=row.task,
            number=row.number,
            digest=row.digest,
            task_revision=row.task_revision,
            payload=PAYLOAD.validate_json(row.payload),
            provenance=Provenance.model_validate_json(row.provenance),
            notes=row.notes,
            tags=tuple(json.loads(row.tags)),
            created_at=row.created_at,
            principal=row.principal,
            author=row.author,
            shutdown_date=row.shutdown_date,
        )
    except (ValidationError, ValueError, TypeError) as error:
        raise SchemaMismatch(
            f"version v{row.number} of task {row.task!r} (of kind {row.kind!r}) was written by "
            f"{_release_of(row.provenance)}, or is damaged, and cannot be read; upgrade Softcue or restore a backup"
        ) from error


def _release_of(provenance: str) -> str:
    """The release that a version's provenance names, as far as it can be read."""
    try:
        release = json.loads(provenance).get("code_version")
    except (ValueError, AttributeError):
        release = None
    return f"Softcue {release}" if isinstance(release, str) else "another release of Softcue"


def _prefix_shape(text: str) -> tuple[int, int, int, int, int] | None:
    """[L, 2, KV heads, P, D] from its column; None for anything else."""
    try:
        layers, two, heads, length, width = json.loads(text)
    except (ValueError, TypeError):
        return None
    shape = (layers, two, heads, length, width)
    return shape if all(type(size) is int for size in shape) else None


def _read_row(connection: Connection, query: Select[Any], digest: str) -> Row[Any]:
    # What is no digest may be text that the database does not even take as a question.
    row = connection.execute(query.where(versions.c.digest == digest)).one_or_none() if is_digest(digest) else None
    if row is None:
        raise UnknownVersion(digest)
    return row


def _find_row(connection: Connection, task: str, selector: Selector, text: str) -> Row[Any]:
    require_task(connection, task)
    query = select_versions().where(versions.c.task == task)
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
