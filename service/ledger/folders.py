"""Whose folder is whose, where several processes journal on one machine.

Each has a folder of its own below the journal's, held by a lock that the operating system frees when the process dies,
however it dies. A folder whose lock is free was left behind, and whoever takes the lock owns it. Folders come, change
hands and go under one more lock, that of the journal's folder, so that nobody meets a folder half made or half gone.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

SEGMENT = ".segment"

_LOCK = "lock"
_NAME = re.compile(r"\d+-[0-9a-f]{8}")
_AT_ONCE = 100  # each holds a file open
_PATIENCE_S = 10.0  # others hold the journal's lock for moments


class ProcessFolder:
    """A folder that this process alone writes and reads."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make(cls, journal: Path) -> Self:
        """A new one. Raises OSError."""
        journal.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _changing(journal):
            path = journal / f"{os.getpid()}-{secrets.token_hex(4)}"
            path.mkdir()
            lock = _lock_of(path)
            lock.acquire()
            return cls(path, lock)

    @classmethod
    def left_behind(cls, journal: Path, known: Collection[Path]) -> list[Self]:
        """Those that no living process holds, held from now on. Raises OSError.

        Beside those that are `known` no more than may be held at once: of very many the rest comes another time.
        """
        found: list[Self] = []
        with _changing(journal):
            for path in sorted(journal.iterdir()):
                if len(known) + len(found) >= _AT_ONCE:
                    break
                if path in known or not _NAME.fullmatch(path.name) or not path.is_dir():
                    continue  # such as lost+found, where the journal has a disk of its own
                lock = _lock_of(path)
                try:
                    lock.acquire()
                except Timeout:
                    continue
                except OSError as error:  # that of another user, maybe; it keeps nobody from the others
                    log.error("the journal of a process that ended cannot be taken over: %s", error)
                    continue
                found.append(cls(path, lock))
        return found

    def segments(self) -> list[Path]:
        """In the order in which they were written."""
        return sorted(self.path.glob(f"*{SEGMENT}"))

    def close(self) -> None:
        """Let go of it, for whoever comes; one that holds nothing is removed. Raises OSError."""
        try:
            if self.path.is_dir() and not self.segments():
                with _changing(self.path.parent):
                    (self.path / _LOCK).unlink(missing_ok=True)
                    self.path.rmdir()
        finally:
            self._lock.release()


def _lock_of(path: Path) -> FileLock:
    return FileLock(path / _LOCK, timeout=0, thread_local=False)


@contextmanager
def _changing(journal: Path) -> Iterator[None]:
    with FileLock(journal / _LOCK, timeout=_PATIENCE_S):
        yield
