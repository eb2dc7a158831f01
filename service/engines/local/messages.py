"""What the engine and whoever asks it say to each other: plain data, msgpack frames with a length before each.

The same frames travel to an engine in a process of its own and to one in a thread.
"""

from __future__ import annotations

from typing import Literal

import msgspec

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 256 * 1024 * 1024


class Choosing(msgspec.Struct, frozen=True):
    """How the next token is chosen; the fields are those of `base.Sampling`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must fit. `text` is a JSON schema, a regular expression, or a JSON list of choices."""

    kind: Literal["json_schema", "regex", "choice"]
    text: str
    lenient: bool = False  # keywords of a schema that cannot be followed are left out


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Generate after these tokens. `soft_prompt` is a digest that `Register` has named before.

    `n` answers share the prompt. `logprobs` and `prompt_logprobs` count alternatives, None wants none. Without
    `stream`, all of an answer comes at its end. `task` is whom it counts for when tasks share the engine fairly.
    """

    id: str
    token_ids: list[int]
    soft_prompt: str | None = None
    max_tokens: int = 128
    choosing: Choosing = Choosing()
    stop: list[str] = []
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    stream: bool = True
    deadline_s: float | None = None
    task: str = ""


class Score(msgspec.Struct, tag=True, frozen=True):
    """Score each continuation after the prompt."""

    id: str
    token_ids: list[int]
    soft_prompt: str | None
    continuations: list[list[int]]
    deadline_s: float | None = None
    task: str = ""


class Cancel(msgspec.Struct, tag=True, frozen=True):
    id: str


class Register(msgspec.Struct, tag=True, frozen=True):
    """Bring a prompt's tensor; `pinned` also computes its KV now and keeps it.

    A soft prompt has shape [P, H], a prefix (keys and values of every layer) [L, 2, KV heads, P, D].
    """

    digest: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    pinned: bool


class Release(msgspec.Struct, tag=True, frozen=True):
    """Forget a soft prompt once no running generation uses it."""

    digest: str


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Stop at once."""


Command = Submit | Score | Cancel | Register | Release | Shutdown


class Stats(msgspec.Struct, frozen=True):
    waiting: int = 0
    running: int = 0
    max_running: int = 0
    kv_bytes: int = 0
    kv_budget_bytes: int = 0
    prompts: int = 0
    prompt_bytes: int = 0
    tokens_generated: int = 0
    preemptions: int = 0


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The base model is loaded and probed. `run_as` says how its weights are run."""

    stats: Stats
    run_as: str = ""


class StartFailed(msgspec.Struct, tag=True, frozen=True):
    """The engine did not start. `permanent` when this base model cannot be served, so that trying again is no use."""

    message: str
    permanent: bool


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """A token's log-probability, and the most probable tokens in its place with theirs."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """News of one choice of a generation. `finish_reason` is set on the choice's last."""

    id: str
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    index: int = 0
    logprobs: list[Logprob] = []


class PromptScored(msgspec.Struct, frozen=True):
    """The log-probabilities of a prompt's tokens; None for a first token that nothing stands before."""

    id: str
    logprobs: list[Logprob | None]


class Scored(msgspec.Struct, frozen=True):
    id: str
    log_probabilities: list[float]


FailureKind = Literal["failed", "deadline", "invalid"]


class Failure(msgspec.Struct, frozen=True):
    id: str
    message: str
    kind: FailureKind = "failed"


class Registered(msgspec.Struct, tag=True, frozen=True):
    """A `Register` was carried out, or refused with `error`."""

    digest: str
    error: str | None
    stats: Stats


class Step(msgspec.Struct, tag=True, frozen=True):
    """All that one step of the engine brought."""

    outputs: list[Output]
    scored: list[Scored]
    failures: list[Failure]
    stats: Stats
    prompts: list[PromptScored] = []
    registered: list[Registered] = []


Event = Ready | StartFailed | Step | Registered

_encoder = msgspec.msgpack.Encoder()
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode


def frame(message: Command | Event) -> bytes:
    """One message as it travels."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body
