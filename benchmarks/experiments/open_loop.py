"""An open loop of requests: each is sent at its own moment, whether others were answered or not, and timed from then.

So a service that falls behind cannot make the load gentler. Over connections that are kept open, as
`benchmarks.gateway.load`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import cast

from benchmarks.gateway.load import NoAnswer, is_whole, without_garbage_collection

_CONNECTIONS = 128
_TIMEOUT_S = 30.0

FollowUp = Callable[[bytes], bytes]
"""What is sent, in a request of its own, once an answer came: made of that answer's bytes."""


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self, data: bytes, answered: Callable[[_Connection, bytes], None]) -> None:
        self._answered = answered
        self._received = bytearray()
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not is_whole(self._received):
            return
        if not self._received.startswith(b"HTTP/1.1 2"):
            shown = bytes(self._received[:1000]).decode("utf-8", "replace")
            self._failed(NoAnswer(f"this is no answer: {shown}"))
            return
        self._answered(self, bytes(self._received))

    def close(self) -> None:
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._failed(NoAnswer(f"the server closed the connection: {error}"))


class OpenLoop:
    """Requests at `rate` a second for `seconds`, at random moments that `seed` fixes: as those of many callers.

    Requests of the first `warm_up_s` are not timed. `follow_up` is posted for each answer, and not timed either.
    """

    def __init__(self, port: int, rate: float, seconds: float, *, warm_up_s: float = 1.0, seed: int = 1) -> None:
        self._port, self._seconds, self._warm_up_s = port, seconds, warm_up_s
        gaps = random.Random(seed)
        moments = itertools.accumulate(gaps.expovariate(rate) for _ in itertools.count())
        self._moments_s = list(itertools.takewhile(lambda moment_s: moment_s < warm_up_s + seconds, moments))

    def run(self, requests: Iterator[bytes], follow_up: FollowUp | None = None) -> list[float]:
        """Seconds from the moment that each request was due to the end of its answer. Raises NoAnswer."""
        # select() waits for microseconds where epoll and uvloop wait for whole milliseconds.
        with (
            without_garbage_collection(),
            asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner,
        ):
            return runner.run(self._running(requests, follow_up))

    async def _running(self, requests: Iterator[bytes], follow_up: FollowUp | None) -> list[float]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        taken_s: list[float] = []
        waiting = len(self._moments_s) * (1 if follow_up is None else 2)

        def failed(error: Exception) -> None:
            if not ended.done():
                ended.set_exception(error)

        def done(connection: _Connection) -> None:
            nonlocal waiting
            idle.append(connection)
            waiting -= 1
            if not waiting and not ended.done():
                ended.set_result(None)

        def send(data: bytes, answered: Callable[[_Connection, bytes], None]) -> None:
            if idle:
                idle.popleft().ask(data, answered)
            else:
                failed(NoAnswer(f"all {_CONNECTIONS} connections wait for answers: the service does not keep up"))

        def ask(due_s: float, *, timed: bool) -> None:
            def answered(connection: _Connection, answer: bytes) -> None:
                if timed:
                    taken_s.append(time.perf_counter() - due_s)
                done(connection)
                if follow_up is not None:
                    send(follow_up(answer), lambda connection, _: done(connection))

            send(next(requests), answered)

        opened = [
            (await loop.create_connection(lambda: _Connection(failed), "127.0.0.1", self._port))[1]
            for _ in range(_CONNECTIONS)
        ]
        idle = deque(opened)  # in turns: a server ends connections that idle for seconds
        try:
            async with asyncio.timeout(self._warm_up_s + self._seconds + _TIMEOUT_S):
                await _at_each(self._moments_s, self._warm_up_s, ask, ended)
                await ended
        finally:
            for one in opened:
                one.close()
        return taken_s


async def _at_each(
    moments_s: list[float], warm_up_s: float, ask: Callable[..., None], ended: asyncio.Future[None]
) -> None:
    """Ask at every moment, counted from now, until something failed."""
    began_s = time.perf_counter()
    for moment_s in moments_s:
        if (wait_s := began_s + moment_s - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        if ended.done():
            return
        ask(began_s + moment_s, timed=moment_s >= warm_up_s)
