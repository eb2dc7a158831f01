"""Answers in: a provider's JSON objects, whole answers or chunks of a stream, as our events. Pure.

Fields that we do not know and finish reasons that we do not know are let pass; an answer without what an answer needs,
or with something of another type in its place, raises ProviderMisbehaved, and one that was given up
ProviderUnavailable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from service.engines.base import Delta, Finish, FinishReason, TokenLogprob, ToolCallPiece, Usage
from service.engines.errors import ProviderMisbehaved, ProviderUnavailable
from service.engines.remote.failures import cleaned_id
from service.engines.remote.request_body import CHOICE, Endpoint

NO_TOKEN_ID = -1
"""The `token_id` of tokens whose ids a provider keeps to itself."""

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "model_length": "length",  # Mistral's, for the context's end
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}
_GIVEN_UP = frozenset({"error", "abort"})  # Mistral's and vLLM's
_WITHOUT_CONTENT = frozenset({"length", "content_filter", "tool_calls"})
_BEFORE_CHOICE = re.compile(rf'\s*\{{\s*"{CHOICE}"\s*:\s*"')

_Count = Annotated[int, Meta(ge=0, lt=2**31)]
_Byte = Annotated[int, Meta(ge=0, le=255)]


class _Function(Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _ToolCall(Struct):
    function: _Function
    index: _Count | None = None
    id: str | None = None


class _Part(Struct):
    """Of a content in parts, as Mistral's models that think give it; only text is looked at."""

    text: str = ""


class _Message(Struct):
    """A chat choice's message, and its delta in a stream."""

    content: str | list[_Part] | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Alternative(Struct):
    token: str
    logprob: float
    bytes: list[_Byte] | None = None


class _Token(_Alternative):
    top_logprobs: list[_Alternative] | None = None


