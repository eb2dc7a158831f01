"""`torch.nn.attention.varlen.varlen_attn` in plain torch, for machines without CUDA: the same signature and meaning.

Refuses what FlashAttention 2 refuses of shapes and dtypes of the tables, and what we must never ask for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ReferenceVarlen:
    """Called as `varlen_attn` is, over pages. `calls` counts."""

    calls: int = 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
        seqused_k: Tensor,
        block_table: Tensor,
        num_splits: int,
    ) -> Tensor:
        """Query [N, heads, D], key and value [pages, page size, KV heads, D]; returns [N, heads, D]."""
        self.calls += 1
        sequences, heads, (_, page_size, kv_heads, _) = len(seqused_k), query.shape[1], key.shape
        assert num_splits == 1, "split-KV leaves rows unwritten"
        assert enable_gqa == (heads != kv_heads)
        for table in (cu_seq_q, cu_seq_k, seqused_k, block_table):
            assert table.dtype == torch.int32
            assert table.is_contiguous()
        assert cu_seq_q.shape == cu_seq_k.shape == (sequences + 1,)
        assert block_table.shape[0] == sequences
        assert value.shape == key.shape
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        assert cu_seq_k.diff().tolist() == seqused_k.tolist()
        counts, lengths = cu_seq_q.diff().tolist(), seqused_k.tolist()
        assert max(counts) <= max_q
        assert max(lengths) <= max_k <= block_table.shape[1] * page_size
        left, right = window_size
        if max_q == 1 and window_size == (-1, -1):
            assert len(query) == sequences, "the kernel regroups heads and wants a query of each sequence"
        output = torch.empty_like(query)
        for row, (begin, count, length) in enumerate(zip(cu_seq_q.tolist(), counts, lengths, strict=False)):
            pages = block_table[row, : -(-length // page_size)].long()
            keys, values = (
                pool[pages].flatten(0, 1)[:length].repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1)
                for pool in (key, value)
            )
            own = torch.arange(length - count, length)[:, None]  # the last queries stand at the last keys
            places = torch.arange(length)
            hidden = torch.zeros(count, length, dtype=torch.bool)
            if left >= 0:
                hidden |= places < own - left
            if right >= 0:
                hidden |= places > own + right
            queries = query[begin : begin + count].transpose(0, 1)
            scores = (queries.float() @ keys.float().transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
            output[begin : begin + count] = (scores.softmax(-1) @ values.float()).to(query.dtype).transpose(0, 1)
        return output
