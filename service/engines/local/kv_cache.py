"""Where keys and values live: one slot a running sequence, and the KV of soft prompts computed once.

Slots hold `[S, KV heads, context, D]` a layer; a soft prompt's KV is copied to the front of a slot when a sequence that
uses it is admitted. Prefixes are keyed by the soft prompt's digest, never by a name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVShape:
    """The sizes of one model's KV."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class SlotCache:
    """Keys and values of running sequences, `keys[layer]` and `values[layer]` of shape [S, KV heads, context, D]."""

    def __init__(self, shape: KVShape, slots: int, context_length: int) -> None:
        self.shape = shape
        self.slots = slots
        self.context_length = context_length
        size = (slots, shape.kv_heads, context_length, shape.head_dim)
        self.keys = [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.layers)]
        self.values = [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.layers)]

    def place_prefix(self, slot: int, prefix: Prefix) -> None:
        """Copy a soft prompt's KV to the first P positions of a slot."""
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            self.keys[layer][slot, :, : prefix.length] = keys
            self.values[layer][slot, :, : prefix.length] = values

    def clear(self, slot: int) -> None:
        """Zero a slot: a mask hides old values from attention, but not NaN, because 0 times NaN is NaN."""
        for layer in range(self.shape.layers):
            self.keys[layer][slot].zero_()
            self.values[layer][slot].zero_()


@dataclass(frozen=True, slots=True)
class Prefix:
    """A soft prompt's KV: a layer each of [KV heads, P, D]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        return int(self.keys[0].shape[1])

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


@dataclass(slots=True)
class PrefixStore:
    """The tensors of known soft prompts, and the KV of those in use, within a budget.

    Over the budget the least recently used goes, pinned ones after all others; it is computed again when it is used.

    `compute` turns a `[P, H]` tensor into a Prefix.
    """

    compute: Callable[[Tensor], Prefix]
    budget_bytes: int
    size_bytes: int = 0
    _embeddings: dict[str, Tensor] = field(default_factory=dict)
    _prefixes: OrderedDict[str, Prefix] = field(default_factory=OrderedDict)
    _pinned: set[str] = field(default_factory=set)

    def register(self, digest: str, embeddings: Tensor, *, pinned: bool) -> None:
        """Know a soft prompt of shape [P, H]; a pinned one has its KV computed now."""
        self._embeddings[digest] = embeddings
        if pinned:
            self._pinned.add(digest)
            self.prefix(digest)

    def release(self, digest: str) -> None:
        """Forget a soft prompt; a sequence that runs has its own copy of the KV."""
        self._pinned.discard(digest)
        self._embeddings.pop(digest, None)
        self._drop(digest)

    def knows(self, digest: str) -> bool:
        return digest in self._embeddings

    def length(self, digest: str) -> int:
        """Virtual tokens of a known soft prompt."""
        return int(self._embeddings[digest].shape[0])

    def prefix(self, digest: str) -> Prefix:
        """The KV of a known soft prompt, computed when it is not at hand."""
        prefix = self._prefixes.get(digest)
        if prefix is None:
            prefix = self.compute(self._embeddings[digest])
            self._prefixes[digest] = prefix
            self.size_bytes += prefix.size_bytes
            self._evict(keep=digest)
        self._prefixes.move_to_end(digest)
        return prefix

    def __len__(self) -> int:
        return len(self._prefixes)

    def _evict(self, keep: str) -> None:
        others = [digest for digest in self._prefixes if digest != keep]
        for digest in sorted(others, key=self._pinned.__contains__):  # stable: pinned ones go last
            if self.size_bytes <= self.budget_bytes:
                return
            self._drop(digest)

    def _drop(self, digest: str) -> None:
        prefix = self._prefixes.pop(digest, None)
        if prefix is not None:
            self.size_bytes -= prefix.size_bytes
