"""Zip archives, unpacked within bounds into a temporary folder."""

import io
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from prompt_store.errors import InvalidArtifact
from prompt_store.prompts.tensor_file import MAX_FILE_BYTES

MAGIC = b"PK\3\4"
MAX_ENTRIES = 100
MAX_UNPACKED_BYTES = MAX_FILE_BYTES + 2**25  # an adapter, and a tokenizer beside it
MAX_RATIO = 100  # learned floats hardly shrink; configurations do, to about a tenth

_END = b"PK\5\6"  # of the central directory; its comment has at most 65,535 bytes
_END_64 = b"PK\6\7"
_TAIL_BYTES = 22 + 0xFFFF
_FIRST_ENTRY_BYTES = 30 + 2**8  # its header, and as much of its name as there mostly is
_MAX_DIRECTORY_BYTES = MAX_ENTRIES * 2**10
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib")
_PICKLED = b"/data.pkl"  # the first entry of what torch.save writes, whose end is an unusual one
_REMEDY = "zip the adapter's folder anew, with nothing else in it"
_DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError, EOFError, OverflowError, struct.error)


@contextmanager
def unpacked(data: bytes, source: str) -> Iterator[Path]:
    """The folder that a zip archive was unpacked to; it is gone afterwards.

    Raises InvalidArtifact, naming `source`, before anything is unpacked: for too many or too large entries, entries
    that shrank beyond belief, names that lead out of the folder or repeat, links, encryption, and for archives that
    numpy or torch made.
    """
    _check_directory(data, source)
    with tempfile.TemporaryDirectory(prefix="softcue-import-") as name:
        folder = Path(name)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                entries = archive.infolist()
                _check_entries(entries, source)
                for entry in entries:
                    _unpack(archive, entry, folder)
        except _DAMAGED as error:
            raise InvalidArtifact(f"{source}: cannot be unpacked ({error}); {_REMEDY}") from error
        yield folder


def _check_directory(data: bytes, source: str) -> None:
    """Bounds the list of entries before zipfile reads all of it."""
    tail = data[-_TAIL_BYTES:]
    if tail.count(_END) != 1 or _END_64 in tail or len(tail) < tail.index(_END) + 22:
        if _PICKLED in data[:_FIRST_ENTRY_BYTES]:
            raise InvalidArtifact(_pickle_message(source, "data.pkl"))
        raise InvalidArtifact(f"{source}: is a cut or unusual zip archive, or one within another; {_REMEDY}")
    entries, size = struct.unpack_from("<HI", tail, tail.index(_END) + 10)
    if entries > MAX_ENTRIES or size > _MAX_DIRECTORY_BYTES:
        raise InvalidArtifact(f"{source}: lists {entries} entries in {size} bytes, more than {MAX_ENTRIES}; {_REMEDY}")


def _check_entries(entries: list[zipfile.ZipInfo], source: str) -> None:
    names = [entry.filename for entry in entries]
    if pickles := [name for name in names if name.lower().endswith(_PICKLES)]:
        raise InvalidArtifact(_pickle_message(source, pickles[0]))
    if any(name.endswith(".npy") for name in names):
        raise InvalidArtifact(f"{source}: is a numpy .npz of several arrays; save the prompt alone with numpy.save")
    if len(entries) > MAX_ENTRIES or len(set(names)) < len(names):
        raise InvalidArtifact(f"{source}: holds more than {MAX_ENTRIES} entries, or one name twice; {_REMEDY}")
    if (total := sum(entry.file_size for entry in entries)) > MAX_UNPACKED_BYTES:
        raise InvalidArtifact(f"{source}: unpacks to {total} bytes, more than {MAX_UNPACKED_BYTES}; {_REMEDY}")
    for entry in entries:
        if reason := _reason_against(entry):
            raise InvalidArtifact(f"{source}: entry {entry.orig_filename[:80]!r} {reason}; {_REMEDY}")


def _pickle_message(source: str, name: str) -> str:
    return (
        f"{source}: holds a pickle, {name[:80]!r}, as torch.save writes (it could run code and is never opened); save "
        "the prompt as safetensors, and zip an adapter's folder without what training left there"
    )


def _reason_against(entry: zipfile.ZipInfo) -> str | None:
    name, mode = entry.orig_filename, entry.external_attr >> 16
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00-\x1f]", name) or not path.parts:
        return "has a name that leads out of the folder"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed in an unusual way"
    if entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
        return f"unpacks to more than {MAX_RATIO} times its size"
    return None


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    target = folder / entry.filename
    if entry.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # zipfile gives at most the size that the directory names, which was added up before.
    target.write_bytes(archive.read(entry))
