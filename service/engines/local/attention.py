"""The attention function that transformers models call, over KV blocks.

One forward pass carries N tokens of many sequences in one row. `AttentionPlan` says which tokens are whose and where
their KV goes; every token sees its sequence up to itself. With compiled kernels one call does a layer, and on a CUDA
machine with `varlen_attn`; without either, or where a model caps its scores, torch gathers each sequence's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from service.engines.local import operators, varlen
from service.engines.local.kernels import Kernels, StepArguments
from service.engines.local.kv_cache import KVCache
from service.engines.local.varlen import VarlenAttention, VarlenPlan

NAME = "softcue"
TILE_ROWS = 8  # queries that the kernel takes at once

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` tokens from `begin` on, of the sequence in row `row` of the table, at positions from `past` on."""

    begin: int
    count: int
    row: int
    past: int


@dataclass(slots=True)
class AttentionPlan:
    """One forward pass's layout. `table` [R, blocks] int32 holds each row's block numbers, padded with 0."""

    cache: KVCache
    table: IntArray
    segments: list[Segment]
    kernels: Kernels | None = None
    varlen: VarlenAttention | None = None
    calls: int = 0
    _step: tuple[StepArguments, list[IntArray]] | None = None
    _varlen: VarlenPlan | None = None
    _torch: _TorchPlan | None = None

    @classmethod
    def fixed(cls, cache: KVCache, varlen: VarlenAttention, plan: VarlenPlan) -> AttentionPlan:
        """A plan over tensors that are filled later, for a pass that is captured."""
        return cls(cache, np.empty((0, 0), dtype=np.int32), [], varlen=varlen, _varlen=plan)

    def step(self, heads: int) -> StepArguments:
        """The kernel's arguments that all layers share, made at the first layer."""
        if self._step is None:
            self._step = _step_arguments(self, heads)
        return self._step[0]

    def varlen_plan(self) -> VarlenPlan:
        """The same for `varlen_attn`."""
        if self._varlen is None:
            table = np.ascontiguousarray(self.table[[segment.row for segment in self.segments]])
            pasts, counts = [s.past for s in self.segments], [s.count for s in self.segments]
            self._varlen = VarlenPlan.of(self.cache, table, pasts, counts)
        return self._varlen

    def torch_plan(self) -> _TorchPlan:
        """The same for torch's path. Raises RuntimeError for a fixed plan, which says nothing of its sequences."""
        if not self.segments:
            raise RuntimeError("this attention gathers KV by sequence, which cannot be captured")
        if self._torch is None:
            self._torch = _TorchPlan.of(self)
        return self._torch


class TracedPlan:
    """Stands in for a plan while the forward pass is recorded: attention becomes one operator of the trace."""


# Not an argument of the forward pass, because some architectures do not hand on what they do not know.
_current: ContextVar[AttentionPlan | TracedPlan] = ContextVar("plan")


