"""A soft prompt as files: `prompt.safetensors`, what its metadata says, and `report.json` beside it.

The codec is `soft_prompt`'s; here its metadata gets a meaning, and every complaint names the file.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prompt_store.errors import InvalidArtifact
from prompt_store.prompts.soft_prompt import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    METADATA_BASE_FINGERPRINT,
    METADATA_NOTES,
    METADATA_PROVENANCE,
    METADATA_TASK,
    SoftPrompt,
    decode,
    encode,
)
from prompt_store.prompts.version import Provenance

MAX_REPORT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Artifact:
    """A soft prompt and what its file says about it; None or empty where it says nothing."""

    prompt: SoftPrompt
    task: str | None = None
    base_fingerprint: str | None = None
    provenance: Provenance = field(default_factory=Provenance)
    notes: str = ""


def write_artifact(path: Path, artifact: Artifact) -> None:
    """Writes the file whole or not at all. Raises InvalidArtifact; equal artifacts give equal bytes."""
    metadata = {METADATA_PROVENANCE: artifact.provenance.model_dump_json(exclude_defaults=True)}
    if artifact.task is not None:
        metadata[METADATA_TASK] = artifact.task
    if artifact.base_fingerprint is not None:
        metadata[METADATA_BASE_FINGERPRINT] = artifact.base_fingerprint
    if artifact.notes:
        metadata[METADATA_NOTES] = artifact.notes
    data = encode(artifact.prompt, metadata)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def read_artifact(path: Path) -> Artifact:
    """Raises InvalidArtifact naming the file and what is wrong with it."""
    data = _read(path, MAX_FILE_BYTES + MAX_HEADER_BYTES)
    try:
        prompt, metadata = decode(data)
    except InvalidArtifact as error:
        raise InvalidArtifact(f"{path}: {error}") from error
    try:
        provenance = Provenance.model_validate_json(metadata.get(METADATA_PROVENANCE, "{}"))
    except ValidationError as error:
        raise InvalidArtifact(
            f"{path}: its metadata {METADATA_PROVENANCE!r} cannot be read; remove it, or write it with this release"
        ) from error
    return Artifact(
        prompt,
        task=metadata.get(METADATA_TASK),
        base_fingerprint=metadata.get(METADATA_BASE_FINGERPRINT),
        provenance=provenance,
        notes=metadata.get(METADATA_NOTES, ""),
    )


def read_report(path: Path) -> dict[str, Any]:
    """An evaluation report. Raises InvalidArtifact unless it is a JSON object."""
    try:
        report = json.loads(_read(path, MAX_REPORT_BYTES))
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(f"{path}: is not JSON ({error}); write the report again") from error
    if not isinstance(report, dict):
        raise InvalidArtifact(f"{path}: holds no JSON object; write the report again")
    return report


def _read(path: Path, limit_bytes: int) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise InvalidArtifact(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if len(data) > limit_bytes:
        raise InvalidArtifact(f"{path}: is larger than the limit of {limit_bytes} bytes; check the path")
    return data
