"""Where keys and values lie: blocks of positions, laid out for whoever computes attention over them."""

from __future__ import annotations

import contextlib
import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from service.engines.local.blocks import BLOCK_TOKENS

_DIM_MULTIPLE = 16

Layout = Literal["turned", "pages"]


@dataclass(frozen=True, slots=True)
class KVShape:
    """The sizes of one model's KV, and how it is cut into blocks."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    layout: Layout = "turned"
    block_tokens: int = BLOCK_TOKENS

    @property
    def padded_dim(self) -> int:
        """The head dimension as it is stored."""
        return -(-self.head_dim // _DIM_MULTIPLE) * _DIM_MULTIPLE if self.layout == "turned" else self.head_dim

    @property
    def scrap_blocks(self) -> int:
        """Blocks that are nobody's: captured steps write there what their idle rows compute."""
        return 1 if self.layout == "pages" else 0

    @property
    def block_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.padded_dim * self.block_tokens * self.dtype.itemsize


class KVCache(ABC):
    """Keys and values of every layer, [L, blocks, ...] each; the subclasses say how a block is laid out."""

    def __init__(self, shape: KVShape, blocks: int) -> None:
        self.shape = shape
        self.blocks = blocks
        key, value = self._block_sizes()
        self.keys = _zeros((shape.layers, blocks, *key), shape)
        self.values = _zeros((shape.layers, blocks, *value), shape)
        # One view a layer, made once: indexing costs as much as a small product.
        self.layer_keys = list(self.keys.unbind(0))
        self.layer_values = list(self.values.unbind(0))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each: all or, where there is no memory for it, none."""
        if pairs:
            sources, targets = (torch.tensor(side, device=self.shape.device) for side in zip(*pairs, strict=True))
            keys, values = self.keys.index_select(1, sources), self.values.index_select(1, sources)
            self.keys.index_copy_(1, targets, keys)
            self.values.index_copy_(1, targets, values)

    @abstractmethod
    def write(self, layer: int, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value [KV heads, N, D] at N places, by block and offset in it."""

    @abstractmethod
    def read(self, layer: int, tables: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Keys [B, KV heads, D, longest] and values [B, KV heads, longest, D] of the rows of `tables` [B, blocks]."""

    @abstractmethod
    def _block_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of one block's keys and values in one layer."""


class TurnedCache(KVCache):
    """For the CPU's kernels: keys [KV heads, D, 16], so that one load reads 16 positions of a dimension, and values
    [KV heads, 16, D], D padded to a multiple of 16."""

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        dim = self.shape.head_dim
        self.layer_keys[layer][blocks, :, :dim, offsets] = key.transpose(0, 1)
        self.layer_values[layer][blocks, :, offsets, :dim] = value.transpose(0, 1)

    def read(self, layer: int, tables: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        dim = self.shape.head_dim
        keys = self.layer_keys[layer][tables]
        values = self.layer_values[layer][tables]
        keys = keys.permute(0, 2, 3, 1, 4).flatten(3)
        values = values.permute(0, 2, 1, 3, 4).flatten(2, 3)
        return keys[:, :, :dim, :longest], values[:, :, :longest, :dim]

    def _block_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape = self.shape
        return (
            (shape.kv_heads, shape.padded_dim, shape.block_tokens),
            (shape.kv_heads, shape.block_tokens, shape.padded_dim),
        )


class PagedCache(KVCache):
    """For `varlen_attn`: keys and values [page size, KV heads, D] alike."""

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        self.layer_keys[layer][blocks, offsets] = key.transpose(0, 1)
        self.layer_values[layer][blocks, offsets] = value.transpose(0, 1)

    def read(self, layer: int, tables: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        keys = self.layer_keys[layer][tables].flatten(1, 2)
        values = self.layer_values[layer][tables].flatten(1, 2)
        return keys[:, :longest].permute(0, 2, 3, 1), values[:, :longest].transpose(1, 2)

    def _block_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        size = (self.shape.block_tokens, self.shape.kv_heads, self.shape.head_dim)
        return size, size


def _zeros(size: tuple[int, ...], shape: KVShape) -> Tensor:
    """Zeros. On a CPU they take memory when they are first written, in large pages where the system has them."""
    if shape.device.type != "cpu":
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)
    memory = mmap.mmap(-1, math.prod(size) * shape.dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=shape.dtype).view(size)
