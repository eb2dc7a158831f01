"""HTTP to a provider: one attempt at a time, whole answers and streams, each within its bounds.

Whatever goes wrong is AttemptFailed; trying again, and elsewhere, is `provider`'s subject.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from service.engines.errors import BackendError
from service.engines.remote.event_stream import EventParser
from service.engines.remote.exchange import Exchange, open_socket
from service.engines.remote.failures import AttemptFailed, Complaints, request_id
from service.engines.remote.options import TransportOptions

_READ_BYTES = 64 * 1024
_DRAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer: a JSON object. `request_id` is the provider's own, or empty."""

    document: dict[str, Any]
    request_id: str


class Connection:
    """Open between `start` and `close`. Sends neither cookies nor through the environment's proxies, and follows no
    redirect: each would carry the key to where it was not meant to go."""

    def __init__(self, options: TransportOptions) -> None:
        self._options = options
        self._complaints = Complaints(options.secrets())
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Raises BackendError for a `ca_file` that cannot be read."""
        options = self._options
        secure = any(URL(url).scheme == "https" for url in options.urls)
        headers = {"accept-encoding": "identity", "content-type": "application/json", "user-agent": "softcue"}
        headers |= {name.lower(): value for name, value in options.headers.items()}
        if options.key is not None:
            key_header = options.key_header.lower()
            scheme = "Bearer " if key_header == "authorization" else ""
            headers[key_header] = scheme + options.key.get_secret_value()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                ssl=_trusted(options.ca_file) if secure else True,
                limit=0,  # requests at once are bounded before they come here
                keepalive_timeout=options.keep_alive_s,
                socket_factory=open_socket,
            ),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=options.proxy,
            read_bufsize=_READ_BYTES,
        )

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def post_json(self, url: URL, body: bytes, left_s: float | None) -> Reply:
        """Send `body`, which is JSON, and wait for the whole answer, no longer than `left_s`. Raises AttemptFailed."""
        return await self._whole("POST", url, body, left_s)

    async def get_json(self, url: URL, left_s: float | None) -> Reply:
        """Raises AttemptFailed."""
        return await self._whole("GET", url, None, left_s)

    async def look(self, url: URL, *, left_s: float) -> None:
        """Ask for `url` and read nothing of the answer. Raises AttemptFailed where its status is not 2xx."""
        exchange = Exchange(url, self._options, self._complaints)
        response = await exchange.open(self._opened(), "GET", None, left_s)
        try:
            await exchange.expect("")
        finally:
            response.close()

    async def post_events(self, url: URL, body: bytes, left_s: float | None, begin_s: float | None = None) -> Events:
        """Send `body` and wait for the first event of the stream that answers it, no longer than `begin_s`.

        `left_s` bounds the whole stream. Raises AttemptFailed, also for a stream in which no event comes.
        """
        exchange = Exchange(url, self._options, self._complaints)
        try:
            async with asyncio.timeout(begin_s):
                return await self._begun(exchange, body, left_s)
        except TimeoutError:
            raise exchange.late() from None

    async def _begun(self, exchange: Exchange, body: bytes, left_s: float | None) -> Events:
        response = await exchange.open(self._opened(), "POST", body, left_s)
        events = Events(exchange, response, self._options)
        try:
            await exchange.expect("text/event-stream")
            await events.begin()
        except BaseException:
            events.close()
            raise
        return events

    async def _whole(self, method: str, url: URL, body: bytes | None, left_s: float | None) -> Reply:
        exchange = Exchange(url, self._options, self._complaints)
        response = await exchange.open(self._opened(), method, body, left_s)
        limit = self._options.max_answer_bytes
        try:
            await exchange.expect("json")
            content = await exchange.read(limit)
        finally:
            response.close()
        if len(content) > limit:
            raise exchange.misbehaved(f"sent an answer of more than {limit} bytes")
        document = exchange.document(content, "an answer")
        return Reply(document, request_id(response.headers))

    def _opened(self) -> aiohttp.ClientSession:
        assert self._session is not None, "a connection is used between its start and its close"
        return self._session


class Events:
    """The JSON objects of a stream, as they come: iterate over it, and close it.

    What goes wrong is raised as the EngineError that it is, and kept as `failure`. Closing it before its end hangs up,
    so that the provider stops.
    """

    def __init__(self, exchange: Exchange, response: aiohttp.ClientResponse, options: TransportOptions) -> None:
        self._exchange = exchange
        self._response = response
        self._options = options
        self._parser = EventParser(options.max_event_bytes)
        self._ready: deque[bytes] = deque()
        self._first: dict[str, Any] | None = None
        self._ended = False
        self.failure: AttemptFailed | None = None
        self.request_id = request_id(response.headers)

    async def begin(self) -> None:
        """Wait for the first event. Raises AttemptFailed."""
        self._first = await self._next()
        if self._first is None:
            raise self._exchange.misbehaved("sent a stream without an event")

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> dict[str, Any]:
        document, self._first = self._first, None
        if document is None:
            try:
                document = await self._next()
            except AttemptFailed as failure:
                self.failure = failure
                self.close()
                raise failure.error from None
            if document is None:
                raise StopAsyncIteration
        return document

    def close(self) -> None:
        """Hang up where the stream has not ended."""
        self._ended = True
        self._ready.clear()
        self._response.close()

    async def _next(self) -> dict[str, Any] | None:
        while not self._ready:
            if self._ended:
                return None
            if self._response.content.at_eof():
                self._ended = True
                if self._options.done_marker:
                    raise self._exchange.misbehaved(
                        "ended a stream without the [DONE] that every whole stream ends with"
                    )
                return None
            if self._parser.overflowed:
                raise self._exchange.misbehaved(f"sent an event of more than {self._options.max_event_bytes} bytes")
            self._ready += self._parser.feed(await self._exchange.piece())
        data = self._ready.popleft()
        if data == b"[DONE]":
            await self._drain()
            return None
        return self._exchange.document(data, "an event")

    async def _drain(self) -> None:
        """Read the end of the body, which stands right behind the marker, so that the connection can be used again."""
        self._ended = True
        self._ready.clear()
        content = self._response.content
        try:
            async with asyncio.timeout(_DRAIN_S):
                while not content.at_eof():
                    await content.readany()
        except (aiohttp.ClientError, TimeoutError, RuntimeError):  # the last, of a connection that we closed
            self._response.close()


@functools.cache
def _trusted(ca_file: Path | None) -> ssl.SSLContext:
    """What the system trusts, read once, and the authorities in a file."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise BackendError(
                f"the ca_file {ca_file} cannot be read ({error}); name a file of certificates in PEM form"
            ) from error
    return context
