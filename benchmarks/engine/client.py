"""An HTTP/1.1 client that costs little, so that it measures the servers and not itself: one for all of them.

Speaks to loopback over connections that are kept open, takes requests as prepared bytes, and knows just enough of
HTTP for the answers of uvicorn: a length or chunks. Not for anything else.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Self


class Refused(Exception):
    """The server answered with another status than 200."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"status {status}: {body[:500].decode('utf-8', 'replace')}")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Measured:
    """Tokens made, and how long that took."""

    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Connection:
    """One connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Self:
        """Connect to a port of the loopback interface."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: bytes) -> bytes:
        """The body of the answer. Raises Refused."""
        return b"".join([piece async for piece in self._answer(request)])

    async def events(self, request: bytes) -> AsyncIterator[bytes]:
        """The data of each server-sent event as it arrives, `[DONE]` included. Raises Refused."""
        rest = b""
        async for piece in self._answer(request):
            *whole, rest = (rest + piece).split(b"\n\n")
            for event in whole:
                yield event.removeprefix(b"data: ")

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def _answer(self, request: bytes) -> AsyncIterator[bytes]:
        self._writer.write(request)
        await self._writer.drain()
        status, *headers = (await self._reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        pieces = self._pieces(headers)
        code = int(status.split()[1])
        if code != 200:
            raise Refused(code, b"".join([piece async for piece in pieces]))
        async for piece in pieces:
            yield piece

    async def _pieces(self, headers: Sequence[bytes]) -> AsyncIterator[bytes]:
        length = next((int(line.split(b":")[1]) for line in headers if line.startswith(b"content-length:")), None)
        if length is not None:
            yield await self._reader.readexactly(length)
            return
        while size := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readexactly(2)


async def closed_loop(port: int, requests: Sequence[bytes], concurrency: int) -> Measured:
    """Ask all requests, `concurrency` at a time, each connection the next one as soon as it has its answer.

    Counts the tokens that the answers say were made. Raises Refused at the first answer that is none.
    """
    connections = [await Connection.open(port) for _ in range(concurrency)]
    waiting = iter(requests)

    async def ask_in_turn(connection: Connection) -> int:
        made = 0
        for request in waiting:  # shared by all connections
            made += json.loads(await connection.ask(request))["usage"]["completion_tokens"]
        return made

    started = time.perf_counter()
    made = await asyncio.gather(*(ask_in_turn(connection) for connection in connections))
    measured = Measured(sum(made), time.perf_counter() - started)
    for connection in connections:
        await connection.close()
    return measured
