from __future__ import annotations

import pytest
import torch

from service.engines.local.kv_cache import KVCache, KVShape, PagedCache, TurnedCache

CPU = torch.device("cpu")


def turned(dim: int) -> KVCache:
    return TurnedCache(KVShape(2, 3, dim, torch.float32, CPU), 6)


def paged(dim: int, page: int) -> KVCache:
    return PagedCache(KVShape(2, 3, dim, torch.float32, CPU, layout="pages", block_tokens=page), 6)


@pytest.mark.parametrize(
    "cache", [turned(8), turned(32), paged(8, 4), paged(32, 16)], ids=["turned-8", "turned-32", "paged-8", "paged-32"]
)
def test_what_is_written_is_read_at_its_place_in_either_layout(cache: KVCache) -> None:
    size, positions = cache.shape.block_tokens, torch.arange(2 * cache.shape.block_tokens + 3)
    table = torch.tensor([[4, 1, 2], [0, 3, 5]])
    key, value = (torch.randn(2, 3, len(positions), cache.shape.head_dim) for _ in range(2))
    for row in range(2):
        cache.write(1, table[row][positions // size], positions % size, key[row], value[row])
    keys, values = cache.read(1, table, len(positions))
    assert torch.equal(keys, key.transpose(2, 3))
    assert torch.equal(values, value)
    assert not cache.keys[0].any()


@pytest.mark.parametrize("cache", [turned(8), paged(8, 4)], ids=["turned", "paged"])
def test_copied_blocks_hold_what_their_sources_hold_in_every_layer(cache: KVCache) -> None:
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn_like(tensor))
    before = cache.keys.clone(), cache.values.clone()
    cache.copy([(1, 4), (2, 0)])
    for tensor, old in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(tensor[:, [4, 0]], old[:, [1, 2]])
        assert torch.equal(tensor[:, [1, 2, 3, 5]], old[:, [1, 2, 3, 5]])


def test_a_block_costs_what_its_tensors_take() -> None:
    for cache in (turned(8), paged(8, 4)):
        assert cache.shape.block_bytes * cache.blocks == cache.keys.nbytes + cache.values.nbytes