@contextmanager
def planned(plan: AttentionPlan | TracedPlan) -> Iterator[None]:
    """Within, `attend` follows this plan."""
    token = _current.set(plan)
    try:
        yield
    finally:
        _current.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: query [1, heads, N, D], key and value [1, KV heads, N, D].

    Returns [1, N, heads, D]. The plan brings masks, so `attention_mask` is not read; that nothing else that an
    architecture gives is needed, `survey` has seen to.
    """
    plan = _current.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    given = (query, key, value, layer, float(scaling), float(softcap or 0.0), sliding_window or 0)
    if isinstance(plan, TracedPlan):
        return operators.attend(*given), None
    return attend_planned(plan, *given), None


def attend_planned(
    plan: AttentionPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scaling: float,
    softcap: float,
    window: int,
) -> Tensor:
    """The same where `softcap` and `window` are 0 if there is none."""
    plan.calls += 1
    cache, kernels = plan.cache, plan.kernels
    query, key, value = query[0], key[0], value[0]
    if plan.varlen is not None and not softcap:
        planned = plan.varlen_plan()
        return varlen.attend(plan.varlen, cache, planned, layer, query, key, value, scaling, window)[None]
    if kernels is None:
        return _attend_torch(plan, layer, query, key, value, scaling, window or None, softcap or None)[None]
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    step = plan.step(query.shape[0])
    keys, values = cache.layer_keys[layer], cache.layer_values[layer]
    return kernels.attend(step, query, key, value, keys, values, scaling, softcap, window)[None]


def _step_arguments(plan: AttentionPlan, heads: int) -> tuple[StepArguments, list[IntArray]]:
    """Items of at most TILE_ROWS queries. Rows that share a prompt should stand beside each other in the plan: for each
    KV head their items follow one another, so that the shared keys are read from the processor's cache."""
    kv_heads = plan.cache.shape.kv_heads
    group = heads // kv_heads
    pieces = [(first, min(TILE_ROWS, group - first)) for first in range(0, group, TILE_ROWS)]
    positions = np.concatenate([np.arange(s.past, s.past + s.count, dtype=np.int32) for s in plan.segments])
    rows = np.repeat(
        np.array([s.row for s in plan.segments], dtype=np.int32), [segment.count for segment in plan.segments]
    )
    tile = max(1, TILE_ROWS // group)
    tiles = [
        (begin, min(tile, segment.begin + segment.count - begin))
        for segment in plan.segments
        for begin in range(segment.begin, segment.begin + segment.count, tile)
    ]
    shared: list[list[tuple[int, int]]] = []
    before = -1
    for begin, count in tiles:
        first_block = int(plan.table[rows[begin], 0])
        if not shared or first_block != before:
            shared.append([])
        before = first_block
        shared[-1].append((begin, count))
    items = np.array(
        [
            (begin, count, head, head * group + first, size)
            for run in shared
            for head in range(kv_heads)
            for begin, count in run
            for first, size in pieces
        ],
        dtype=np.int32,
    )
    table = np.ascontiguousarray(plan.table)
    arguments = StepArguments(
        tokens=len(positions),
        items=len(items),
        kv_heads=kv_heads,
        dim=plan.cache.shape.head_dim,
        padded_dim=plan.cache.shape.padded_dim,
        table_stride=table.shape[1],
        item=items.ctypes.data,
        row=rows.ctypes.data,
        position=positions.ctypes.data,
        table=table.ctypes.data,
    )
    return arguments, [items, rows, positions, table]  # whoever holds the arguments must keep these


@dataclass(slots=True)
class _TorchPlan:
    """Single-token segments attend in one batched call; every other one on its own."""

    blocks: Tensor
    offsets: Tensor
    single: Tensor
    single_tables: Tensor
    single_positions: Tensor
    longer: list[tuple[Segment, Tensor]]

    @classmethod
    def of(cls, plan: AttentionPlan) -> _TorchPlan:
        device = plan.cache.shape.device
        table = torch.from_numpy(plan.table).to(device)
        single = [segment for segment in plan.segments if segment.count == 1]
        longer = [segment for segment in plan.segments if segment.count > 1]
        size = plan.cache.shape.block_tokens
        blocks, offsets = [], []
        for segment in plan.segments:
            for position in range(segment.past, segment.past + segment.count):
                blocks.append(int(plan.table[segment.row, position // size]))
                offsets.append(position % size)
        longest = max((segment.past for segment in single), default=-1) + 1
        count = -(-longest // size)
        return cls(
            blocks=torch.tensor(blocks, device=device),
            offsets=torch.tensor(offsets, device=device),
            single=torch.tensor([segment.begin for segment in single], dtype=torch.long, device=device),
            single_tables=table[[segment.row for segment in single], :count],
            single_positions=torch.tensor([segment.past for segment in single], device=device),
            longer=[
                (segment, table[segment.row : segment.row + 1, : -(-(segment.past + segment.count) // size)])
                for segment in longer
            ],
        )


def _attend_torch(
    plan: AttentionPlan,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Query [heads, N, D], key and value [KV heads, N, D]; returns [N, heads, D]."""
    cache, layout = plan.cache, plan.torch_plan()
    cache.write(layer, layout.blocks, layout.offsets, key, value)
    output = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
    if len(layout.single):
        longest = int(layout.single_positions.max()) + 1
        keys, values = cache.read(layer, layout.single_tables, longest)
        mask = _visible(layout.single_positions[:, None], longest, window)
        mixed = _dot_product(query[:, layout.single].permute(1, 0, 2)[:, :, None], keys, values, mask, scaling, softcap)
        output[layout.single] = mixed[:, :, 0]
    for segment, tables in layout.longer:
        span = slice(segment.begin, segment.begin + segment.count)
        longest = segment.past + segment.count
        keys, values = cache.read(layer, tables, longest)
        mask = _visible(torch.arange(segment.past, longest, device=query.device)[None], longest, window)
        mixed = _dot_product(query[None, :, span], keys, values, mask, scaling, softcap)
        output[span] = mixed[0].transpose(0, 1)
    return output


def _visible(own: Tensor, longest: int, window: int | None) -> Tensor:
    """Bool [B, 1, T, longest]: the positions that tokens at positions `own` [B, T] see."""
    positions = torch.arange(longest, device=own.device)
    mask = positions <= own[..., None]
    if window is not None:
        mask &= positions > own[..., None] - window
    return mask[:, None]


def _dot_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """Query [B, heads, T, D], key [B, KV heads, D, S], value [B, KV heads, S, D]; returns [B, heads, T, D]."""
    batch, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * tokens, dim)
    scores = (grouped @ key * scaling).view(batch, kv_heads, heads // kv_heads, tokens, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    # A mask hides what a freed block holds, but not NaN, because 0 times NaN is NaN.
    seen = mask[:, 0].any(dim=1)
    value = value.masked_fill(~seen[:, None, :, None], 0)
    mixed: Tensor = weights.flatten(2, 3) @ value
    return mixed.view(batch, heads, tokens, dim)


def register() -> None:
    """Make `NAME` known to transformers as an attention implementation. Doing it twice changes nothing."""
    AttentionInterface.register(NAME, attend)
