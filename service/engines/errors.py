"""What can go wrong between a request and its last token.

EngineError
├── BaseModelError            the base model cannot be loaded or served exactly
├── BackendError              a backend cannot be built from its settings
├── RequestError              the caller must change the request
│   ├── PromptTooLong         prompt and virtual tokens exceed the context length
│   ├── UnsupportedFeature    the engine does not do what the request asks for
│   ├── InvalidRequest        a value is out of its range
│   └── WrongBase             the soft prompt belongs to another base model
├── GenerationFailed          this generation alone failed inside the engine
├── DeadlineExceeded          the request's own deadline passed before its last token
├── QueueFull                 too many requests wait; try again after `retry_after_s`
├── EngineUnavailable         the engine is starting, stopping or was lost; the same request may be sent again
│   └── CircuitOpen           a backend failed so often that it is left alone for `retry_after_s`
└── ProviderError             a provider behind a backend failed; has its status and its own request id, if it gave one
    ├── ProviderUnavailable   it was not reached, hung up, timed out or answered 5xx, after all attempts
    ├── ProviderRateLimited   it answered 429, after all attempts
    ├── ProviderMisbehaved    what it answered is no answer: no JSON, a broken stream, the wrong shape
    ├── ProviderDenied        it does not take our key, or the key may not do this
    └── ProviderRefused       it refused this request; its own words are in the message
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of every engine error; the message gives the fact and the remedy."""


class BaseModelError(EngineError):
    """The base model cannot be loaded, or not be served exactly."""


class BackendError(EngineError):
    """A backend cannot be built from its settings: its key is not there, say."""


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


class CircuitOpen(EngineUnavailable):
    """A backend failed so often that nothing is sent to it until `retry_after_s` have passed."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ProviderError(EngineError):
    """A provider failed. `status` is its HTTP status, 0 where none came; `request_id` its own name for the request."""

    def __init__(self, message: str, *, status: int = 0, request_id: str = "") -> None:
        said = f" (the provider's request id is {request_id})" if request_id else ""
        super().__init__(message + said)
        self.status = status
        self.request_id = request_id


class ProviderUnavailable(ProviderError):
    """The provider was not reached, hung up, timed out or answered 5xx."""

    retry_after_s = 1.0


class ProviderRateLimited(ProviderError):
    """The provider answered 429 until no attempt was left; it asked to wait `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float, status: int = 429, request_id: str = "") -> None:
        super().__init__(message, status=status, request_id=request_id)
        self.retry_after_s = retry_after_s


class ProviderMisbehaved(ProviderError):
    """What the provider answered cannot be read as an answer."""


class ProviderDenied(ProviderError):
    """The provider does not take the backend's key, or the key may not do what was asked."""


class ProviderRefused(ProviderError):
    """The provider refused this request as it is; `parameter` is the field that it blames, if it named one."""

    def __init__(self, message: str, *, status: int = 400, request_id: str = "", parameter: str | None = None) -> None:
        super().__init__(message, status=status, request_id=request_id)
        self.parameter = parameter
