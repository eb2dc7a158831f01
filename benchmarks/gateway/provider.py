"""A provider on the loopback interface: OpenAI's chat completions, each answered after exactly 20 ms.

A process of its own (`python -m benchmarks.gateway.provider PORT`), and one that costs little, so that it measures the
gateways before it and not itself.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import sys
from typing import Any

DELAY_S = 0.020
FIRST_WORD = "Mercury"
_WORDS = (
    FIRST_WORD,
    " is",
    " the",
    " planet",
    " that",
    " is",
    " nearest",
    " to",
    " the",
    " sun",
    ".",
    " No",
    " moon",
    ".",
)
_USAGE = {"prompt_tokens": 12, "completion_tokens": len(_WORDS), "total_tokens": 12 + len(_WORDS)}
_COMMON = {"id": "chatcmpl-benchmark", "created": 1767225600, "model": "m", "system_fingerprint": "fp_benchmark"}


def _body(kind: str, choice: dict[str, Any], **more: Any) -> bytes:
    choices = [{"index": 0, "logprobs": None, "finish_reason": None, **choice}]
    return json.dumps({**_COMMON, "object": kind, "choices": choices, **more}, separators=(",", ":")).encode()


def _answer(head: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\n%s\r\nx-request-id: req_benchmark\r\n\r\n%s" % (head, body)


def _whole() -> bytes:
    message = {"role": "assistant", "content": "".join(_WORDS), "refusal": None}
    body = _body("chat.completion", {"message": message, "finish_reason": "stop"}, usage=_USAGE)
    return _answer(b"content-type: application/json\r\ncontent-length: %d" % len(body), body)


def _pieces(*, usage: bool) -> list[bytes]:
    """What a stream is written in: its head with the first event, then an event at a time."""

    def event(delta: dict[str, Any], reason: str | None = None) -> bytes:
        return _body("chat.completion.chunk", {"delta": delta, "finish_reason": reason})

    bodies = [event({"role": "assistant", "content": ""}), *(event({"content": word}) for word in _WORDS)]
    bodies.append(event({}, "stop"))
    if usage:
        end = {**_COMMON, "object": "chat.completion.chunk", "choices": [], "usage": _USAGE}
        bodies.append(json.dumps(end, separators=(",", ":")).encode())
    events = [b"data: %s\n\n" % body for body in (*bodies, b"[DONE]")]
    first, *rest = [b"%x\r\n%s\r\n" % (len(event), event) for event in events]
    head = _answer(b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked", first)
    return [head, *rest[:-1], rest[-1] + b"0\r\n\r\n"]


_WHOLE = [_whole()]
_STREAMS = {usage: _pieces(usage=usage) for usage in (False, True)}


class Answering(asyncio.Protocol):
    """A connection, one request at a time. The delay counts from the arrival of the request's last byte."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, ended, rest = self._received.partition(b"\r\n\r\n")
        if not ended:
            return
        length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
        if len(rest) < int(length.partition(b":")[2]):
            return
        self._received = b""
        self._loop.call_later(DELAY_S, self._send, _pieces_for(rest))

    def _send(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self._transport.write(piece)


def _pieces_for(body: bytes) -> list[bytes]:
    """Each gateway writes JSON in its own manner."""
    asked = json.loads(body) if body else {}
    if not asked.get("stream"):
        return _WHOLE
    return _STREAMS[bool((asked.get("stream_options") or {}).get("include_usage"))]


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", port, backlog=512)
    await server.serve_forever()


def main() -> None:
    # select() waits for microseconds where epoll and uvloop wait for whole milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_serve(int(sys.argv[1])))


if __name__ == "__main__":
    main()
