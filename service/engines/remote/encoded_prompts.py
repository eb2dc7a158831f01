"""Soft prompts as vLLM is sent them: read once, kept within a bound, those that are warm longest."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.base import SoftPromptReference
from service.engines.base_model import BaseModel
from service.engines.errors import GenerationFailed, UnsupportedFeature
from service.engines.remote.embeddings import WireType, encode_prompt


class EncodedPrompts:
    """Rows by the soft prompt's digest, in `wire_type`; all together take `limit_bytes` or little more."""

    def __init__(self, base: BaseModel, wire_type: WireType, limit_bytes: int) -> None:
        self._base = base
        self._wire_type = wire_type
        self._limit_bytes = limit_bytes
        self._rows: OrderedDict[str, bytes] = OrderedDict()
        self._loading: dict[str, asyncio.Task[bytes]] = {}
        self._pinned: set[str] = set()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    async def rows(self, soft_prompt: SoftPromptReference) -> bytes:
        """The soft prompt's rows, from memory if they are there.

        Raises what loading it raised, UnsupportedFeature for a prefix, and GenerationFailed for one of another width.
        """
        digest = soft_prompt.digest
        known = self._rows.get(digest)
        if known is not None:
            self._rows.move_to_end(digest)
            return known
        loading = self._loading.get(digest)
        if loading is None:
            loading = self._loading[digest] = asyncio.create_task(self._load(soft_prompt))
            loading.add_done_callback(_seen)
        return await asyncio.shield(loading)  # whoever asked first may leave, others still wait

    async def pin(self, soft_prompt: SoftPromptReference) -> None:
        """Have the rows in memory now, and let others go before them. Raises as `rows`."""
        self._pinned.add(soft_prompt.digest)
        try:
            await self.rows(soft_prompt)
        except Exception:
            self._pinned.discard(soft_prompt.digest)
            raise

    def release(self, digest: str) -> None:
        """Let a soft prompt go."""
        self._pinned.discard(digest)
        self._drop(digest)

    async def _load(self, soft_prompt: SoftPromptReference) -> bytes:
        try:
            rows = await asyncio.to_thread(self._read, soft_prompt)
        finally:
            del self._loading[soft_prompt.digest]
        self._rows[soft_prompt.digest] = rows
        self.size_bytes += len(rows)
        self._make_room()
        return rows

    def _read(self, soft_prompt: SoftPromptReference) -> bytes:
        prompt = soft_prompt.load()
        if not isinstance(prompt, SoftPrompt):
            raise UnsupportedFeature(
                "this task's backend is vLLM, which takes soft prompts and no prefixes; route the version to the local "
                "engine",
                parameter="model",
            )
        if prompt.hidden_size != self._base.hidden_size:
            raise GenerationFailed(
                f"soft prompt has H={prompt.hidden_size} but base model '{self._base.name}' has "
                f"H={self._base.hidden_size}; retrain it on this base"
            )
        return encode_prompt(prompt, self._wire_type)

    def _make_room(self) -> None:
        """Drop what was used longest ago, the pinned last; the one that was used just now stays in any case."""
        *older, _ = self._rows
        for digest in sorted(older, key=self._pinned.__contains__):
            if self.size_bytes <= self._limit_bytes:
                return
            self._drop(digest)

    def _drop(self, digest: str) -> None:
        if digest in self._rows:
            self.size_bytes -= len(self._rows.pop(digest))


def _seen(loading: asyncio.Task[bytes]) -> None:
    """Take note of an error, which nobody may wait for any more."""
    if not loading.cancelled():
        loading.exception()
