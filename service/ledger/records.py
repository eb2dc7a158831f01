"""The journal's format. Pure: entries to bytes, and bytes that a crash or a disk may have damaged back to entries.

A record is a mark, the length of what follows, its CRC-32, and a MessagePack array of entries, which are written and
read together or not at all. Each has a mark of its own, so that what follows damage is found again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import msgspec

from prompt_store.ledger.entries import Entry

_MARK = b"\xf5scj"  # no UTF-8 text has its first byte
_HEADER = struct.Struct("<4sII")

_encoder = msgspec.msgpack.Encoder()
_entries = msgspec.msgpack.Decoder(list[Entry])
_entry = msgspec.msgpack.Decoder(Entry)
_raw_entries = msgspec.msgpack.Decoder(list[msgspec.Raw])


@dataclass(frozen=True, slots=True)
class Unknown:
    """An entry of a kind that this release does not know, as a newer one encoded it."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that hold no whole record: a write that a crash cut off, or what a disk gave back changed."""

    offset: int
    size_bytes: int


Part = Entry | Unknown | Damage


def record_of(entries: Sequence[Entry]) -> bytes:
    """One record. Halves of surrogate pairs, which no text in UTF-8 has, become question marks."""
    try:
        payload = _encoder.encode(entries)
    except UnicodeEncodeError:
        payload = _encoder.encode(_encodable(msgspec.to_builtins(entries)))
    return _HEADER.pack(_MARK, len(payload), crc32(payload)) + payload


def read_records(data: bytes) -> Iterator[Part]:
    """All that can be read, in order, with the damage between."""
    view = memoryview(data)
    offset = 0
    while offset < len(view):
        payload = _payload(view, offset)
        if payload is None:
            following = offset + 1
            while (following := _next_mark(data, following)) < len(data) and _payload(view, following) is None:
                following += 1
            yield Damage(offset, following - offset)
            offset = following
            continue
        offset += _HEADER.size + len(payload)
        yield from _decoded(payload)


def _payload(view: memoryview, offset: int) -> memoryview | None:
    """What the record at an offset holds, None where there is no whole one."""
    if len(view) - offset < _HEADER.size:
        return None
    mark, size, checksum = _HEADER.unpack_from(view, offset)
    payload = view[offset + _HEADER.size :][:size]
    whole = mark == _MARK and len(payload) == size and crc32(payload) == checksum
    return payload if whole else None


def _next_mark(data: bytes, start: int) -> int:
    found = data.find(_MARK, start)
    return found if found >= 0 else len(data)


def _decoded(payload: memoryview) -> list[Entry | Unknown]:
    """Quickly where all are known; otherwise one by one, in the order in which they are."""
    try:
        return [*_entries.decode(payload)]
    except msgspec.DecodeError:
        return _decoded_one_by_one(payload)


def _decoded_one_by_one(payload: memoryview) -> list[Entry | Unknown]:
    try:
        return [_decoded_alone(bytes(raw)) for raw in _raw_entries.decode(payload)]
    except msgspec.DecodeError:
        return [Unknown(bytes(payload))]


def _decoded_alone(data: bytes) -> Entry | Unknown:
    try:
        entry: Entry = _entry.decode(data)
        return entry
    except msgspec.DecodeError:
        return Unknown(data)


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(inner) for inner in value]
    return value
