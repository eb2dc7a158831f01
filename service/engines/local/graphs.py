"""Decode steps that launch as one: captured at load for some numbers of rows, over fixed tensors, then replayed.

A step of n sequences, one token each, takes the smallest size that holds them. The rows that are left over compute a
token of their own in a block that belongs to nobody, and are dropped. All sizes read the same tensors, which are filled
anew before each step. Knows neither sequences nor requests; who calls decides when a step may go this way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.engines.local.blocks import blocks_for
from service.engines.local.kv_cache import KVCache
from service.engines.local.varlen import VarlenPlan

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]
# (token ids [n], positions [n], plan) to logits [n, V]
DecodeStep = Callable[[Tensor, Tensor, VarlenPlan], Tensor]

_WARM_UPS = 2


class CudaCapture:
    """Captures what a function launches as a CUDA graph. All of them share their memory: only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        # Libraries set themselves up at first calls, which no graph may hold; nor may the current stream be captured.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def decode_sizes(most: int) -> list[int]:
    """The numbers of rows that are captured: few of them small, so that little is computed for nothing."""
    sizes = [size for size in (1, 2, 4, *range(8, most, 8)) if size < most]
    return [*sizes, most]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a step reads: `tokens` [4, M] int64 (id, position, page, offset in it) of M rows, their `lengths` [M],
    `ends` [M + 1] and `table` [M, pages], int32, as VarlenPlan has them."""

    tokens: Tensor
    lengths: Tensor
    ends: Tensor
    table: Tensor

    @classmethod
    def empty(cls, rows: int, pages: int, device: torch.device, *, pinned: bool = False) -> _Inputs:
        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)

        return cls(zeros(4, rows, dtype=torch.int64), zeros(rows), zeros(rows + 1), zeros(rows, pages))

    def copy_from(self, other: _Inputs) -> None:
        for name in _Inputs.__slots__:
            getattr(self, name).copy_(getattr(other, name), non_blocking=True)


class DecodeGraphs:
    """Captured decode steps of up to `sizes[-1]` rows of at most `context_length` positions; `scrap` is nobody's block.

    Capturing runs each step, on the scrap block alone. Raises whatever `step` or `capture` raises.
    """

    def __init__(
        self, step: DecodeStep, capture: Capture, cache: KVCache, *, sizes: list[int], context_length: int, scrap: int
    ) -> None:
        self._sizes = sizes
        self._scrap = scrap
        self._block_tokens = cache.shape.block_tokens
        self._pages = blocks_for(context_length, self._block_tokens)
        device, most = cache.shape.device, sizes[-1]
        self._host = _Inputs.empty(most, self._pages, torch.device("cpu"), pinned=device.type == "cuda")
        self._inputs = _Inputs.empty(most, self._pages, device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._fill([], [], [], most)
        # The largest first, so that the others fit the memory that it took.
        self._replays = {size: capture(self._step_of(step, size)) for size in reversed(sizes)}

    def fit(self, blocks: Sequence[list[int]]) -> bool:
        """Whether a step of sequences with these blocks can be replayed."""
        return len(blocks) <= self._sizes[-1] and max(map(len, blocks)) <= self._pages

    def run(self, ids: list[int], positions: list[int], blocks: Sequence[list[int]]) -> Tensor:
        """Logits [n, V] after one more token of each of n sequences, good until the next run.

        The logits of a run must have been looked at before the next one, or the device may still read its inputs.
        """
        size = self._sizes[bisect_left(self._sizes, len(ids))]
        self._fill(ids, positions, blocks, size)
        return self._replays[size]()[: len(ids)]

    def _step_of(self, step: DecodeStep, size: int) -> Callable[[], Tensor]:
        inputs = self._inputs
        ids, positions, pages, offsets = (row[:size] for row in inputs.tokens)
        plan = VarlenPlan(
            pages=pages,
            offsets=offsets,
            starts=self._starts[: size + 1],
            ends=inputs.ends[: size + 1],
            lengths=inputs.lengths[:size],
            table=inputs.table[:size],
            longest_query=1,
            longest_key=self._pages * self._block_tokens,
        )
        return lambda: step(ids, positions, plan)

    def _fill(self, ids: list[int], positions: list[int], blocks: Sequence[list[int]], size: int) -> None:
        """Set the first `size` rows: those given, and then idle ones, each at the start of the scrap block."""
        tokens, lengths, ends, table = (getattr(self._host, name).numpy() for name in _Inputs.__slots__)
        count = len(ids)
        tokens[:, count:size] = [[0], [0], [self._scrap], [0]]
        lengths[count:size] = 1
        table[:size] = self._scrap
        for row, own in enumerate(blocks):
            table[row, : len(own)] = own
        tokens[0, :count], tokens[1, :count] = ids, positions
        page, tokens[3, :count] = divmod(tokens[1, :count], self._block_tokens)
        tokens[2, :count] = table[np.arange(count), page]
        lengths[:count] = tokens[1, :count] + 1
        np.cumsum(lengths[:size], dtype=np.int32, out=ends[1 : size + 1])
        self._inputs.copy_from(self._host)
