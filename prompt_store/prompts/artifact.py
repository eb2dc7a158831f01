"""A soft prompt or prefix as files: `prompt.safetensors`, what its metadata says, and `report.json` beside it.

The codec is `soft_prompt`'s; here its metadata gets a meaning, and every complaint names the file.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prompt_store.errors import InvalidArtifact
from prompt_store.files import read_bounded, write_whole
from prompt_store.prompts.prefix import Prefix
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
    """A soft prompt or prefix and what its file says about it; None or empty where it says nothing."""

    prompt: SoftPrompt | Prefix
    task: str | None = None
    base_fingerprint: str | None = None
    provenance: Provenance = field(default_factory=Provenance)
    notes: str = ""


def write_artifact(path: Path, artifact: Artifact) -> None:
    """Writes the file whole or not at all. Raises InvalidArtifact; equal artifacts give equal bytes."""
    write_whole(path, encode_artifact(artifact))


def read_artifact(path: Path) -> Artifact:
    """Raises InvalidArtifact naming the file and what is wrong with it."""
    return decode_artifact(read_bounded(path, MAX_FILE_BYTES + MAX_HEADER_BYTES), str(path))


def encode_artifact(artifact: Artifact) -> bytes:
    """The bytes of an artifact's file. Raises InvalidArtifact; equal artifacts give equal bytes."""
    metadata = {METADATA_PROVENANCE: artifact.provenance.model_dump_json(exclude_defaults=True)}
    if artifact.task is not None:
        metadata[METADATA_TASK] = artifact.task
    if artifact.base_fingerprint is not None:
        metadata[METADATA_BASE_FINGERPRINT] = artifact.base_fingerprint
    if artifact.notes:
        metadata[METADATA_NOTES] = artifact.notes
    return encode(artifact.prompt, metadata)


def decode_artifact(data: bytes, source: str) -> Artifact:
    """What the bytes of an artifact's file say. Raises InvalidArtifact naming `source` and what is wrong with it."""
    try:
        prompt, metadata = decode(data)
    except InvalidArtifact as error:
        raise InvalidArtifact(f"{source}: {error}") from error
    try:
        provenance = Provenance.model_validate_json(metadata.get(METADATA_PROVENANCE, "{}"))
    except ValidationError as error:
        raise InvalidArtifact(
            f"{source}: its metadata {METADATA_PROVENANCE!r} cannot be read; remove it, or write it with this release"
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
        report = json.loads(read_bounded(path, MAX_REPORT_BYTES))
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(f"{path}: is not JSON ({error}); write the report again") from error
    if not isinstance(report, dict):
        raise InvalidArtifact(f"{path}: holds no JSON object; write the report again")
    return report
