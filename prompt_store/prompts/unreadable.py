"""What stands for a stored row that this code cannot read, so that only those who ask for that row are refused."""

from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from prompt_store.errors import SchemaMismatch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A task revision or route that another release wrote, or that is damaged; `reason` says so to whoever asks."""

    reason: str


@dataclass(frozen=True, slots=True)
class UnreadableVersion(Unreadable):
    """A version of which no more can be read than its row's own columns."""

    task: str
    number: int
    digest: str
    kind: str
    created_at: datetime

    @property
    def label(self) -> str:
        """The number as people write it: `v7`."""
        return f"v{self.number}"


def readable(found: T | Unreadable) -> T:
    """What was read. Raises SchemaMismatch, with the stored reason, where it could not be."""
    if isinstance(found, Unreadable):
        raise SchemaMismatch(found.reason)
    return found
