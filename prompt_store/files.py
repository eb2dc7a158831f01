"""Files read within a bound, and files and folders written whole or not at all."""

import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from prompt_store.errors import InvalidArtifact


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """Raises InvalidArtifact when the file cannot be read, is none, or is larger."""
    try:
        # Judged before it is opened, because opening a pipe waits for its other end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidArtifact(f"{path}: is not a file; check the path")
        with open(path, "rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise InvalidArtifact(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if len(data) > limit_bytes:
        raise InvalidArtifact(f"{path}: is larger than the limit of {limit_bytes} bytes; check the path")
    return data


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, in the place of one that is there. Raises InvalidArtifact; what was there then stays."""

    def write(folder: Path) -> None:
        unfinished = folder / path.name
        unfinished.write_bytes(data)
        unfinished.replace(path)

    _beside(path, write)


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    """Writes a folder that was not there, or was empty. Raises InvalidArtifact; nothing is then written."""

    def write(folder: Path) -> None:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InvalidArtifact(f"{path}: is there already; remove it or name another folder")
        unfinished = folder / path.name
        unfinished.mkdir()
        for name, data in files.items():
            (unfinished / name).write_bytes(data)
        unfinished.replace(path)

    _beside(path, write)


def _beside(path: Path, write: Callable[[Path], None]) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:100]}.", dir=path.parent) as folder:
            write(Path(folder))
    except OSError as error:
        raise InvalidArtifact(
            f"{path}: cannot be written ({error.strerror}); check that its folder is there, writable and not full"
        ) from error
