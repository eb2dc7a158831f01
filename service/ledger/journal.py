"""The journal: entries on this machine's disk, from the moment that `append` returns until the store has them.

A kill -9 loses nothing that was acknowledged. Files are brought to the disk about once a second, by the thread that
ships them, so that a power cut or a crash of the whole machine loses what the last second brought at most.

Entries go to the active segment. Sealing takes it out of use, whole; `shipping` reads sealed segments alone, and
deletes each when the store has what it holds. The folder must be on a local disk: network file systems promise neither
its locks nor that an append is whole.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import msgspec

from prompt_store.ledger.entries import Entry
from service.ledger.folders import SEGMENT, ProcessFolder
from service.ledger.records import Unknown, record_of

log = logging.getLogger(__name__)

_SEGMENT_BYTES = 4 * 1024**2
_MAX_BYTES = 1024**3
_REFUSED = "refused.jsonl"
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_PRIVATE = 0o600  # captured requests are in it


class JournalUnavailable(Exception):
    """What happened cannot be kept now: no space, no folder, or too much that waits. Later appends try again."""

    retry_after_s: ClassVar[float] = 2.0


@dataclass(slots=True)
class Segment:
    """One file of entries; `descriptor` is None once it is on the disk and closed."""

    folder: ProcessFolder
    path: Path
    size_bytes: int
    descriptor: int | None = None


@dataclass(frozen=True, slots=True)
class JournalStats:
    """`entries` were appended and `lost` could not be, by kind, since the start. `refused` are in the file of those.

    `damaged` are the places where segments could not be read. `waiting_bytes` are what the store does not have yet.
    """

    entries: Mapping[str, int]
    lost: Mapping[str, int]
    refused: int
    damaged: int
    waiting_bytes: int


class Journal:
    """One process's journal, and the segments of others that died. Any thread may append; one alone does the rest."""

    def __init__(self, folder: Path, own: ProcessFolder, *, segment_bytes: int, max_bytes: int) -> None:
        self.folder = folder
        self._own = own
        self._segment_bytes = segment_bytes
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # held for microseconds: requests wait for it
        self._closed = False
        self._number = 0
        self._active: Segment | None = None
        self._sealed: deque[Segment] = deque()
        self._adopted: list[ProcessFolder] = []
        self._waiting_bytes = 0
        self._entries: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self.refused = 0
        self.damaged = 0

    @classmethod
    def open(cls, folder: Path, *, segment_bytes: int = _SEGMENT_BYTES, max_bytes: int = _MAX_BYTES) -> Self:
        """A journal that is new; what others left in the folder comes by `adopt`. Raises JournalUnavailable.

        `max_bytes` bounds what waits for the store, `segment_bytes` about how much of it a file holds.
        """
        folder = folder.expanduser().absolute()
        try:
            own = ProcessFolder.make(folder)
        except OSError as error:
            raise JournalUnavailable(
                f"the journal {folder} cannot be opened ({_reason(error)}); make it a folder that the service may "
                "write, or name another as journal.folder"
            ) from error
        return cls(folder, own, segment_bytes=segment_bytes, max_bytes=max_bytes)

    @property
    def stats(self) -> JournalStats:
        with self._lock:
            return JournalStats(
                dict(self._entries), dict(self._lost), self.refused, self.damaged, self._waiting_bytes
            )  # fmt: skip

    def append(self, entry: Entry) -> None:
        """Keep an entry: once this returns, a crash of the process does not lose it. Takes microseconds.

        Raises JournalUnavailable; the entry is then counted as lost, and the next append tries again.
        """
        self.append_all((entry,))

    def append_all(self, entries: Sequence[Entry]) -> None:
        """The same for several: all of them or none."""
        record = record_of(entries)
        with self._lock:
            try:
                self._write(record)
            except JournalUnavailable:
                self._lost.update(_kind(entry) for entry in entries)
                raise
            for entry in entries:
                self._entries[_kind(entry)] += 1

    def _write(self, record: bytes) -> None:
        if self._waiting_bytes + len(record) > self._max_bytes:
            raise JournalUnavailable(
                f"the journal {self.folder} holds {self._waiting_bytes} bytes that the store does not have yet, and "
                f"may hold {self._max_bytes}; see that the store can be written, or raise journal.max_bytes"
            )
        try:
            active = self._active if self._active is not None else self._begin()
            assert active.descriptor is not None
            status = os.fstat(active.descriptor)
            if not status.st_nlink:
                self._seal()
                raise JournalUnavailable(
                    f"the journal's file {active.path} was deleted; leave the journal's folder to the service, which "
                    "makes it anew within seconds"
                )
            written = os.write(active.descriptor, record)
        except OSError as error:
            raise JournalUnavailable(
                f"the journal {self.folder} cannot be written ({_reason(error)}); see that its disk has space and may "
                "be written"
            ) from error
        if written < len(record):
            self._cut_back(active.descriptor, status.st_size)
            raise JournalUnavailable(f"the disk of the journal {self.folder} is full; free space there")
        active.size_bytes += written
        self._waiting_bytes += written

    def _begin(self) -> Segment:
        if self._closed:
            raise JournalUnavailable("the service is stopping; send the request again in a moment")
        self._number += 1
        path = self._own.path / f"{self._number:08}{SEGMENT}"
        self._active = Segment(self._own, path, 0, os.open(path, _APPEND, _PRIVATE))
        return self._active

    def _cut_back(self, descriptor: int, size_bytes: int) -> None:
        try:
            os.ftruncate(descriptor, size_bytes)
        except OSError:
            log.exception("half a record could not be cut off; it stays as the end of its segment")
            self._seal()

    def _seal(self) -> None:
        """Take the active segment out of use; the next append begins another. Only while locked."""
        if self._active is not None:
            self._sealed.append(self._active)
            self._active = None

    def sync(self, *, seal: bool = False) -> None:
        """Bring what was appended to the disk. Blocks as long as the disk takes, and holds up no append. OSError.

        Where nothing older waits for the store, where the active segment is large enough, or with `seal`, it is sealed.
        """
        with self._lock:
            active = self._active
            if active is not None and (seal or not self._sealed or active.size_bytes >= self._segment_bytes):
                self._seal()
                active = None
            sealed = [segment for segment in self._sealed if segment.descriptor is not None]
        for segment in sealed:
            descriptor, segment.descriptor = segment.descriptor, None
            assert descriptor is not None
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if active is not None and active.descriptor is not None:
            # Appends never close it, and only this thread does.
            os.fsync(active.descriptor)

    def oldest(self) -> Segment | None:
        """The sealed segment to be shipped next."""
        with self._lock:
            return self._sealed[0] if self._sealed else None

    def discard(self, segment: Segment) -> None:
        """Delete the oldest segment: the store has all that it holds. Raises OSError."""
        segment.path.unlink(missing_ok=True)
        folder = segment.folder
        with self._lock:
            oldest = self._sealed.popleft()
            assert oldest is segment
            self._waiting_bytes -= segment.size_bytes
            # What was adopted with it stands right behind it: of thousands the others need not be looked at.
            emptied = not self._sealed or self._sealed[0].folder is not folder
        if emptied and folder in self._adopted:
            self._adopted.remove(folder)
            folder.close()

    def adopt(self) -> None:
        """Take over what processes that died left in the folder. Raises OSError."""
        known = {self._own.path, *(folder.path for folder in self._adopted)}
        for folder in ProcessFolder.left_behind(self.folder, known):
            segments = [Segment(folder, path, path.stat().st_size) for path in folder.segments()]
            if not segments:
                folder.close()
                continue
            waiting_bytes = sum(segment.size_bytes for segment in segments)
            log.warning(
                "%d bytes of the journal of a process that ended before the store had them are shipped now: %s",
                *(waiting_bytes, folder.path),
            )
            self._adopted.append(folder)
            with self._lock:
                self._sealed.extend(segments)
                self._waiting_bytes += waiting_bytes

    def mend(self) -> None:
        """Make the process's folder anew where somebody deleted it. Raises OSError."""
        if self._own.path.is_dir():
            return
        log.error("the journal's folder %s was deleted, with all that the store did not have yet", self._own.path)
        own = ProcessFolder.make(self.folder)
        with self._lock:
            self._seal()
            gone, self._own = self._own, own
        gone.close()

    def set_aside(self, entry: Entry | Unknown, reason: str) -> None:
        """Keep an entry that the store does not take, as a line of JSON, in a file that nothing deletes. OSError."""
        kept = _readable(entry.data) if isinstance(entry, Unknown) else msgspec.to_builtins(entry)
        line = msgspec.json.encode({"reason": reason, "entry": kept}) + b"\n"
        descriptor = os.open(self.folder / _REFUSED, _APPEND, _PRIVATE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # other processes write it too, and half a line is cut off again
            size_bytes = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, size_bytes)
                raise OSError(f"the disk of {self.folder} is full")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.refused += 1

    def close(self) -> None:
        """Append no more. What the store does not have stays in the folder, for whoever adopts it. Raises OSError."""
        with self._lock:
            self._seal()
            self._closed = True
        try:
            self.sync()
        finally:
            for folder in (self._own, *self._adopted):
                folder.close()


def _kind(entry: Entry) -> str:
    return str(entry.__struct_config__.tag)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _readable(data: bytes) -> object:
    """An encoded entry as JSON values, or as it is, which JSON has in base 64."""
    try:
        return msgspec.msgpack.decode(data)
    except msgspec.DecodeError:
        return data
