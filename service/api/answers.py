"""Answers as HTTP: JSON, event streams, and the one table from errors to statuses.

An event stream closes its generator itself when the client leaves, because a server may never do so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import msgspec
from litestar import Request, Response
from litestar.enums import MediaType
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from litestar.types import ASGIApp, Receive, Scope, Send
from pydantic import BaseModel

from prompt_store import errors as store
from service.api import errors as api
from service.engines import errors as engine
from service.ledger.journal import JournalUnavailable
from service.routing import errors as routing

log = logging.getLogger(__name__)

T = TypeVar("T")

INVALID = "invalid_request_error"
UNAVAILABLE = "server_error"
RATE_LIMIT = "rate_limit_error"

# Every error type of our trees: HTTP status, OpenAI's error type, code. A test proves the table complete.
STATUS: dict[type[Exception], tuple[int, str, str]] = {
    store.StoreError: (500, UNAVAILABLE, "store_error"),
    store.NotFound: (404, INVALID, "not_found"),
    store.UnknownTask: (404, INVALID, "model_not_found"),
    store.UnknownVersion: (404, INVALID, "model_not_found"),
    store.UnknownAlias: (404, INVALID, "model_not_found"),
    store.UnknownBase: (404, INVALID, "base_not_found"),
    store.InvalidName: (400, INVALID, "invalid_name"),
    store.InvalidTask: (400, INVALID, "invalid_task"),
    store.InvalidInputs: (400, INVALID, "invalid_inputs"),
    store.InvalidArtifact: (400, INVALID, "invalid_artifact"),
    store.DamagedArtifact: (503, UNAVAILABLE, "damaged_version"),
    store.BaseMismatch: (400, INVALID, "base_mismatch"),
    store.UnknownExperiment: (404, INVALID, "experiment_not_found"),
    store.InvalidExperiment: (400, INVALID, "invalid_experiment"),
    store.InvalidOutcome: (400, INVALID, "invalid_outcome"),
    store.InvalidRoute: (400, INVALID, "invalid_route"),
    store.Conflict: (409, INVALID, "conflict"),
    store.InUse: (409, INVALID, "version_in_use"),
    store.KeyReused: (422, INVALID, "idempotency_key_reused"),
    store.NotYetSupported: (400, INVALID, "not_supported"),
    store.SchemaMismatch: (500, UNAVAILABLE, "schema_mismatch"),
    store.StoreUnavailable: (503, UNAVAILABLE, "store_unavailable"),
    engine.EngineError: (500, UNAVAILABLE, "engine_error"),
    engine.BaseModelError: (503, UNAVAILABLE, "base_model_error"),
    engine.BackendError: (503, UNAVAILABLE, "backend_error"),
    engine.RequestError: (400, INVALID, "invalid_request"),
    engine.PromptTooLong: (400, INVALID, "context_length_exceeded"),
    engine.UnsupportedFeature: (400, INVALID, "unsupported_parameter"),
    engine.InvalidRequest: (400, INVALID, "invalid_value"),
    engine.WrongBase: (409, INVALID, "base_mismatch"),
    engine.GenerationFailed: (500, UNAVAILABLE, "generation_failed"),
    engine.DeadlineExceeded: (504, UNAVAILABLE, "deadline_exceeded"),
    engine.QueueFull: (429, RATE_LIMIT, "queue_full"),
    engine.EngineUnavailable: (503, UNAVAILABLE, "engine_unavailable"),
    engine.CircuitOpen: (503, UNAVAILABLE, "circuit_open"),
    engine.ProviderError: (502, UNAVAILABLE, "provider_error"),
    engine.ProviderUnavailable: (503, UNAVAILABLE, "provider_unavailable"),
    engine.ProviderRateLimited: (429, RATE_LIMIT, "provider_rate_limited"),
    engine.ProviderMisbehaved: (502, UNAVAILABLE, "provider_misbehaved"),
    engine.ProviderDenied: (502, UNAVAILABLE, "provider_denied"),
    engine.ProviderRefused: (400, INVALID, "provider_refused"),
    routing.RoutingError: (500, UNAVAILABLE, "routing_error"),
    routing.NotServed: (404, INVALID, "model_not_found"),
    routing.WrongTaskKind: (400, INVALID, "wrong_task_kind"),
    routing.ModelRetired: (404, INVALID, "model_retired"),
    routing.CostCeilingReached: (429, RATE_LIMIT, "cost_ceiling_reached"),
    routing.UnknownGeneration: (404, INVALID, "generation_not_found"),
    JournalUnavailable: (503, UNAVAILABLE, "journal_unavailable"),
    api.ApiError: (500, UNAVAILABLE, "internal_error"),
    api.BodyTooLarge: (413, INVALID, "body_too_large"),
    api.InvalidBody: (400, INVALID, "invalid_body"),
    api.UnknownParameter: (400, INVALID, "unknown_parameter"),
    api.InvalidCondition: (400, INVALID, "invalid_condition"),
    api.PreconditionRequired: (428, INVALID, "precondition_required"),
    api.PreconditionFailed: (412, INVALID, "precondition_failed"),
    api.Forbidden: (403, INVALID, "forbidden"),
    api.InvalidOutcomes: (400, INVALID, "invalid_outcome"),
    api.UnknownBackend: (404, INVALID, "backend_not_found"),
    api.UnknownReplica: (404, INVALID, "replica_not_found"),
}


class ErrorDetail(BaseModel):
    """OpenAI's error: the fact and the remedy, a kind, the parameter at fault and a code where there are any."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