class _Logprobs(Struct):
    """In chat's form (`content`, `refusal`) or in that of completions, which some providers use for chat too.

    Alternatives of all tokens in one object, as Together describes them, cannot be told apart and are left aside.
    """

    content: list[_Token] | None = None
    refusal: list[_Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | dict[str, float] | None = None


class _ChatChoice(Struct):
    message: _Message
    index: _Count = 0
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _TextChoice(Struct):
    text: str
    index: _Count = 0
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _ChunkChoice(Struct):
    """Together shows a bare number where others have `logprobs`: that of the one token that the delta is."""

    delta: _Message | None = None
    text: str | None = None
    index: _Count = 0
    finish_reason: str | None = None
    logprobs: _Logprobs | float | None = None
    top_logprobs: dict[str, float] | None = None


class _PromptDetails(Struct):
    cached_tokens: _Count | None = None


class _Usage(Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    virtual_tokens: _Count | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _ChatAnswer(Struct):
    choices: list[_ChatChoice]
    id: str | None = None
    usage: _Usage | None = None


class _TextAnswer(Struct):
    choices: list[_TextChoice]
    id: str | None = None
    usage: _Usage | None = None


class _Chunk(Struct):
    choices: list[_ChunkChoice] = []
    id: str | None = None
    usage: _Usage | None = None


class _Wrapped(Struct):
    choice: str


_decode_wrapped = msgspec.json.Decoder(_Wrapped).decode


def read_answer(
    document: Any, endpoint: Endpoint, *, n: int = 1, wrapped: bool = False, request_id: str = ""
) -> tuple[list[Delta], Finish]:
    """A whole answer: one Delta a choice, in the order of the choices, and its Finish.

    With `wrapped` the text of each is what stands in its JSON object, and its log-probabilities are those of that text.
    `request_id` is the provider's, from a header; without one the answer's own id stands for it.
    """
    answer: _ChatAnswer | _TextAnswer
    try:
        if endpoint == "chat/completions":
            answer = msgspec.convert(document, _ChatAnswer)
        else:
            answer = msgspec.convert(document, _TextAnswer)
        deltas = [_whole(choice, request_id) for choice in answer.choices]
    except ValueError as error:  # msgspec's errors are ValueErrors; so is what zip says of lengths
        raise _unreadable(error, request_id) from error
    deltas.sort(key=lambda delta: delta.index)
    if [delta.index for delta in deltas] != list(range(n)):
        raise ProviderMisbehaved(
            f"the provider was asked for {n} choices and answered with those at {[delta.index for delta in deltas]}",
            request_id=request_id,
        )
    if wrapped:
        deltas = [_unwrapped(delta, request_id) for delta in deltas]
    reason = deltas[0].finish_reason
    assert reason is not None
    return deltas, Finish(reason, _usage(answer.usage, deltas), request_id or cleaned_id(answer.id or ""))


class StreamedAnswer:
    """The chunks of one stream, read in turn; `finish` once the stream has ended.

    `request_id` as in `read_answer`.
    """

    def __init__(self, n: int = 1, request_id: str = "") -> None:
        self._n = n
        self._request_id = request_id
        self._reasons: dict[int, FinishReason] = {}
        self._calls: dict[int, dict[int, str]] = {}
        self._usage: _Usage | None = None
        self._pieces = 0

    def read(self, document: Any) -> list[Delta]:
        """The deltas of one chunk; often one, and none where a chunk says nothing new."""
        try:
            chunk = msgspec.convert(document, _Chunk)
            if chunk.usage is not None:
                self._usage = chunk.usage
            if chunk.id and not self._request_id:
                self._request_id = cleaned_id(chunk.id)
            return [delta for choice in chunk.choices if (delta := self._delta(choice)) is not None]
        except ValueError as error:
            raise _unreadable(error, self._request_id) from error

    def _delta(self, choice: _ChunkChoice) -> Delta | None:
        said = choice.delta
        text = (choice.text or "") if said is None else _text(said.content)
        refusal = (said.refusal or "") if said is not None else ""
        calls = self._tool_calls(choice.index, said.tool_calls) if said is not None and said.tool_calls else ()
        reason = _reason(choice.finish_reason, self._request_id) if choice.finish_reason is not None else None
        logprobs = _chunk_logprobs(choice, text)
        index = choice.index
        if not (text or refusal or calls or logprobs) and (reason is None or index in self._reasons):
            return None
        if index >= self._n or index in self._reasons:
            raise ProviderMisbehaved(
                f"the provider's stream goes on with choice {index}, which "
                + ("was not asked for" if index >= self._n else "has ended"),
                request_id=self._request_id,
            )
        if reason is not None:
            self._reasons[index] = reason
        self._pieces += bool(text or refusal or calls)
        return Delta(text, (), index, logprobs, reason, None, calls, refusal)

    def _tool_calls(self, choice: int, calls: Iterable[_ToolCall]) -> tuple[ToolCallPiece, ...]:
        begun = self._calls.setdefault(choice, {})
        pieces = []
        for call in calls:
            place = _place(begun, call)
            if call.id:
                begun.setdefault(place, call.id)
            pieces.append(_tool_call(place, call))
        return tuple(pieces)

    def finish(self) -> Finish:
        """What follows the last delta. Raises ProviderMisbehaved for a stream that ended before all of its choices.

        Where the provider counts no tokens of streams, the pieces that came are the completion's, and the prompt's
        are 0.
        """
        if len(self._reasons) < self._n:
            missing = [index for index in range(self._n) if index not in self._reasons]
            raise ProviderMisbehaved(
                f"the provider's stream ended before its choices {missing} did", request_id=self._request_id
            )
        usage = Usage(0, self._pieces) if self._usage is None else _counted(self._usage)
        return Finish(self._reasons[0], usage, self._request_id)


def before_choice(text: str) -> str | None:
    """What stands before the choice's own characters in a wrapped answer; None where it is not of that form."""
    found = _BEFORE_CHOICE.match(text)
    return found[0] if found else None


def unwrapped_text(text: str) -> str | None:
    """The choice in a wrapped answer's text; None where it holds none."""
    try:
        return _decode_wrapped(text).choice
    except ValueError:
        return None


def _whole(choice: _ChatChoice | _TextChoice, request_id: str) -> Delta:
    if choice.finish_reason is None:
        raise ProviderMisbehaved(
            f"choice {choice.index} of the provider's answer does not say why it ended", request_id=request_id
        )
    reason = _reason(choice.finish_reason, request_id)
    logprobs = _logprobs(choice.logprobs) if choice.logprobs is not None else ()
    if isinstance(choice, _TextChoice):
        return Delta(choice.text, (), choice.index, logprobs, reason)
    message = choice.message
    # Whole calls stand in their order; some providers number all of them 0.
    calls = tuple(_tool_call(place, call) for place, call in enumerate(message.tool_calls or ()))
    if message.content is None and not calls and not message.refusal and reason not in _WITHOUT_CONTENT:
        raise ProviderMisbehaved(
            f"choice {choice.index} of the provider's answer has no content", request_id=request_id
        )
    return Delta(_text(message.content), (), choice.index, logprobs, reason, None, calls, message.refusal or "")


def _reason(said: str, request_id: str) -> FinishReason:
    """Raises ProviderUnavailable for an answer that the provider gave up."""
    if said in _GIVEN_UP:
        raise ProviderUnavailable(
            f"the provider gave the answer up ({said}); send the request again", request_id=request_id
        )
    return _REASONS.get(said, "stop")


def _text(content: str | list[_Part] | None) -> str:
    return "".join(part.text for part in content) if isinstance(content, list) else content or ""


def _place(begun: dict[int, str], call: _ToolCall) -> int:
    """Where a piece belongs among the calls that have `begun`, whose ids are given by their places.

    Where the provider says nothing of that, or gives several calls the same number (Mistral's is 0 unless it is said),
    whatever has another id and a name is a call of its own.
    """
    begins = bool(call.id and call.function.name)
    if call.index is not None and not (begins and begun.get(call.index, call.id) != call.id):
        return call.index
    known = next((place for place, name in begun.items() if name == call.id), None)
    if known is not None:
        return known
    return max(begun, default=-1) + 1 if call.id else max(begun, default=0)


def _tool_call(place: int, call: _ToolCall) -> ToolCallPiece:
    arguments = call.function.arguments
    if isinstance(arguments, dict):
        arguments = msgspec.json.encode(arguments).decode()
    return ToolCallPiece(place, arguments or "", call.id or "", call.function.name or "")


def _logprobs(given: _Logprobs) -> tuple[TokenLogprob, ...]:
    if given.content is not None or given.refusal is not None:
        return tuple(
            _token(token, tuple(_token(other) for other in token.top_logprobs or ()))
            for token in (*(given.content or ()), *(given.refusal or ()))
        )
    if given.tokens is None or given.token_logprobs is None:
        return ()
    tops = given.top_logprobs if isinstance(given.top_logprobs, list) else [None] * len(given.tokens)
    return tuple(
        _named(text, logprob, tuple(_named(other, value) for other, value in _by_probability(top)))
        for text, logprob, top in zip(given.tokens, given.token_logprobs, tops, strict=True)
        if logprob is not None
    )


def _chunk_logprobs(choice: _ChunkChoice, text: str) -> tuple[TokenLogprob, ...]:
    if choice.logprobs is None:
        return ()
    if isinstance(choice.logprobs, _Logprobs):
        return _logprobs(choice.logprobs)
    top = tuple(_named(other, value) for other, value in _by_probability(choice.top_logprobs))
    return (_named(text, choice.logprobs, top),)


def _token(token: _Alternative, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    data = token.token.encode() if token.bytes is None else bytes(token.bytes)
    return TokenLogprob(NO_TOKEN_ID, token.logprob, top, token.token, data)


def _named(text: str, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(NO_TOKEN_ID, logprob, top, text, text.encode())


def _by_probability(top: dict[str, float] | None) -> list[tuple[str, float]]:
    return sorted((top or {}).items(), key=lambda entry: -entry[1])


def _usage(usage: _Usage | None, deltas: list[Delta]) -> Usage:
    return Usage(0, sum(len(delta.logprobs) for delta in deltas)) if usage is None else _counted(usage)


def _counted(usage: _Usage) -> Usage:
    details = usage.prompt_tokens_details
    return Usage(
        usage.prompt_tokens or 0,
        usage.completion_tokens or 0,
        usage.virtual_tokens or 0,
        (details.cached_tokens or 0) if details is not None else 0,
    )


def _unwrapped(delta: Delta, request_id: str) -> Delta:
    """The choice alone. A refusal, and what a filter left, stay as they are."""
    if delta.refusal or delta.finish_reason == "content_filter":
        return delta
    choice, before = unwrapped_text(delta.text), before_choice(delta.text)
    if choice is None or before is None:
        cut = "; it was cut, so raise max_tokens" if delta.finish_reason == "length" else ""
        raise ProviderMisbehaved(
            f"the provider was asked for one of several choices and answered with another form{cut}",
            request_id=request_id,
        )
    begin, end = len(before.encode()), len(delta.text[: delta.text.rfind('"')].encode())
    logprobs: list[TokenLogprob] = []
    position = 0
    for entry in delta.logprobs:
        if position < end and position + len(entry.data) > begin:
            logprobs.append(entry)
        position += len(entry.data)
    return Delta(choice, (), delta.index, tuple(logprobs), delta.finish_reason)


def _unreadable(error: Exception, request_id: str) -> ProviderMisbehaved:
    return ProviderMisbehaved(
        f"the provider's answer cannot be read as one: {error}; check the backend's url and flavour",
        request_id=request_id,
    )
