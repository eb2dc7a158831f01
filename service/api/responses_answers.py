"""What `/v1/responses` answers with: a response, or the events that it comes to be by.

An answer is a list of output items: a message with its text or refusal, and calls of functions. Each is told
as added, by deltas while it is made, and as done.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from service.api.answers import describe, event
from service.api.openai_answers import answer_headers, logprob_body, path_body, system_fingerprint
from service.api.responses_shapes import ResponseBody
from service.engines.base import Delta, Finish, FinishReason, TokenLogprob, ToolCallPiece, Usage
from service.engines.collecting import Answers
from service.routing.generation import Batch
from service.routing.questions import sampling_defaults

Events = Iterator[dict[str, Any]]
Status = Literal["in_progress", "completed", "incomplete", "failed"]

# Why a response is incomplete, by the reason its generation ended with; one that ended with another is complete.
_INCOMPLETE: dict[FinishReason, str] = {"length": "max_output_tokens", "content_filter": "content_filter"}
# OpenAI has a closed list of codes for responses that failed; the rest are `server_error`.
_FAILED: dict[int, str] = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


def response_usage(usage: Usage) -> dict[str, Any]:
    """Usage as responses have it, and the soft prompt's virtual tokens beside it."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_prompt_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "virtual_tokens": usage.virtual_tokens,
    }