# Of Litestar's own refusals, those that a program may want to tell from others; the first is ours too.
_CODES = {413: "body_too_large", 415: "unsupported_media_type", 405: "method_not_allowed"}

_MEANINGS: dict[int, str] = {
    400: "The request is at fault",
    403: "The key that came with it does not allow that",
    404: "Nothing has that name",
    409: "It contradicts what is there: another base model, or something that is in use",
    412: "It is not what the request expected",
    413: "The body is too large",
    415: "The body is of a type that is not taken here",
    422: "The idempotency key came with another request before",
    428: "The request must say what it expects to be there",
    429: "Too many requests wait, or the task has cost its day's ceiling; see retry-after",
    500: "The service failed",
    502: "A provider behind the task's backend failed or gave no answer that can be read",
    503: "Engine, store or journal is away; send the request again",
    504: "The request's own deadline passed",
}


def errors(*statuses: int) -> dict[int, ResponseSpec]:
    """What a handler may answer instead of a success, for its description."""
    return {
        status: ResponseSpec(ErrorBody, description=_MEANINGS[status], generate_examples=False) for status in statuses
    }


def success(status: int, body: type[BaseModel]) -> dict[int, ResponseSpec]:
    """What a handler may answer beside its usual status."""
    meaning = {200: "It was there already", 201: "It was created"}[status]
    return {status: ResponseSpec(body, description=meaning, generate_examples=False)}


ERRORS = errors(400, 404, 409, 413, 415, 429, 500, 502, 503, 504)


def error_body(message: str, kind: str, code: str | None, parameter: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error. What is not ours is a 500 that says nothing of its inside."""
    known = STATUS.get(type(error))
    if known is None:
        log.error("unexpected error", exc_info=error)
        body = error_body("something went wrong inside the service; its log says what", UNAVAILABLE, "internal_error")
        return 500, body, {}
    status, kind, code = known
    headers: dict[str, str] = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(retry_after_s)))
    return status, error_body(str(error), kind, code, getattr(error, "parameter", None)), headers


def answer_error(_: Request[Any, Any, Any], error: Exception) -> Response[dict[str, Any]]:
    """Litestar's handler for every error of ours, and for what nobody expected."""
    status, body, headers = describe(error)
    return Response(body, status_code=status, media_type=MediaType.JSON, headers=headers)


def answer_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[dict[str, Any]]:
    """Litestar's own refusals (validation, unknown path, wrong method) in the same shape."""
    message, parameter = str(error.detail), None
    code = _CODES.get(error.status_code) if error.status_code < 500 else "internal_error"
    problems = error.extra if isinstance(error.extra, list) else []
    if problems and isinstance(problems[0], dict) and problems[0].get("key") == "data":
        message = "the body is not a JSON object; send one"
    elif problems and isinstance(problems[0], dict):
        parameter = str(problems[0].get("key") or "") or None
        told = str(problems[0].get("message", message)).removeprefix("Value error, ")
        message = f"{parameter or 'the body'}: {told}"
    elif error.status_code == 413:
        limit = request.route_handler.resolve_request_max_body_size()
        message = f"the body is larger than the limit of {limit} bytes; send less, or raise server.max_body_bytes"
    elif error.status_code == 404:
        message = f"there is nothing at {request.url.path}; /schema lists what there is"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed at {request.url.path}; /schema lists what is"
    kind = INVALID if error.status_code < 500 else UNAVAILABLE
    body = error_body(message, kind, code, parameter)
    return Response(body, status_code=error.status_code, media_type=MediaType.JSON, headers=error.headers or {})


def answer_unreadable(_: Request[Any, Any, Any], error: Exception) -> Response[dict[str, Any]]:
    """A body that is not UTF-8, or nested so deeply that no parser follows."""
    what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "nested too deeply"
    body = error_body(f"the body is {what}; send JSON in UTF-8", INVALID, None)
    return Response(body, status_code=400, media_type=MediaType.JSON)


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"


class EventStream(Response[None]):
    """A streamed answer of server-sent events.

    However it ends, it closes their generator and then calls `close`: a generator that never began runs no `finally`.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], headers: Mapping[str, str], close: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(None, headers=headers)
        self._events = events
        self._close = close
        self._raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ]

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIApp:  # type: ignore[override]
        """Litestar's hook: this answer is its own ASGI application."""
        return self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientLeft):  # nobody reads on
                async with _WhileConnected(receive):
                    await self._stream(send)
        finally:
            await self._events.aclose()
            await self._close()

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._raw_headers})
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:  # the status is sent already, so the error travels as an event
            _, body, _ = describe(error)
            await send({"type": "http.response.body", "body": event(body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ClientLeft(Exception):
    """The client closed the connection before its answer was ready; nobody reads what is answered now."""


@asynccontextmanager
async def while_connected(request: Request[Any, Any, Any]) -> AsyncIterator[None]:
    """Cancels what is awaited inside when the client leaves; ClientLeft comes out then."""
    await request.body()  # from here on, the next message can only be the disconnect
    async with _WhileConnected(request.receive):
        yield


def answer_client_left(_: Request[Any, Any, Any], __: ClientLeft) -> Response[None]:
    return Response(None, status_code=499)


class _WhileConnected:
    """Cancels what runs inside when the client leaves; ClientLeft comes out then.

    The work stays in the task that it is in and one other task watches: tasks are most of what waiting costs.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = False

    async def __aenter__(self) -> None:
        working = asyncio.current_task()
        assert working is not None
        self._working = working
        self._watching = asyncio.create_task(self._watch())

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._watching.cancel()
        # Whoever else cancelled the task is still waiting for it to end.
        if self._left and self._working.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientLeft from error

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._working.cancel()
