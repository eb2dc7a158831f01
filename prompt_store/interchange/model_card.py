"""The model card of a place where versions are shared: what lies there, for people and for the hub's search."""

import html
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from huggingface_hub import ModelCardData

from prompt_store.errors import StoreError
from prompt_store.interchange.hub import is_repository_id
from prompt_store.interchange.version_folder import SharedVersion, read_file, read_shared_version

CARD_FILE = "README.md"

MAX_CARD_BYTES = 16 * 2**20

_LIBRARY = "softcue"
_MAX_NOTES = 200


def may_write_card(path: Path) -> bool:
    """Whether there is no card, or one that a push made: somebody's own README is left alone."""
    if not path.exists() and not path.is_symlink():
        return True
    return f"library_name: {_LIBRARY}\n".encode() in read_file(path, MAX_CARD_BYTES)


def make_card(folders: Sequence[Path]) -> bytes:
    """The card of these version folders, which lie task by task; one that cannot be read is listed as such."""
    read = {folder: _read(folder) for folder in folders}
    bases = sorted({version.base.name for version in read.values() if version is not None and version.base is not None})
    kinds = sorted({version.kind for version in read.values() if version is not None})
    metadata = ModelCardData(
        library_name=_LIBRARY,
        # The hub refuses a card whose base is no model id, and many a base is a folder.
        base_model=[name for name in bases if is_repository_id(name)] or None,
        tags=["softcue", "prompt-tuning", *kinds],
    )
    lines = [
        "---", metadata.to_yaml(), "---", "",
        "# Tuned prompts", "",
        "Versions of prompts, shared by Softcue stores. Each folder is a version "
        "by its digest;", "`softcue prompts pull` checks it and publishes it in your store.",
    ]  # fmt: skip
    for task, group in groupby(folders, key=lambda folder: folder.parent.name):
        lines += [
            "", f"## {task}", "",
            "| version | digest | kind | base | author | published | notes |",
            "|---|---|---|---|---|---|---|",
            *(_row(folder, read[folder]) for folder in group),
        ]  # fmt: skip
    return ("\n".join(lines) + "\n").encode()


def _read(folder: Path) -> SharedVersion | None:
    try:
        return read_shared_version(folder)
    except StoreError:
        # Somebody else's damaged version must not keep this store from pushing its own.
        return None


def _row(folder: Path, version: SharedVersion | None) -> str:
    if version is None:
        return f"| | {folder.name[:12]} | cannot be read | | | | |"
    cells = (
        version.label,
        folder.name[:12],
        version.kind,
        version.base.name if version.base is not None else "",
        version.author,
        f"{version.created_at:%Y-%m-%d %H:%M}",
        version.notes[:_MAX_NOTES],
    )
    return f"| {' | '.join(_cell(text) for text in cells)} |"


def _cell(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")
