"""The front door for prompts to outside: a file or folder in a format that others read."""

from pathlib import Path
from typing import Literal, get_args

from prompt_store.errors import InvalidArtifact, nearest_name
from prompt_store.interchange.npy import write_npy
from prompt_store.interchange.peft import write_peft
from prompt_store.prompts.artifact import Artifact, write_artifact
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.version import Provenance

ExportFormat = Literal["safetensors", "peft", "cartridge", "npy"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)


def write_export(
    path: Path,
    prompt: SoftPrompt | Prefix,
    format: str,
    *,
    base_name: str | None = None,
    task: str | None = None,
    base_fingerprint: str | None = None,
    provenance: Provenance | None = None,
    notes: str = "",
) -> None:
    """Writes a prompt whole or not at all: a file for safetensors and npy, a folder for peft and cartridge.

    A file that is there is replaced, a folder must be new or empty. `base_name` goes into PEFT's configuration; the
    other particulars into a safetensors file, the only format that has room for them. `peft` makes PROMPT_TUNING of a
    soft prompt and PREFIX_TUNING of a prefix; `cartridge` takes prefixes alone, `npy` soft prompts alone. Raises
    InvalidArtifact.
    """
    match format:
        case "safetensors":
            write_artifact(path, Artifact(prompt, task, base_fingerprint, provenance or Provenance(), notes))
        case "peft" | "cartridge":
            write_peft(path, prompt, base_name, cartridge=format == "cartridge")
        case "npy":
            write_npy(path, prompt)
        case _:
            nearest = nearest_name(format, EXPORT_FORMATS)
            hint = f"did you mean {nearest!r}? " if nearest else ""
            raise InvalidArtifact(f"no export format {format!r}; {hint}There are {', '.join(EXPORT_FORMATS)}")
