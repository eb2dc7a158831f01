"""Signed generation ids: any replica that shares the store can tell what a generation was, and that it was ours."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from service.routing.errors import UnknownGeneration

_MAC_BYTES = 12
_PREFIXES = ("chatcmpl-", "cmpl-", "resp_")


@dataclass(frozen=True, slots=True)
class GenerationTag:
    """What an id says. `at_ms` is Unix time in milliseconds; `version` the first 16 digits of a digest, or empty.

    `request` is the generation's own name within the store. `experiment` is the one that outcomes count for, empty
    where there is none or its arm was forced.
    """

    task: str
    version: str
    arm: str
    unit_hash: str
    at_ms: int
    request: str
    experiment: str = ""


def unit_hash(unit: str, key: bytes) -> str:
    """The unit as records keep it: 64 bits in hex that only the holder of the store's key can connect with it."""
    return _digest(key, b"unit:" + unit.encode()).hex()[:16]


def sign(tag: GenerationTag, key: bytes) -> str:
    """The id of a generation: URL-safe, as unique as `tag.request` is, unforgeable without the key."""
    said = [tag.task, tag.version, tag.arm, tag.unit_hash, tag.at_ms, tag.request]
    body = msgspec.json.encode([*said, tag.experiment] if tag.experiment else said)
    return f"{_encode(body)}.{_encode(_mac(body, key))}"


def plain_id(generation_id: str) -> str:
    """An id without the prefix that OpenAI's endpoints put before it, such as `chatcmpl-`."""
    return next(
        (generation_id[len(prefix) :] for prefix in _PREFIXES if generation_id.startswith(prefix)), generation_id
    )


def verify(generation_id: str, key: bytes) -> GenerationTag:
    """Read an id back, with or without a prefix. Raises UnknownGeneration."""
    try:
        encoded, mac = plain_id(generation_id).split(".")
        body = _decode(encoded)
        if not hmac.compare_digest(_mac(body, key), _decode(mac)):
            raise ValueError
        return GenerationTag(*json.loads(body))
    except (ValueError, binascii.Error, TypeError):
        raise UnknownGeneration(
            "this generation id was not signed by this service's store; send the id exactly as it was answered"
        ) from None


def _mac(body: bytes, key: bytes) -> bytes:
    return _digest(key, body)[:_MAC_BYTES]


def _digest(key: bytes, data: bytes) -> bytes:
    """HMAC-SHA256. `hmac.digest` lets go of the interpreter's lock, for which the event loop then waits again."""
    begun = _begun(key).copy()
    begun.update(data)
    return begun.digest()


@lru_cache(16)
def _begun(key: bytes) -> hmac.HMAC:
    return hmac.new(key, digestmod="sha256")


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