@dataclass(slots=True)
class _Part:
    """Text or a refusal within a message; `place` is where, as events say it."""

    kind: Literal["output_text", "refusal"]
    place: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        annotations: dict[str, Any] = {"annotations": []} if self.kind == "output_text" else {}
        return {"type": self.kind, **self._said(), **annotations}

    def add(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """More of it; returns the event that tells so."""
        entries = [logprob_body(entry) for entry in logprobs]
        self.texts.append(text)
        self.logprobs += entries
        more = {"logprobs": entries} if self.kind == "output_text" else {}
        return {"type": f"response.{self.kind}.delta", **self.place, "delta": text, **more}

    def done(self) -> Events:
        yield {"type": f"response.{self.kind}.done", **self.place, **self._said()}
        yield {"type": "response.content_part.done", **self.place, "part": self.body()}

    def _said(self) -> dict[str, Any]:
        text = "".join(self.texts)
        return {"refusal": text} if self.kind == "refusal" else {"text": text, "logprobs": list(self.logprobs)}


@dataclass(slots=True)
class _Message:
    """An item of what the assistant says. Its parts follow each other; the last is the one that is made."""

    id: str
    index: int
    parts: list[_Part] = field(default_factory=list)
    status: Status = "in_progress"

    def body(self) -> dict[str, Any]:
        content = [part.body() for part in self.parts]
        return {"id": self.id, "type": "message", "role": "assistant", "status": self.status, "content": content}

    def say(self, kind: Literal["output_text", "refusal"], text: str, logprobs: Sequence[TokenLogprob] = ()) -> Events:
        """More of its text, or of its refusal."""
        if not self.parts or self.parts[-1].kind != kind:
            if self.parts:
                yield from self.parts[-1].done()
            place = {"item_id": self.id, "output_index": self.index, "content_index": len(self.parts)}
            self.parts.append(_Part(kind, place))
            yield {"type": "response.content_part.added", **place, "part": self.parts[-1].body()}
        yield self.parts[-1].add(text, logprobs)

    def done(self) -> Events:
        if self.parts:
            yield from self.parts[-1].done()


@dataclass(slots=True)
class _Call:
    """An item that calls a function."""

    id: str
    index: int
    call_id: str
    name: str
    arguments: list[str] = field(default_factory=list)
    status: Status = "in_progress"

    def body(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "call_id": self.call_id,
            "name": self.name,
            "arguments": "".join(self.arguments),
            "status": self.status,
        }

    def add(self, arguments: str) -> dict[str, Any]:
        self.arguments.append(arguments)
        place = {"item_id": self.id, "output_index": self.index}
        return {"type": "response.function_call_arguments.delta", **place, "delta": arguments}

    def done(self) -> Events:
        yield {
            "type": "response.function_call_arguments.done",
            "item_id": self.id,
            "output_index": self.index,
            "name": self.name,
            "arguments": "".join(self.arguments),
        }


class Output:
    """The output items of one response as deltas come; `take` and `end` give the events that tell of it.

    Calls stay open until the end: a provider may send pieces of several in turn.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._items: list[_Message | _Call] = []
        self._calls: dict[int, _Call] = {}

    def bodies(self) -> list[dict[str, Any]]:
        """The items as they stand."""
        return [item.body() for item in self._items]

    def take(self, delta: Delta) -> Events:
        """What a delta brings."""
        if delta.text or delta.logprobs:
            message = yield from self._message()
            yield from message.say("output_text", delta.text, delta.logprobs)
        if delta.refusal:
            message = yield from self._message()
            yield from message.say("refusal", delta.refusal)
        for piece in delta.tool_calls:
            call = self._calls.get(piece.index)
            if call is None:
                call = yield from self._call(piece)
            if piece.arguments:
                yield call.add(piece.arguments)

    def end(self, status: Status) -> Events:
        """Close what is open; `status` is how the last item ends. An answer that says nothing has an empty text."""
        if not self._items:
            message = yield from self._message()
            yield from message.say("output_text", "")
        for item in self._items:
            if item.status == "in_progress":
                yield from self._close(item, status if item is self._items[-1] else "completed")

    def abandon(self) -> None:
        """Nothing more comes: what is open stays incomplete."""
        for item in self._items:
            if item.status == "in_progress":
                item.status = "incomplete"

    def _message(self) -> Generator[dict[str, Any], None, _Message]:
        last = self._items[-1] if self._items else None
        if isinstance(last, _Message):
            return last
        message = _Message(f"msg_{self._name}_{len(self._items)}", len(self._items))
        yield from self._open(message)
        return message

    def _call(self, piece: ToolCallPiece) -> Generator[dict[str, Any], None, _Call]:
        last = self._items[-1] if self._items else None
        if isinstance(last, _Message):
            yield from self._close(last, "completed")
        call = _Call(f"fc_{self._name}_{len(self._items)}", len(self._items), piece.id, piece.name)
        self._calls[piece.index] = call
        yield from self._open(call)
        return call

    def _open(self, item: _Message | _Call) -> Events:
        self._items.append(item)
        yield {"type": "response.output_item.added", "output_index": item.index, "item": item.body()}

    def _close(self, item: _Message | _Call, status: Status) -> Events:
        yield from item.done()
        item.status = status
        yield {"type": "response.output_item.done", "output_index": item.index, "item": item.body()}


class ResponseShape:
    """The bodies of one response."""

    def __init__(self, batch: Batch, body: ResponseBody) -> None:
        self._batch = batch
        self._output = Output(batch.id)
        self._agreement: float | None = None
        self.headers = answer_headers(batch.target, batch.runs)
        sampling = dataclasses.replace(sampling_defaults(batch.target), **body.sampling())
        self._common: dict[str, Any] = {
            "id": f"resp_{batch.id}",
            "object": "response",
            "created_at": batch.created_s,
            "model": body.model,
            "system_fingerprint": system_fingerprint(batch.target),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "text": _text(body),
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "tools": [
                {"strict": None, "parameters": None, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()
            ],
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "safety_identifier": body.safety_identifier,
            "previous_response_id": None,
            "background": False,
            "store": False,
        } | ({"user": body.user} if body.user is not None else {})

    def whole(self, answers: Answers) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        (answer,) = answers.answers
        delta = Delta(
            answer.text,
            logprobs=answer.logprobs,
            agreement=answer.agreement,
            tool_calls=answer.tool_calls,
            refusal=answer.refusal,
        )
        for making in (self._take(delta), self._output.end(_status(answer.finish_reason))):
            deque(making, maxlen=0)
        return self._ended(answer.finish_reason, answers.usage)

    async def stream(self) -> AsyncGenerator[bytes]:
        """The same as server-sent events. What fails midway ends in `error` and `response.failed`."""
        numbers = count()

        def told(body: dict[str, Any]) -> bytes:
            name = str(body["type"])
            return f"event: {name}\n".encode() + event({**body, "sequence_number": next(numbers)})

        for name in ("response.created", "response.in_progress"):
            yield told({"type": name, "response": self._response("in_progress")})
        finish: Finish | None = None
        try:
            async with aclosing(self._batch.events()) as events:
                async for _, item in events:
                    match item:
                        case Delta():
                            for body in self._take(item):
                                yield told(body)
                        case Finish():
                            finish = item
            assert finish is not None
            status = _status(finish.reason)
            for body in self._output.end(status):
                yield told(body)
            yield told({"type": f"response.{status}", "response": self._ended(finish.reason, finish.usage)})
        except Exception as error:
            http_status, said, _ = describe(error)
            detail = said["error"]
            yield told({"type": "error", **{name: detail[name] for name in ("code", "message", "param")}})
            self._output.abandon()
            failure = {"code": _FAILED.get(http_status, "server_error"), "message": detail["message"]}
            failed = self._response("failed", error=failure, **path_body(self._batch.runs))
            yield told({"type": "response.failed", "response": failed})

    def _take(self, delta: Delta) -> Events:
        if delta.agreement is not None:
            self._agreement = delta.agreement
        return self._output.take(delta)

    def _ended(self, reason: FinishReason, usage: Usage) -> dict[str, Any]:
        status, why = _status(reason), _INCOMPLETE.get(reason)
        return self._response(
            status,
            completed_at=int(time.time()) if status == "completed" else None,
            incomplete_details={"reason": why} if why is not None else None,
            usage=response_usage(usage),
            **({} if self._agreement is None else {"agreement": self._agreement}),
            **path_body(self._batch.runs),
        )

    def _response(self, status: Status, **more: Any) -> dict[str, Any]:
        """The response as it stands."""
        facts = {"error": None, "incomplete_details": None, "completed_at": None}
        return {**self._common, "status": status, "output": self._output.bodies(), **facts, **more}


def _status(reason: FinishReason) -> Literal["completed", "incomplete"]:
    return "incomplete" if reason in _INCOMPLETE else "completed"


def _text(body: ResponseBody) -> dict[str, Any]:
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text is not None else {}
    return {"format": {"type": "text"}, **text}
