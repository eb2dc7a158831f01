"""One request to a provider and what comes back: its pieces as they come, and what went wrong said with its names."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Awaitable, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import aiohttp
import msgspec
from yarl import URL

from service.engines.remote.failures import (
    AttemptFailed,
    Complaints,
    broken_off,
    hung_up,
    misbehaviour,
    silent,
    too_late,
    unreached,
)
from service.engines.remote.options import TransportOptions

_MAX_COMPLAINT_BYTES = 64 * 1024
_LARGE_BODY_BYTES = 1024 * 1024
_decode = msgspec.json.Decoder().decode
Anything = TypeVar("Anything")
_opening: ContextVar[Exchange] = ContextVar("exchange that is being opened")


class Exchange:
    """`response` is None until the head of the answer has come."""

    __slots__ = ("_complaints", "_heard", "_options", "_reused", "response", "url")

    def __init__(self, url: URL, options: TransportOptions, complaints: Complaints) -> None:
        self.url = url
        self.response: aiohttp.ClientResponse | None = None
        self._options = options
        self._complaints = complaints
        self._reused = True
        self._heard = False

    async def open(
        self,
        session: aiohttp.ClientSession,
        method: str,
        body: bytes | None,
        left_s: float | None,
    ) -> aiohttp.ClientResponse:
        """Send the request and wait for the head of the answer. Raises AttemptFailed."""
        timeout = aiohttp.ClientTimeout(
            total=left_s,
            connect=self._options.connect_s,
            # By default aiohttp rounds what is longer than 5 s up to whole seconds.
            ceil_threshold=float("inf"),
        )
        opening = _opening.set(self)
        request = session.request(method, self.url, data=_sendable(body), timeout=timeout, allow_redirects=False)
        try:
            self.response = await self._within_silence(request)
        finally:
            _opening.reset(opening)
        return self.response

    async def expect(self, kind: str) -> None:
        """Raise AttemptFailed for an answer that by its status is none, or whose content type does not have `kind`."""
        assert self.response is not None
        status, headers = self.response.status, self.response.headers
        if not 200 <= status < 300:
            raise self._complaints.status(self._where(), status, headers, await self.read(_MAX_COMPLAINT_BYTES))
        said = headers.get("content-type", kind).lower()
        if kind not in said:
            shown = "".join(letter for letter in said[:80] if letter.isprintable())
            raise self.misbehaved(f"answered with content type {shown!r}")

    async def piece(self) -> bytes:
        """More of the body, empty at its end. Raises AttemptFailed."""
        assert self.response is not None
        content = self.response.content
        if content.at_eof():
            return b""
        try:
            piece = await self._within_silence(content.readany())
        except RuntimeError:  # what aiohttp says of a connection that we closed, when it is read on
            raise broken_off(self._where(), self._headers()) from None
        self._heard = self._heard or bool(piece)
        return piece

    async def read(self, limit: int) -> bytes:
        """The body, or a beginning of it that exceeds `limit`. Raises AttemptFailed."""
        piece = await self.piece()
        assert self.response is not None
        content = self.response.content
        if content.at_eof():
            return piece
        pieces, size = [piece], len(piece)
        while size <= limit and not content.at_eof():
            pieces.append(await self.piece())
            size += len(pieces[-1])
        return b"".join(pieces)

    def document(self, content: bytes, what: str) -> dict[str, Any]:
        """The JSON object that `what` is. Raises AttemptFailed, also for one that reports an error."""
        try:
            document = _decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise self.misbehaved(f"sent {what} that is no JSON") from None
        if not isinstance(document, dict):
            raise self.misbehaved(f"sent {what} that is no JSON object")
        if error := document.get("error"):
            raise self._complaints.document(self._where(), self._headers(), error)
        return document

    def misbehaved(self, what: str) -> AttemptFailed:
        """An answer that cannot be read; `what` continues a sentence that begins with the provider."""
        status = self.response.status if self.response is not None else 0
        return misbehaviour(self._where(), what, self._headers(), status)

    def late(self) -> AttemptFailed:
        """The time is over that it had."""
        return too_late(self._where(), answering=self.response is not None)

    def note_new_connection(self) -> None:
        """It does not travel on a connection that had been kept open."""
        self._reused = False

    async def _within_silence(self, something: Awaitable[Anything]) -> Anything:
        """Wait for something of the provider's, no longer than it may be silent. Raises AttemptFailed.

        This is not left to aiohttp's `sock_read`: within a body that is no HTTP it drops that, and waits for ever.
        """
        silence_s = self._options.between_bytes_s if self._heard else self._options.first_byte_s
        try:
            async with asyncio.timeout(silence_s) as silence:
                return await something
        except (aiohttp.ClientError, TimeoutError) as error:
            if silence.expired():
                raise silent(self._where(), silence_s, self._headers()) from None
            raise self._interrupted(error) from None

    def _interrupted(self, error: aiohttp.ClientError | TimeoutError) -> AttemptFailed:
        where, answering = self._where(), self.response is not None
        match error:
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError() | aiohttp.ClientHttpProxyError():
                return unreached(where, error, self._options.connect_s)
            case TimeoutError():
                return self.late()
            case aiohttp.ClientPayloadError() | aiohttp.ClientConnectionError() if answering:
                return broken_off(where, self._headers())
            case aiohttp.ClientConnectionError():
                return hung_up(where, stale=self._reused)
        return self.misbehaved("sent what is no HTTP answer")

    def _headers(self) -> Mapping[str, str]:
        return self.response.headers if self.response is not None else {}

    def _where(self) -> str:
        return f"the provider at {self.url.authority}"


def open_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket for an address; whichever exchange opens it is told.

    aiohttp does not say whether a request went over a kept connection, except to its tracing, which is slow.
    """
    _opening.get().note_new_connection()
    family, kind, protocol, _, _ = address
    return socket.socket(family, kind, protocol)


def _sendable(body: bytes | None) -> bytes | io.BytesIO | None:
    """A large body in a form that aiohttp sends piece by piece, so that others are served meanwhile."""
    return body if body is None or len(body) < _LARGE_BODY_BYTES else io.BytesIO(body)
