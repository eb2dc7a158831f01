from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from prompt_store.errors import StoreError
from service.api.answers import STATUS, EventStream, describe
from service.api.errors import ApiError
from service.engines.errors import EngineError, GenerationFailed, QueueFull
from service.ledger.journal import JournalUnavailable
from service.routing.errors import RoutingError


def every(error: type[Exception]) -> Iterator[type[Exception]]:
    yield error
    for child in error.__subclasses__():
        yield from every(child)


def test_every_error_of_ours_has_a_status() -> None:
    ours = {
        error
        for tree in (StoreError, EngineError, RoutingError, JournalUnavailable, ApiError)
        for error in every(tree)
        if error.__module__.split(".")[0] in ("prompt_store", "service")
    }
    assert ours == set(STATUS)


def test_a_full_queue_says_when_to_come_back() -> None:
    status, body, headers = describe(QueueFull(9, 2.0))
    assert (status, body["error"]["code"], headers) == (429, "queue_full", {"retry-after": "2"})


def test_an_unexpected_error_says_nothing_of_its_inside(caplog: pytest.LogCaptureFixture) -> None:
    status, body, _ = describe(ZeroDivisionError("secret"))
    assert status == 500
    assert "secret" not in str(body)
    assert "secret" in caplog.text


class Connection:
    """An ASGI connection whose client leaves when told to; `sent` holds what was sent."""

    def __init__(self, *, stuck: bool = False) -> None:
        self.left = asyncio.Event()
        self.sent: list[Any] = []
        self.sending = asyncio.Event()
        self._stuck = stuck

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        self.sending.set()
        if self._stuck:
            await asyncio.Event().wait()

    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """Events and whether they were closed."""

    def __init__(self, *items: bytes | Exception | asyncio.Event) -> None:
        self._items = items
        self.ended = False
        self.closed = False

    async def events(self) -> AsyncGenerator[bytes]:
        try:
            for item in self._items:
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            self.ended = True

    async def close(self) -> None:
        self.closed = True

    async def answer(self, connection: Connection) -> None:
        app = EventStream(self.events(), {"x-a": "b"}, self.close).to_asgi_response()
        async with asyncio.timeout(10):
            await app({}, connection.receive, connection.send)


async def test_a_stream_is_sent_whole_and_closed() -> None:
    connection, source = Connection(), Source(b"one", b"two")
    await source.answer(connection)
    assert (connection.body(), source.ended, source.closed) == (b"onetwo", True, True)
    assert (b"x-a", b"b") in connection.sent[0]["headers"]


async def test_an_error_midway_becomes_an_event_and_the_stream_ends() -> None:
    connection, source = Connection(), Source(b"one", GenerationFailed("it broke"))
    await source.answer(connection)
    assert connection.body().startswith(b'onedata: {"error":{"message":"it broke"')
    assert connection.sent[-1]["more_body"] is False
    assert source.closed


async def test_a_client_that_leaves_while_we_wait_for_the_next_event_closes_the_source() -> None:
    connection, source = Connection(), Source(b"one", asyncio.Event())
    answering = asyncio.create_task(source.answer(connection))
    await connection.sending.wait()
    connection.left.set()
    await answering
    assert (source.ended, source.closed) == (True, True)


async def test_a_client_that_leaves_while_a_send_is_stuck_closes_the_source() -> None:
    connection, source = Connection(stuck=True), Source(b"one", b"two")
    answering = asyncio.create_task(source.answer(connection))
    await connection.sending.wait()
    connection.left.set()
    await answering
    assert source.closed
    assert len(connection.sent) == 1


async def test_a_stream_that_is_cancelled_from_outside_closes_its_source_and_stays_cancelled() -> None:
    connection, source = Connection(), Source(b"one", asyncio.Event())
    answering = asyncio.create_task(source.answer(connection))
    await connection.sending.wait()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert (source.ended, source.closed) == (True, True)
