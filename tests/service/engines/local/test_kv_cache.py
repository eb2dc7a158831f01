from __future__ import annotations

import torch
from torch import Tensor

from service.engines.local.kv_cache import Prefix, PrefixStore


class Computing:
    """Stands for the model: keeps count of what it computed; each prefix is 2 * 4 * P bytes."""

    def __init__(self) -> None:
        self.computed: list[int] = []

    def __call__(self, embeddings: Tensor) -> Prefix:
        length = embeddings.shape[0]
        self.computed.append(length)
        return Prefix((torch.zeros(1, length, 1),), (torch.zeros(1, length, 1),))


def test_a_prefix_is_computed_once_and_pinned_ones_at_once() -> None:
    compute = Computing()
    store = PrefixStore(compute, budget_bytes=1000)
    store.register("lazy", torch.zeros(2, 4), pinned=False)
    assert compute.computed == []
    store.register("pinned", torch.zeros(3, 4), pinned=True)
    assert compute.computed == [3]
    for _ in range(3):
        store.prefix("lazy")
        store.prefix("pinned")
    assert compute.computed == [3, 2]
    assert store.size_bytes == 8 * 5


def test_over_the_budget_the_least_recently_used_prefix_goes_and_pinned_ones_stay() -> None:
    compute = Computing()
    store = PrefixStore(compute, budget_bytes=8 * 30)
    store.register("pinned", torch.zeros(10, 4), pinned=True)
    for name in ("a", "b", "c"):
        store.register(name, torch.zeros(10, 4), pinned=False)
    store.prefix("a")
    store.prefix("b")
    store.prefix("a")
    store.prefix("c")
    assert store.size_bytes == 8 * 30
    compute.computed.clear()
    store.prefix("a")
    store.prefix("pinned")
    assert compute.computed == []
    store.prefix("b")
    assert compute.computed == [10]


def test_pinned_prefixes_too_stay_within_the_budget() -> None:
    compute = Computing()
    store = PrefixStore(compute, budget_bytes=8 * 20)
    for name in ("a", "b", "c"):
        store.register(name, torch.zeros(10, 4), pinned=True)
    assert store.size_bytes == 8 * 20
    assert store.prefix("a").length == 10
    assert (len(compute.computed), store.size_bytes) == (4, 8 * 20)


def test_a_released_prompt_is_forgotten() -> None:
    store = PrefixStore(Computing(), budget_bytes=1000)
    store.register("a", torch.zeros(2, 4), pinned=True)
    store.release("a")
    assert (store.knows("a"), len(store), store.size_bytes) == (False, 0, 0)
