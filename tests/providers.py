"""A provider on a loopback socket that answers by a script, and misbehaves as precisely as the script says.

    async with ScriptedProvider([json_answer(document), error_answer(500), [HANG_UP]]) as provider:
        ...                                         # ask provider.url, which ends in /v1
        assert provider.requests[0].document()["model"] == "m"

A script is a list of answers, of which the last is repeated, or a function from what was asked to an answer. An answer
is a list of steps: bytes go out as they are, an asyncio.Event is waited for, and the words below do what they say.
After the last step the connection is kept open for the next request, unless a step ended it. `whole`, `json_answer`,
`error_answer`, `event_stream` and `text_answer` make the bytes.
"""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import ssl
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any


class Step(Enum):
    """What an answer does beside sending bytes."""

    HANG_UP = "close the connection"
    RESET = "close the connection by a reset"
    HALF_CLOSE = "send the end of the stream, and go on reading"
    UNTIL_LEFT = "say nothing until the client has left"


HANG_UP, RESET, HALF_CLOSE, UNTIL_LEFT = Step
_RESETTING = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

Answer = Sequence["bytes | Step | asyncio.Event"]


@dataclass
class Asked:
    """One request, as it came. `connection` numbers connections from 0; `left` is set once the client was seen to leave
    before the answer was played."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def document(self) -> Any:
        return json.loads(self.body)


Script = Callable[[Asked], Answer] | Sequence[Answer]


class ScriptedProvider:
    """Listens while it is entered. `requests` holds all that was asked, `connections` counts those that were made.

    With `tls` its certificate is signed by itself, for localhost and 127.0.0.1; `ca_file` is what trusts it.
    """

    def __init__(self, script: Script, *, tls: bool = False) -> None:
        self.script = script
        self.requests: list[Asked] = []
        self.connections = 0
        self.ca_file: Path | None = _certificate()[0] if tls else None
        self._tls = _server_context() if tls else None
        self._port = 0
        self._server: asyncio.Server | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._idle: dict[int, asyncio.StreamWriter] = {}
        self._asked = asyncio.Condition()

    @property
    def url(self) -> str:
        """The base URL, which stays the same when the provider is entered again."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}/v1"

    async def __aenter__(self) -> ScriptedProvider:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, ssl=self._tls)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        await self._server.wait_closed()

    async def asked(self, count: int) -> None:
        """Wait until `count` requests have come."""
        async with self._asked:
            await self._asked.wait_for(lambda: len(self.requests) >= count)

    async def close_idle(self) -> None:
        """Close the connections on which no request is being answered."""
        idle, self._idle = self._idle, {}
        for writer in idle.values():
            await _closed(writer)

    def _answer(self, asked: Asked) -> Answer:
        if callable(self.script):
            return self.script(asked)
        return self.script[min(len(self.requests), len(self.script)) - 1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        number, self.connections = self.connections, self.connections + 1
        try:
            while True:
                self._idle[number] = writer
                asked = await _read_request(reader, number)
                self._idle.pop(number, None)
                if asked is None:
                    return
                self.requests.append(asked)
                async with self._asked:
                    self._asked.notify_all()
                if not await _play(self._answer(asked), asked, reader, writer):
                    return
        except ConnectionError:
            return  # the client hung up while it was answered, which tests see at their own end
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._idle.pop(number, None)
            self._running.discard(task)
            await _closed(writer)


async def _read_request(reader: asyncio.StreamReader, connection: int) -> Asked | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.rstrip("\r\n").split("\r\n")
    method, path, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(method, path, headers, body, connection)


async def _play(answer: Answer, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Whether the connection may be used again. A client that leaves ends what is waited for."""
    for step in answer:
        match step:
            case bytes():
                writer.write(step)
                await writer.drain()
            case asyncio.Event():
                if await _left_before(step, reader):
                    asked.left.set()
                    return False
            case Step.UNTIL_LEFT:
                if await reader.read(1) == b"":
                    asked.left.set()
                return False
            case Step.HALF_CLOSE:
                writer.write_eof()
            case Step.RESET:
                writer.transport.get_extra_info("socket").setsockopt(*_RESETTING)
                writer.transport.abort()
                return False
            case Step.HANG_UP:
                return False
    return True


async def _left_before(event: asyncio.Event, reader: asyncio.StreamReader) -> bool:
    leaving, coming = asyncio.ensure_future(reader.read(1)), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((leaving, coming), return_when=asyncio.FIRST_COMPLETED)
        return not coming.done()
    finally:
        leaving.cancel()
        coming.cancel()
        await asyncio.wait((leaving, coming))


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        await writer.wait_closed()
    except (ConnectionError, ssl.SSLError):
        return  # it was closed from the other side


def whole(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None, *, content_type: str = "application/json"
) -> bytes:
    """An answer with its length."""
    return _head(status, {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}) + body


def json_answer(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return [whole(json.dumps(document).encode(), status, headers)]


def error_answer(
    status: int,
    message: str = "it failed",
    headers: Mapping[str, str] | None = None,
    *,
    code: str | None = None,
    kind: str = "server_error",
    parameter: str | None = None,
) -> Answer:
    """An error in OpenAI's shape."""
    error = {"message": message, "type": kind, "param": parameter, "code": code}
    return json_answer({"error": error}, status, headers)


def text_answer(text: str, status: int = 200, content_type: str = "text/html") -> Answer:
    return [whole(text.encode(), status, content_type=content_type)]


def stream_head(headers: Mapping[str, str] | None = None) -> bytes:
    """The head of a chunked stream of events; `event` and `STREAM_END` follow."""
    return _head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked", **(headers or {})})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(document: Any) -> bytes:
    """A chunk that holds one event."""
    return chunk(b"data: " + json.dumps(document).encode() + b"\n\n")


DONE = chunk(b"data: [DONE]\n\n")
STREAM_END = b"0\r\n\r\n"


def event_stream(documents: Iterable[Any], headers: Mapping[str, str] | None = None) -> list[bytes]:
    """A whole stream: its head, an event a step, the marker and the end."""
    return [stream_head(headers), *map(event, documents), DONE, STREAM_END]


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} As it is", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


@functools.cache
def _certificate() -> tuple[Path, Path]:
    """A certificate and its key, made once a run by the openssl program and thrown away with it."""
    folder = Path(_folder().name)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="softcue-certificate-")


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate, key = _certificate()
    context.load_cert_chain(certificate, key)
    return context
