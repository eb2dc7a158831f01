"""Which soft prompts the engine knows: brought once for all who wait, pinned while asked for, the oldest let go."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from service.engines.base import SoftPromptReference
from service.engines.errors import EngineUnavailable, GenerationFailed
from service.engines.local.messages import Command, Register, Release

log = logging.getLogger(__name__)

_MOST_KNOWN = 16_384


class KnownPrompts:
    """What one engine has been told; `send` queues a command for it and says whether it could.

    Pins outlive the engine, the rest does not. A future in `_known` stays there until it is settled, so that whoever
    waits for it is always answered.
    """

    def __init__(self, send: Callable[[Command], bool]) -> None:
        self._send = send
        self._known: OrderedDict[str, asyncio.Future[None]] = OrderedDict()
        self._pinned: dict[str, SoftPromptReference] = {}
        self._unwanted: set[str] = set()
        self._background: set[asyncio.Task[None]] = set()

    async def ensure(self, soft_prompt: SoftPromptReference) -> None:
        """Return once the engine knows a soft prompt. Raises what loading it raised, or GenerationFailed."""
        while not self._has(soft_prompt.digest):
            await self._bring_once(soft_prompt, pinned=soft_prompt.digest in self._pinned)

    async def pin(self, soft_prompt: SoftPromptReference) -> None:
        """Have a soft prompt's KV computed now and kept. Raises as `ensure`; it stays pinned if the engine is lost."""
        digest = soft_prompt.digest
        self._pinned[digest] = soft_prompt
        self._unwanted.discard(digest)
        while (pending := self._known.get(digest)) is not None and not pending.done():
            await asyncio.wait([pending])
        self._known.pop(digest, None)
        try:
            await self._bring_once(soft_prompt, pinned=True)
        except EngineUnavailable:
            raise
        except BaseException:
            self._pinned.pop(digest, None)
            raise

    def release(self, digest: str) -> None:
        """Let a soft prompt go; one that is on its way, as soon as it has arrived."""
        self._pinned.pop(digest, None)
        known = self._known.get(digest)
        if known is None:
            return
        if known.done():
            del self._known[digest]
            self._send(Release(digest))
        else:
            self._unwanted.add(digest)

    def registered(self, digest: str, error: str | None) -> None:
        """The engine's answer to a Register."""
        known = self._known.get(digest)
        if known is not None:
            self._settle(digest, known, GenerationFailed(error) if error is not None else None)
        if digest in self._unwanted:
            self._unwanted.discard(digest)
            self.release(digest)

    def engine_started(self) -> None:
        """Another engine is ready: pin there what was pinned before."""
        for soft_prompt in list(self._pinned.values()):
            self._in_background(self._pin_again(soft_prompt))

    def engine_lost(self) -> None:
        """Everything the engine knew is gone; whoever waits for it is told so."""
        for digest, known in list(self._known.items()):
            self._settle(digest, known, EngineUnavailable("the engine was lost; send the request again"))
        self._known.clear()
        self._unwanted.clear()

    def _has(self, digest: str) -> bool:
        known = self._known.get(digest)
        if known is None or not known.done() or known.exception() is not None:
            return False
        self._known.move_to_end(digest)
        return True

    async def _bring_once(self, soft_prompt: SoftPromptReference, *, pinned: bool) -> None:
        known = self._known.get(soft_prompt.digest)
        if known is None:
            known = self._known[soft_prompt.digest] = asyncio.get_running_loop().create_future()
            self._in_background(self._bring(soft_prompt, known, pinned=pinned))
        await asyncio.shield(known)

    async def _bring(self, soft_prompt: SoftPromptReference, known: asyncio.Future[None], *, pinned: bool) -> None:
        """Load and send. A task of its own: whoever asked first may leave, others still wait."""
        try:
            prompt = await asyncio.to_thread(soft_prompt.load)
        except Exception as error:  # whatever loading raises is the answer to all who wait
            self._settle(soft_prompt.digest, known, error)
            return
        if known.done():
            return
        if self._send(Register(soft_prompt.digest, prompt.dtype, prompt.shape, prompt.data, pinned)):
            self._release_oldest()
        else:
            self._settle(soft_prompt.digest, known, EngineUnavailable("the engine was lost; send the request again"))

    async def _pin_again(self, soft_prompt: SoftPromptReference) -> None:
        try:
            await self._bring_once(soft_prompt, pinned=True)
        except Exception:  # nobody waits for this task: the log is the only one to tell
            log.exception("soft prompt %s could not be warmed after a restart", soft_prompt.digest[:12])

    def _settle(self, digest: str, known: asyncio.Future[None], error: Exception | None) -> None:
        if error is not None and self._known.get(digest) is known:
            del self._known[digest]
        if known.done():
            return
        if error is None:
            known.set_result(None)
        else:
            known.set_exception(error)
            known.exception()  # marks it as seen: maybe nobody waits

    def _release_oldest(self) -> None:
        spare = [digest for digest, known in self._known.items() if digest not in self._pinned and known.done()]
        for digest in spare[: max(0, len(self._known) - _MOST_KNOWN)]:
            del self._known[digest]
            self._send(Release(digest))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
