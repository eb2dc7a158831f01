"""Who runs in the next forward pass. Pure Python: knows sequences, slots and a token budget, no tensors.

A sequence waits, then gets a KV slot and prefills in chunks, then decodes one token a step until it ends. Decoding
sequences go first, so that a long prompt never stalls the streams of others; first come, first served among the rest.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["waiting", "prefill", "decode", "ended"]


@dataclass(eq=False, slots=True)
class Sequence:
    """One generation or score request inside the engine.

    `token_ids` holds the prompt's text and grows with what is generated; `computed` counts those of them whose KV is in
    the slot. The soft prompt's `prefix_length` positions stand before them.
    """

    id: str
    token_ids: list[int]
    prompt_tokens: int
    prefix_digest: str | None = None
    prefix_length: int = 0
    phase: Phase = "waiting"
    slot: int = -1
    computed: int = 0

    @property
    def remaining(self) -> int:
        """Tokens that still need a forward pass before the next one can be chosen."""
        return len(self.token_ids) - self.computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a sequence from `start` on, to be computed in the next forward pass."""

    sequence: Sequence
    start: int
    count: int

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be chosen after this chunk."""
        return self.start + self.count == len(self.sequence.token_ids)


@dataclass(slots=True)
class Scheduler:
    """Admission, slots and the token budget of a step."""

    slots: int
    max_batch_tokens: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._free = list(range(self.slots))

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def admit(self) -> Iterator[Sequence]:
        """Give free slots to waiting sequences, lowest slot first, and yield each one that got one."""
        while self.waiting and self._free:
            sequence = self.waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            sequence.phase = "prefill"
            self.running.append(sequence)
            yield sequence

    def next_batch(self) -> list[Chunk]:
        """The chunks of the next forward pass: every decoding sequence, then prefill within the token budget."""
        chunks = [Chunk(row, row.computed, 1) for row in self.running if row.phase == "decode"]
        budget = max(self.max_batch_tokens - len(chunks), 1)
        for sequence in self.running:
            if sequence.phase == "prefill" and budget > 0:
                count = min(sequence.remaining, budget)
                chunks.append(Chunk(sequence, sequence.computed, count))
                budget -= count
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """Record that a chunk's KV is in its slot."""
        chunk.sequence.computed += chunk.count
        if chunk.completes:
            chunk.sequence.phase = "decode"

    def end(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its slot. Ending twice changes nothing."""
        if sequence.phase == "waiting":
            self.waiting.remove(sequence)
        elif sequence.phase != "ended":
            self.running.remove(sequence)
            heapq.heappush(self._free, sequence.slot)
        sequence.phase = "ended"

    @property
    def slots_used(self) -> int:
        return self.slots - len(self._free)
