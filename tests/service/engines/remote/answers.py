"""Answers as providers of OpenAI's API give them, for tests to change and to break."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

USAGE: dict[str, Any] = {
    "prompt_tokens": 19,
    "completion_tokens": 4,
    "total_tokens": 23,
    "prompt_tokens_details": {"cached_tokens": 16, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}
CALLS: list[dict[str, Any]] = [
    {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"of": "heater"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "say", "arguments": "{}"}},
]


def token(text: str, logprob: float, **top: float) -> dict[str, Any]:
    """A token with its alternatives, as chat shows them."""

    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {**entry(text, logprob), "top_logprobs": [entry(other, value) for other, value in top.items()]}


def choice(content: str | None = "Hello there", index: int = 0, reason: str | None = "stop", **more: Any) -> Any:
    """A choice of a chat answer; `tokens` are its log-probabilities."""
    tokens = more.pop("tokens", None)
    message = {"role": "assistant", "content": content, "refusal": None, "annotations": [], **more}
    logprobs = None if tokens is None else {"content": tokens, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def chat(*choices: Any, **more: Any) -> dict[str, Any]:
    """A chat answer, of one plain choice where none is given."""
    common = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1764000000, "model": "ft:m"}
    return {**common, "choices": list(choices or [choice()]), "usage": USAGE, "service_tier": "default", **more}


def piece(index: int = 0, reason: str | None = None, tokens: Sequence[Any] | None = None, **delta: Any) -> Any:
    """A choice of a chat chunk."""
    logprobs = None if tokens is None else {"content": list(tokens), "refusal": None}
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def chunk(*choices: Any, **more: Any) -> dict[str, Any]:
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1764000000, "model": "ft:m"}
    return {**common, "choices": list(choices), "obfuscation": "x7", **more}


def stream(*texts: str, reason: str = "stop") -> list[dict[str, Any]]:
    """The chunks of one choice, and its usage in the last."""
    said = [chunk(piece(content=text)) for text in texts]
    return [
        chunk(piece(role="assistant", content="", refusal=None)),
        *said,
        chunk(piece(reason=reason)),
        chunk(usage=USAGE),
    ]


def completion(*texts: str, **more: Any) -> dict[str, Any]:
    """A text completion, a choice a text."""
    choices = [
        {"index": index, "text": text, "logprobs": None, "finish_reason": "length"} for index, text in enumerate(texts)
    ]
    common = {"id": "cmpl-1", "object": "text_completion", "created": 1764000000, "model": "ft:m"}
    return {**common, "choices": choices, "usage": USAGE, **more}
