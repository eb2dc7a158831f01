"""A process that appends until it is killed, and what the store makes of a journal."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prompt_store.errors import StoreUnavailable
from prompt_store.ledger.entries import Entry, Exposure
from service.ledger.journal import Journal


def exposure(request: str, **changes: Any) -> Exposure:
    known: dict[str, Any] = {
        "request": request, "task": "support", "experiment": "tone", "arm": "a", "allocation": 1, "probability": 0.5,
        "unit_hash": "u", "version": "", "forced": False, "at_ms": 1, "principal": "anna",
    }  # fmt: skip
    return Exposure(**known | changes)


class Store:
    """Takes entries in as the store does, and can be away or particular about them."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.away = False
        self.refused: set[str] = set()

    def write(self, entries: Sequence[Entry]) -> None:
        if self.away:
            raise StoreUnavailable("the store is away; wait")
        if any(entry.request in self.refused for entry in entries):
            raise ValueError("the store does not take this one")
        self.requests += [entry.request for entry in entries]


def append_for_ever(folder: str, name: str) -> None:
    """Prints the name of each entry once it was acknowledged."""
    journal = Journal.open(Path(folder), segment_bytes=4096)
    for number in itertools.count():
        journal.append(exposure(f"{name}-{number}"))
        sys.stdout.write(f"{name}-{number}\n")
        sys.stdout.flush()
        if number % 50 == 49:
            journal.sync()


if __name__ == "__main__":
    append_for_ever(sys.argv[1], sys.argv[2])
