"""What the engine and whoever asks it say to each other: plain data, msgpack frames with a length before each.

The same frames travel to an engine in a process of its own and to one in a thread.
"""

from __future__ import annotations

import msgspec

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 256 * 1024 * 1024


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Generate after these tokens. `soft_prompt` is a digest that `Register` has named before."""

    id: str
    token_ids: list[int]
    soft_prompt: str | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: list[str]


class Score(msgspec.Struct, tag=True, frozen=True):
    """Score each continuation after the prompt."""

    id: str
    token_ids: list[int]
    soft_prompt: str | None
    continuations: list[list[int]]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    id: str


class Register(msgspec.Struct, tag=True, frozen=True):
    """Bring a soft prompt's tensor; `pinned` also computes its KV now and keeps it."""

    digest: str
    dtype: str
    shape: tuple[int, int]
    data: bytes
    pinned: bool


class Release(msgspec.Struct, tag=True, frozen=True):
    """Forget a soft prompt once no running generation uses it."""

    digest: str


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Stop at once."""


Command = Submit | Score | Cancel | Register | Release | Shutdown


class Stats(msgspec.Struct, frozen=True):
    waiting: int
    running: int
    kv_slots: int
    kv_slots_used: int
    prefixes: int
    prefix_bytes: int
    tokens_generated: int


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The base model is loaded and probed."""

    stats: Stats


class StartFailed(msgspec.Struct, tag=True, frozen=True):
    """The engine did not start. `permanent` when this base model cannot be served, so that trying again is no use."""

    message: str
    permanent: bool


class Output(msgspec.Struct, frozen=True):
    """News of one generation. `finish_reason` is set on the last."""

    id: str
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


class Scored(msgspec.Struct, frozen=True):
    id: str
    log_probabilities: list[float]


class Failure(msgspec.Struct, frozen=True):
    id: str
    message: str


class Step(msgspec.Struct, tag=True, frozen=True):
    """All that one step of the engine brought."""

    outputs: list[Output]
    scored: list[Scored]
    failures: list[Failure]
    stats: Stats


class Registered(msgspec.Struct, tag=True, frozen=True):
    """A `Register` was carried out, or refused with `error`."""

    digest: str
    error: str | None
    stats: Stats


Event = Ready | StartFailed | Step | Registered

_encoder = msgspec.msgpack.Encoder()
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode


def frame(message: Command | Event) -> bytes:
    """One message as it travels."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body
