"""What became of the requests of the last while, kept in memory for whoever asks by a generation's id."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

_KEPT = 20_000


class Recent:
    """The newest so many generations that this replica answered, by id; no prompt and no answer is among it."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        # As JSON: so many objects would make each full collection of garbage a pause of tens of milliseconds.
        self._documents: OrderedDict[str, bytes] = OrderedDict()

    def put(self, generation_id: str, document: dict[str, Any]) -> None:
        """Keep it, and forget the oldest where there are too many."""
        self._documents[generation_id] = msgspec.json.encode(document)
        while len(self._documents) > self._kept:
            self._documents.popitem(last=False)

    def get(self, generation_id: str) -> dict[str, Any] | None:
        """None for what this replica did not answer, or forgot."""
        known = self._documents.get(generation_id)
        return msgspec.json.decode(known) if known is not None else None
