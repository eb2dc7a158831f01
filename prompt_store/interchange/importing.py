"""The front door for prompts from outside: whatever the file or folder is, one value or one reason."""

import os
from pathlib import Path, PurePath

from prompt_store.errors import InvalidArtifact
from prompt_store.files import read_bounded
from prompt_store.interchange import archive, npy
from prompt_store.interchange.imported import Imported
from prompt_store.interchange.peft import CONFIG_FILE, TENSORS_FILE, read_peft
from prompt_store.prompts.artifact import decode_artifact
from prompt_store.prompts.tensor_file import MAX_FILE_BYTES, MAX_HEADER_BYTES, guess_format

_PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".joblib"}
_REMEDY = "give a .safetensors of Softcue, a PEFT adapter's folder or a zip of it, or a .npy"


def read_import(path: Path, *, task_index: int | None = None) -> Imported:
    """The prompt in a Softcue artifact, a PEFT adapter's folder, a zip of one, or a numpy file, judged by content.

    `task_index` chooses the task of a multitask prompt. Raises InvalidArtifact naming the file and what is wrong.
    """
    if os.path.isdir(path):
        return read_peft(path, task_index=task_index)
    return decode_import(read_bounded(path, MAX_FILE_BYTES + MAX_HEADER_BYTES), str(path), task_index=task_index)


def decode_import(data: bytes, source: str, *, task_index: int | None = None) -> Imported:
    """As `read_import`, for the bytes of a file that `source` names."""
    if data.startswith(archive.MAGIC):
        with archive.unpacked(data, source) as folder:
            return _read_unpacked(folder, source, task_index)
    if task_index is not None:
        raise InvalidArtifact(f"{source}: holds one prompt, of no task by index; leave the index out")
    if data.startswith(npy.MAGIC):
        return npy.read_npy(data, source)
    name = PurePath(source)
    if name.name == TENSORS_FILE:
        raise InvalidArtifact(f"{source}: is half of a PEFT adapter; give its folder, with {CONFIG_FILE} in it")
    if data[8:9] == b"{":
        artifact = decode_artifact(data, source)
        return Imported(
            artifact.prompt,
            "safetensors",
            task=artifact.task,
            base_fingerprint=artifact.base_fingerprint,
            provenance=artifact.provenance,
            notes=artifact.notes,
        )
    what = guess_format(data)
    if name.suffix.lower() in _PICKLE_SUFFIXES:
        what = "a Python pickle by its name (which could run code and is never opened)"
    raise InvalidArtifact(f"{source}: is {what}; {_REMEDY}")


def _read_unpacked(folder: Path, source: str, task_index: int | None) -> Imported:
    adapters = [file.parent for file in folder.rglob(CONFIG_FILE)]
    if len(adapters) != 1:
        raise InvalidArtifact(f"{source}: holds {len(adapters)} PEFT adapters, not one; zip one adapter's folder")
    try:
        return read_peft(adapters[0], task_index=task_index)
    except InvalidArtifact as error:
        # The folder is gone by the time that anybody reads this: say where in the archive it was.
        raise InvalidArtifact(f"{source}: {str(error).replace(f'{folder}/', '')}") from error
