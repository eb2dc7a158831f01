"""What can go wrong between a request and its last token.

EngineError
├── BaseModelError            the base model cannot be loaded or served exactly
├── RequestError              the caller must change the request
│   ├── PromptTooLong         prompt and virtual tokens exceed the context length
│   ├── UnsupportedFeature    the engine does not do what the request asks for
│   ├── InvalidRequest        a value is out of its range
│   └── WrongBase             the soft prompt belongs to another base model
├── GenerationFailed          this generation alone failed inside the engine
├── DeadlineExceeded          the request's own deadline passed before its last token
├── QueueFull                 too many requests wait; try again after `retry_after_s`
└── EngineUnavailable         the engine is starting, stopping or was lost; the same request may be sent again
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of every engine error; the message gives the fact and the remedy."""


class BaseModelError(EngineError):
    """The base model cannot be loaded, or not be served exactly."""


class RequestError(EngineError):
    """The request itself is at fault; `parameter` names the field where one is to blame."""

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class PromptTooLong(RequestError):
    """Prompt, virtual tokens and at least one new token do not fit the context."""

    def __init__(self, prompt_tokens: int, virtual_tokens: int, context_length: int) -> None:
        room = context_length - virtual_tokens - 1
        beside = f" beside the {virtual_tokens} virtual tokens of its soft prompt" if virtual_tokens else ""
        super().__init__(
            f"the prompt has {prompt_tokens} tokens but at most {room} fit this model's context of "
            f"{context_length}{beside}; shorten the prompt",
            parameter="messages",
        )


class UnsupportedFeature(RequestError):
    """A feature that exists in the request's shape and that this engine does not serve."""


class InvalidRequest(RequestError):
    """A value that is out of its range."""


class WrongBase(RequestError):
    """A soft prompt tuned on another base model than the one that is loaded."""


class GenerationFailed(EngineError):
    """The engine could not finish this generation; others in its batch are not affected."""


class DeadlineExceeded(EngineError):
    """The request's deadline passed before it had ended."""


class QueueFull(EngineError):
    """The engine's queue is full."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class EngineUnavailable(EngineError):
    """The engine is not there right now; the same request may be sent again."""

    retry_after_s = 1.0
