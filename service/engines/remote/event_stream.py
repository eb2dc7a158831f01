"""Server-sent events, from bytes to the data of each event. Pure.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventParser:
    """Takes a stream in pieces of any size. Names, ids and retry times of events are passed over.

    `overflowed` says that an event had more bytes than it may; nothing comes out after the events before it.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._line = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self._at_start = True
        self._after_return = False
        self.overflowed = False

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that `piece` completes, lines joined by LF."""
        if self._after_return and piece:
            self._after_return = False
            piece = piece.removeprefix(b"\n")
        if b"\n" not in piece and b"\r" not in piece:
            self._line += piece
            self._check(len(self._line))
            return []
        self._after_return = piece.endswith(b"\r")
        lines = (bytes(self._line) + piece if self._line else piece).splitlines()
        self._line.clear()
        if not piece.endswith((b"\n", b"\r")):
            self._line += lines.pop()
        if self._at_start:
            self._at_start = False
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        events: list[bytes] = []
        for line in lines:
            if line.startswith(b"data:"):
                self._add(line[6:] if line[5:6] == b" " else line[5:])
            elif not line:
                if self._data:
                    events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data.clear()
                    self._size = 0
            elif line == b"data":
                self._add(b"")
            if self.overflowed:
                break
        self._check(len(self._line))
        return events

    def _add(self, value: bytes) -> None:
        self._size += len(value) + 1
        self._data.append(value)
        self._check(0)

    def _check(self, more: int) -> None:
        if self._size + more > self._max_event_bytes:
            self.overflowed = True
