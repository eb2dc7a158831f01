"""A batch as forward passes: one if it can be, more where a chunk is at fault or memory does not suffice.

Where a pass raises, its halves go alone, until the chunk that cannot be computed is alone. Where memory runs out, fewer
tokens go at once, and for a while no more are tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from service.engines.local.model_runner import Logits, ModelRunner
from service.engines.local.pacing import Ceiling
from service.engines.local.scheduler import Batch, Chunk

_MEMORY_RAN_OUT = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True, slots=True)
class Computed:
    """Chunks of one pass. `highest` holds each row's most probable token, -1 where the row is not finite."""

    chunks: list[Chunk]
    logits: Logits
    highest: list[int]


@dataclass(frozen=True, slots=True)
class Failed:
    """A chunk that cannot be computed even alone."""

    chunk: Chunk
    error: Exception


@dataclass(frozen=True, slots=True)
class Skipped:
    """A chunk whose sequence ended before its turn."""

    chunk: Chunk


Outcome = Computed | Failed | Skipped


class Passes:
    """Runs batches on a model. `ceiling` bounds the tokens of a pass by what memory was found to hold."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.ceiling = Ceiling()

    def run(self, batch: Batch, tensors: Mapping[str, Tensor]) -> Iterator[Outcome]:
        """Every chunk comes out once, a prefill that memory does not hold with fewer tokens than it went in with.

        What is made of one outcome may end sequences of the next. `tensors` as in `ModelRunner.run`.
        """
        self._copy(batch.copies)
        yield from self._within(batch.chunks, tensors)

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks before any pass: done again in the middle, it would undo what the first passes wrote."""
        try:
            self._runner.cache.copy(pairs)
            return
        except Exception as error:
            if len(pairs) < 2 or not out_of_memory(error):
                raise
        middle = len(pairs) // 2  # in order, because a target may have been another pair's source
        self._copy(pairs[:middle])
        self._copy(pairs[middle:])

    def _within(self, chunks: list[Chunk], tensors: Mapping[str, Tensor]) -> Iterator[Outcome]:
        """As few passes as the ceiling allows, which may sink meanwhile."""
        left = list(reversed(chunks))
        while left:
            part: list[Chunk] = []
            room = self.ceiling.tokens
            while left and (not part or left[-1].count <= room):
                chunk = left.pop()
                if chunk.sequence.phase == "ended":
                    yield Skipped(chunk)
                    continue
                if _divisible(chunk) and chunk.count > room:
                    chunk = replace(chunk, count=room)
                part.append(chunk)
                room -= chunk.count
            if part:
                yield from self._pass(part, tensors)

    def _pass(self, chunks: list[Chunk], tensors: Mapping[str, Tensor]) -> Iterator[Outcome]:
        result = self._try(chunks, tensors)
        tokens = sum(chunk.count for chunk in chunks)
        if isinstance(result, Computed):
            self.ceiling.held()
            yield result
        elif out_of_memory(result) and (len(chunks) > 1 or _divisible(chunks[0])):
            self.ceiling.lower(tokens)
            yield from self._within(chunks, tensors)
        elif len(chunks) > 1:
            middle = len(chunks) // 2
            yield from self._within(chunks[:middle], tensors)
            yield from self._within(chunks[middle:], tensors)
        else:
            yield Failed(chunks[0], result)

    def _try(self, chunks: list[Chunk], tensors: Mapping[str, Tensor]) -> Computed | Exception:
        try:
            logits = self._runner.run(Batch(chunks), tensors)
            return Computed(chunks, logits, self._runner.highest(logits.rows))
        except Exception as error:  # foreign code: whatever it raises fails one request, not the engine
            # A traceback holds the tensors of its frames, and the next try needs their memory.
            return error.with_traceback(None) if out_of_memory(error) else error


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory could not be had; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_RAN_OUT)


def _divisible(chunk: Chunk) -> bool:
    """Whether a chunk may be computed in pieces. A branch may not: it leaves no KV that a second piece could read."""
    return chunk.branch is None and chunk.count > 1
