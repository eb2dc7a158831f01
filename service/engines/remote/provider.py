"""What an engine asks its provider through: one call, however many attempts and addresses it takes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from yarl import URL

from service.engines.base import EngineStats
from service.engines.deadlines import left_s, sooner
from service.engines.errors import DeadlineExceeded, EngineUnavailable
from service.engines.remote.connection import Connection, Events, Reply
from service.engines.remote.failures import AttemptFailed
from service.engines.remote.limits import ConcurrencyLimit
from service.engines.remote.options import TransportOptions
from service.engines.remote.replicas import Replica, Replicas, ReplicaState

Answer = TypeVar("Answer")
Ask = Callable[[URL, bytes, float | None], Awaitable[Answer]]
Body = bytes | Callable[[], Awaitable[bytes]]
"""JSON, or what makes it once the request has its turn: large bodies would take memory while they wait."""


class Provider:
    """Paths begin with a slash and may have a query; they are put behind the address. Bodies are JSON.

    `affinity` names what requests have in common that an address may have warm, a soft prompt's digest for one; it
    matters where there are several addresses. `deadline_s` is the time a call may take in all, from now on.
    `another_follows` as in GenerationRequest.

    Every call raises, of `service.engines.errors`: a ProviderError, DeadlineExceeded, QueueFull, CircuitOpen or
    EngineUnavailable. `clock` and `draw` (a number in [0, 1)) are there for tests.
    """

    def __init__(
        self,
        options: TransportOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._options = options
        self._clock = clock
        self._draw = draw
        self._connection = Connection(options)
        self._limit = ConcurrencyLimit(options.concurrency, options.max_waiting, clock)
        self._replicas = Replicas(options.urls, options.breaker, clock)
        self._watch: asyncio.Task[None] | None = None
        self._started = False
        self._retries = 0
        self._failures = 0

    async def start(self) -> None:
        """Raises BackendError for options that prove wrong; no provider is asked anything yet."""
        await self._connection.start()
        self._started = True
        if self._options.health_path and len(self._replicas.all) > 1:
            self._watch = asyncio.create_task(self._watch_health())

    async def close(self) -> None:
        """Hang up on whatever is in flight."""
        self._started = False
        if self._watch is not None:
            watch, self._watch = self._watch, None
            watch.cancel()
            await asyncio.wait((watch,))
        await self._connection.close()

    async def post(
        self,
        path: str,
        body: Body,
        *,
        affinity: str = "",
        deadline_s: float | None = None,
        another_follows: bool = False,
    ) -> Reply:
        """The whole answer to `body`."""
        return await self._whole(self._connection.post_json, path, body, affinity, deadline_s, another_follows)

    async def get(self, path: str, *, deadline_s: float | None = None) -> Reply:
        """The whole answer to a GET."""

        def ask(url: URL, _: bytes, left_s: float | None) -> Awaitable[Reply]:
            return self._connection.get_json(url, left_s)

        return await self._whole(ask, path, b"", "", deadline_s, another_follows=False)

    @asynccontextmanager
    async def events(
        self,
        path: str,
        body: Body,
        *,
        affinity: str = "",
        deadline_s: float | None = None,
        begin_s: float | None = None,
        another_follows: bool = False,
    ) -> AsyncIterator[Events]:
        """The stream that answers `body`; leaving it early hangs up. It is entered once its first event has come.

        That takes no longer than `begin_s`. Nothing is tried again after it: what goes wrong later is raised where the
        stream is read.
        """
        ends_at = self._ends_at(deadline_s)
        begins_at = self._ends_at(sooner(deadline_s, begin_s))

        def ask(url: URL, content: bytes, begin_s: float | None) -> Awaitable[Events]:
            return self._connection.post_events(url, content, left_s(ends_at, self._clock), begin_s)

        await self._limit.enter(begins_at)
        try:
            content = await _made(body)
            events, replica, ticket = await self._answer(ask, path, content, affinity, begins_at, another_follows)
            try:
                yield events
            finally:
                replica.running -= 1
                events.close()
                if events.failure is not None:
                    self._failures += 1
                    if events.failure.verdict == "failed":
                        replica.breaker.failed(ticket)
        finally:
            self._limit.leave()

    def replicas(self) -> tuple[ReplicaState, ...]:
        """How each address fares."""
        return self._replicas.states()

    def drain(self, url: str) -> None:
        """Send nothing new to an address; what runs there ends by itself. Raises KeyError for one that is not there."""
        self._replicas.drain(url)

    def undrain(self, url: str) -> None:
        """Send to an address again. Raises KeyError for one that is not there."""
        self._replicas.undrain(url)

    def stats(self) -> EngineStats:
        return EngineStats(
            ready=self._started,
            waiting=self._limit.waiting,
            running=self._limit.running,
            breaker=self._replicas.breaker_state(),
            retries=self._retries,
            failures=self._failures,
            replicas=len(self._replicas.all),
            replicas_healthy=self._replicas.healthy(),
        )

    async def check_health(self) -> None:
        """Ask every address once whether it is well, and mark it so."""
        await asyncio.gather(*(self._check(replica) for replica in self._replicas.all))

    async def _whole(
        self,
        ask: Ask[Reply],
        path: str,
        body: Body,
        affinity: str,
        deadline_s: float | None,
        another_follows: bool,
    ) -> Reply:
        ends_at = self._ends_at(deadline_s)
        await self._limit.enter(ends_at)
        try:
            reply, replica, _ = await self._answer(ask, path, await _made(body), affinity, ends_at, another_follows)
            replica.running -= 1
            return reply
        finally:
            self._limit.leave()

    async def _answer(
        self,
        ask: Ask[Answer],
        path: str,
        content: bytes,
        affinity: str,
        ends_at: float | None,
        another_follows: bool,
    ) -> tuple[Answer, Replica, int]:
        """Attempts until one succeeds. The replica counts it as running until the caller takes that back."""
        made, forgiven = 0, False
        avoid: Replica | None = None
        failed: AttemptFailed | None = None
        while True:
            if not self._started:
                raise EngineUnavailable("the backend is starting or stopping; send the request again in a moment")
            try:
                replica = self._replicas.choose(affinity, avoid)
                ticket = replica.breaker.admit()
            except EngineUnavailable:
                if failed is None:
                    raise
                raise failed.error from None  # it says more than that nothing else can be asked
            replica.running += 1
            begun_at = self._clock()
            try:
                answer = await ask(replica.target(path), content, left_s(ends_at, self._clock))
            except AttemptFailed as caught:
                replica.running -= 1
                self._judge(replica, ticket, caught, self._clock() - begun_at)
                failed = caught
            except BaseException:
                replica.running -= 1
                replica.breaker.abandoned(ticket)
                raise
            else:
                replica.breaker.succeeded(ticket)
                return answer, replica, ticket
            if failed.stale and not forgiven:
                forgiven = True
                self._retries += 1
                continue
            made += 1
            avoid = replica
            wait_s = self._wait_s(made, failed, replica, ends_at, another_follows)
            if wait_s is None:
                raise failed.error
            self._retries += 1
            if wait_s:
                await asyncio.sleep(wait_s)

    def _wait_s(
        self, made: int, failed: AttemptFailed, replica: Replica, ends_at: float | None, another_follows: bool
    ) -> float | None:
        """Seconds until the next attempt, None for no other."""
        if not (failed.again and self._replicas.admits):
            return None
        return self._options.retries.wait_s(
            made,
            self._draw,
            retry_after_s=failed.retry_after_s,
            left_s=None if ends_at is None else ends_at - self._clock(),
            elsewhere=failed.unreached and self._replicas.another(replica),
            another_follows=another_follows,
        )

    def _judge(self, replica: Replica, ticket: int, failed: AttemptFailed, lasted_s: float) -> None:
        self._failures += 1
        hurried = isinstance(failed.error, DeadlineExceeded) and lasted_s < self._options.patience_s
        if failed.stale or failed.verdict == "silent" or hurried:
            replica.breaker.abandoned(ticket)
        elif failed.verdict == "answered":
            replica.breaker.succeeded(ticket)
        else:
            replica.breaker.failed(ticket)
        if failed.unreached and len(self._replicas.all) > 1:
            self._replicas.mark(replica, down_for_s=2 * self._options.health_every_s)

    def _ends_at(self, deadline_s: float | None) -> float | None:
        return None if deadline_s is None else self._clock() + deadline_s

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(self._options.health_every_s)
            await self.check_health()

    async def _check(self, replica: Replica) -> None:
        every_s = self._options.health_every_s
        try:
            await self._connection.look(replica.health(self._options.health_path), left_s=every_s)
        except AttemptFailed:
            self._replicas.mark(replica, down_for_s=3 * every_s)
        else:
            self._replicas.mark(replica, down_for_s=0.0)


async def _made(body: Body) -> bytes:
    return body if isinstance(body, bytes) else await body()
