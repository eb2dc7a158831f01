"""Attention over paged KV by torch's `varlen_attn`: what a CUDA machine runs in float16 or bfloat16.

torch ships FlashAttention 2 behind it, whose rules are those of `mha_varlen_fwd` in pytorch's flash_api.cpp: pages of a
multiple of 256 positions, a head dimension of at most 256 that is a multiple of 8, an Ampere GPU or newer, int32
tables, and lengths given twice (`cu_seq_k` beside `seqused_k`). Its causal mask aligns queries with the end of the
keys. It knows no soft-capping; whoever needs that gathers from the same pages by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from service.engines.local.kv_cache import KVCache

PAGE_TOKENS = 256
_MOST_HEAD_DIM, _HEAD_DIM_MULTIPLE = 256, 8
_LEAST_CAPABILITY = (8, 0)

VarlenAttention = Callable[..., Tensor]  # torch.nn.attention.varlen.varlen_attn, or what computes the same


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """One forward pass's layout as `varlen_attn` takes it: N tokens of R sequences, on the cache's device.

    `pages` and `offsets` [N] int64 are the tokens' own places. Of each sequence, `starts` [R + 1] says where its tokens
    begin, `lengths` [R] how many positions it has with them, `ends` [R + 1] is their running sum, and `table`
    [R, pages] names its pages, all int32. Nothing is longer than `longest_query` and `longest_key`.
    """

    pages: Tensor
    offsets: Tensor
    starts: Tensor
    ends: Tensor
    lengths: Tensor
    table: Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(
        cls, cache: KVCache, table: npt.NDArray[np.int32], pasts: Sequence[int], counts: Sequence[int]
    ) -> VarlenPlan:
        """The plan for rows of `table` whose tokens follow one another: `counts` of them from position `pasts` on."""
        past, count = np.array(pasts, dtype=np.int32), np.array(counts, dtype=np.int32)
        starts, lengths = _running_sum(count), past + count
        row = np.repeat(np.arange(len(count)), count)
        position = np.arange(starts[-1]) - starts[row] + past[row]
        size, device = cache.shape.block_tokens, cache.shape.device
        return cls(
            pages=torch.from_numpy(table[row, position // size].astype(np.int64)).to(device),
            offsets=torch.from_numpy(position.astype(np.int64) % size).to(device),
            starts=torch.from_numpy(starts).to(device),
            ends=torch.from_numpy(_running_sum(lengths)).to(device),
            lengths=torch.from_numpy(lengths).to(device),
            table=torch.from_numpy(table).to(device),
            longest_query=int(count.max()),
            longest_key=int(lengths.max()),
        )


def fits_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `varlen_attn` can serve this KV."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim <= _MOST_HEAD_DIM
        and head_dim % _HEAD_DIM_MULTIPLE == 0
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )


def varlen_for(cache: KVCache) -> VarlenAttention | None:
    """What computes attention over this cache's pages, if it has any."""
    return cast(VarlenAttention, varlen_attn) if cache.shape.layout == "pages" else None


def attend(
    varlen: VarlenAttention,
    cache: KVCache,
    plan: VarlenPlan,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int,
) -> Tensor:
    """Query [heads, N, D], key and value [KV heads, N, D]; returns [N, heads, D]. `window` is 0 if there is none."""
    cache.write(layer, plan.pages, plan.offsets, key, value)
    # A single query is the last position, so it may see all there is: said this way, the kernel shares keys among the
    # query heads of a group.
    seen = (window - 1, 0) if window else (-1, -1) if plan.longest_query == 1 else (-1, 0)
    output = varlen(
        query.transpose(0, 1),
        cache.layer_keys[layer],
        cache.layer_values[layer],
        plan.starts,
        plan.ends,
        plan.longest_query,
        plan.longest_key,
        scale=scaling,
        window_size=seen,
        enable_gqa=query.shape[0] != key.shape[0],
        seqused_k=plan.lengths,
        block_table=plan.table,
        num_splits=1,  # more of them leave rows unwritten: pytorch issue 194167
    )
    return output.contiguous()  # a recorded program relies on it


def _running_sum(counts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """[0, c0, c0 + c1, ...]."""
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
