"""A closed loop of requests whose answers are timed: a client of few microseconds, one for all that is measured.

Speaks to loopback over connections that are kept open, and knows just enough of HTTP/1.1 for the servers here.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import uvloop

WARM_UP_S = 0.5
_TIMEOUT_S = 30.0
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class NoAnswer(Exception):
    """A server refused, hung up, or answered without what its answer must hold."""


@dataclass(frozen=True, slots=True)
class Request:
    """The bytes of a request, and the text whose arrival is the answer's first token; every answer must hold it."""

    data: bytes
    first_token: bytes


@dataclass(slots=True)
class Timings:
    """Seconds from sending a request to its first token and to the end of its answer, and how long all of it took."""

    first_token_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.whole_s) / self.elapsed_s


class _Connection(asyncio.Protocol):
    """Asks the same request again and again. Timings are kept of what was asked between `begins_s` and `ends_s`."""

    def __init__(self, request: Request, timings: Timings, begins_s: float, ends_s: float) -> None:
        self._request, self._timings, self._begins_s, self._ends_s = request, timings, begins_s, ends_s
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self) -> None:
        self._received = bytearray()
        self._first_s: float | None = None
        self._asked_s = time.perf_counter()
        self._transport.write(self._request.data)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._first_s is None and self._request.first_token in self._received:
            self._first_s = time.perf_counter()
        if not is_whole(self._received):
            return
        now_s = time.perf_counter()
        if self._first_s is None or not self._received.startswith(b"HTTP/1.1 200"):
            shown = bytes(self._received[:1000]).decode("utf-8", "replace")
            self._fail(f"this is no answer: {shown}")
        elif now_s >= self._ends_s:
            self.ended.set_result(None)
        else:
            if self._asked_s >= self._begins_s:
                self._timings.first_token_s.append(self._first_s - self._asked_s)
                self._timings.whole_s.append(now_s - self._asked_s)
            self.ask()

    def close(self) -> None:
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the server closed the connection: {error}")

    def _fail(self, message: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(NoAnswer(message))


def is_whole(received: bytearray) -> bool:
    """Whether the answer of HTTP is there to its end, by its length or its last chunk."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return False
    head = bytes(received[:end]).lower()
    _, given, length = head.partition(b"\r\ncontent-length:")
    if given:
        return len(received) >= end + 4 + int(length.partition(b"\r\n")[0])
    return received.endswith(_LAST_CHUNK)


def press(port: int, request: Request, concurrency: int, seconds: float) -> Timings:
    """Ask for so long with so many connections, each again as soon as it has its answer. Raises NoAnswer."""
    with without_garbage_collection():
        return uvloop.run(pressing(port, request, concurrency, seconds))


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """The client's own pauses are not the server's."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def pressing(port: int, request: Request, concurrency: int, seconds: float) -> Timings:
    """As `press`, in a loop that is there."""
    loop = asyncio.get_running_loop()
    timings = Timings(elapsed_s=seconds)
    begins_s = time.perf_counter() + WARM_UP_S

    def connection() -> _Connection:
        return _Connection(request, timings, begins_s, begins_s + seconds)

    opened = [(await loop.create_connection(connection, "127.0.0.1", port))[1] for _ in range(concurrency)]
    for place, one in enumerate(opened):  # not all at the same moment
        loop.call_later(WARM_UP_S / 4 * place / concurrency, one.ask)
    try:
        async with asyncio.timeout(WARM_UP_S + seconds + _TIMEOUT_S):
            await asyncio.gather(*(one.ended for one in opened))
    finally:
        for one in opened:
            one.close()
    return timings
