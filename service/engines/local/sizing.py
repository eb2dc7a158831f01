"""From the shape of a model's KV and a memory budget to the cache that fits both."""

from __future__ import annotations

from dataclasses import replace

import torch

from service.engines.base_model import BaseModel
from service.engines.errors import BaseModelError
from service.engines.local.blocks import blocks_for
from service.engines.local.kernels import MOST_HEAD_DIM
from service.engines.local.kv_cache import KVCache, KVShape, PagedCache, TurnedCache
from service.engines.local.varlen import PAGE_TOKENS, fits_varlen


def laid_out(shape: KVShape) -> KVShape:
    """The same KV in the layout of the quickest attention that can serve it."""
    if fits_varlen(shape.device, shape.dtype, shape.head_dim):
        return replace(shape, layout="pages", block_tokens=PAGE_TOKENS)
    return shape


def fits_kernels(shape: KVShape) -> bool:
    """Whether the compiled kernels can serve this KV."""
    return shape.device.type == "cpu" and shape.dtype == torch.float32 and shape.padded_dim <= MOST_HEAD_DIM


def cache_within(budget_bytes: int, shape: KVShape, base: BaseModel) -> KVCache:
    """An empty cache that fills a budget. Raises BaseModelError where not even one sequence of full length fits."""
    blocks = budget_bytes // shape.block_bytes
    # A soft prompt's last block is there twice, and a label's branch takes one more.
    fewest = blocks_for(base.context_length, shape.block_tokens) + 2 + shape.scrap_blocks
    if blocks < fewest:
        raise BaseModelError(
            f"one sequence of '{base.name}' needs {fewest * shape.block_bytes:,} bytes of KV but the budget is "
            f"{budget_bytes:,}; raise kv_memory_bytes"
        )
    return PagedCache(shape, blocks) if shape.layout == "pages" else TurnedCache(shape, blocks)
