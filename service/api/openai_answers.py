"""The bodies that OpenAI's endpoints answer with: whole, or as chunks of a stream.

What chat and completions have in common is in `Shape`; how each shows a choice, in its subclass.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from service.api.answers import DONE, event
from service.api.openai_shapes import OpenAIBody
from service.engines.base import Delta, Finish, GenerationRequest, Prompted, TokenLogprob, ToolCallPiece, Usage
from service.engines.collecting import Answer, Answers, total
from service.routing.generation import Batch
from service.routing.plan import Target
from service.routing.run import Run

# What OpenAI answers for a token that is as good as impossible; JSON has no infinity.
_LOWEST_LOGPROB = -9999.0


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage, and the soft prompt's virtual tokens beside it."""
    body: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "virtual_tokens": usage.virtual_tokens,
    }
    if usage.cached_prompt_tokens:
        body["prompt_tokens_details"] = {"cached_tokens": usage.cached_prompt_tokens}
    return body


def logprob_body(entry: TokenLogprob) -> dict[str, Any]:
    """A token with those that might have stood in its place, as chat completions and responses show it."""
    return {**_chat_logprob(entry), "top_logprobs": [_chat_logprob(other) for other in entry.top]}


def answer_headers(target: Target, runs: Sequence[Run]) -> dict[str, str]:
    """Who answers; and whether an answer waited until it was accepted, which no stream can show otherwise."""
    headers = {"x-softcue-version": target.label or "base", "x-softcue-backend": target.backend}
    return {**headers, "x-softcue-held-back": "true"} if any(run.held_back for run in runs) else headers


def system_fingerprint(target: Target) -> str:
    """What answered, by its label and, of a version, by the begin of its digest."""
    if target.version is None:
        return target.label or "base"
    return f"{target.label}:{target.version.digest[:12]}"


def path_body(runs: Sequence[Run]) -> dict[str, Any]:
    """The path that each prompt's answer took, and what all of them cost: what is known only at the end."""
    shown = [run.document() for run in runs]
    whole = shown[0] if len(shown) == 1 else {"cost": sum(run.cost for run in runs), "prompts": shown}
    return {"softcue": whole}


class Shape(ABC):
    """The bodies of one answer. Choice j of prompt i has the index i * n + j."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, batch: Batch, body: OpenAIBody, asked: GenerationRequest) -> None:
        self._batch = batch
        self._asked = asked
        self._prompt_alternatives = body.prompt_logprobs
        self.headers = answer_headers(batch.target, batch.runs)
        self._common: dict[str, Any] = {
            "id": self.id_prefix + batch.id,
            "created": batch.created_s,
            "model": body.model,
            "system_fingerprint": system_fingerprint(batch.target),
        }

    def whole(self, given: Sequence[Answers]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        n = self._asked.n
        choices = [
            {"index": place * n + index, "finish_reason": answer.finish_reason} | self._choice(answer, answers.prompted)
            for place, answers in enumerate(given)
            for index, answer in enumerate(answers.answers)
        ]
        body = {**self._common, "object": self.whole_object, "choices": choices}
        body["usage"] = usage_body(total(answers.usage for answers in given))
        return body | self._beside(given[0]) | path_body(self._batch.runs)

    async def stream(self, *, include_usage: bool) -> AsyncGenerator[bytes]:
        """The same as server-sent events, OpenAI's chunks and `[DONE]` at the end."""
        n = self._asked.n
        without_usage: dict[str, Any] = {"usage": None} if include_usage else {}
        common = {**self._common, "object": self.chunk_object, **without_usage}

        def chunk(index: int, choice: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
            return event({**common, "choices": [{"index": index, "finish_reason": reason, **choice}], **more})

        usages: list[Usage] = []
        ended: set[int] = set()
        waiting: list[tuple[int, str, dict[str, Any]]] = []  # endings, until what is known only then is known

        def endings(**last: Any) -> list[bytes]:
            chunks = [
                chunk(index, self._ending(), reason, **more, **(last if place == len(waiting) - 1 else {}))
                for place, (index, reason, more) in enumerate(waiting)
            ]
            waiting.clear()
            return chunks

        async with aclosing(self._batch.events()) as events:
            for index in range(n):
                for choice in self._opening():
                    yield chunk(index, choice)
            async for place, item in events:
                choices = range(place * n, place * n + n)
                match item:
                    case Prompted():
                        for index in choices:
                            for choice in self._echoed(index, item):
                                yield chunk(index, choice)
                    case Delta():
                        for ending in endings():
                            yield ending
                        index = choices[item.index]
                        if item.text or item.logprobs or item.tool_calls or item.refusal:
                            yield chunk(index, self._piece(index, item))
                        if item.finish_reason is not None:
                            ended.add(index)
                            more = {} if item.agreement is None else {"agreement": item.agreement}
                            waiting.append((index, item.finish_reason, more))
                    case Finish(reason, usage):
                        usages.append(usage)
                        # One without any token, say.
                        waiting += [(index, reason, {}) for index in choices if index not in ended]
        path = path_body(self._batch.runs)
        for ending in endings(**({} if include_usage else path)):
            yield ending
        if include_usage:
            yield event({**common, "choices": [], "usage": usage_body(total(usages)), **path})
        yield DONE

    @abstractmethod
    def _choice(self, answer: Answer, prompted: Prompted | None) -> dict[str, Any]:
        """A whole choice, without index and finish reason."""

    def _opening(self) -> Iterable[dict[str, Any]]:
        """What the stream of a choice begins with, before anything is made."""
        return ()

    def _echoed(self, index: int, prompted: Prompted) -> Iterable[dict[str, Any]]:
        """What a choice's stream shows of its prompt."""
        return ()

    @abstractmethod
    def _piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """More of a choice: text with its log-probabilities, tool calls, refusal."""

    @abstractmethod
    def _ending(self) -> dict[str, Any]:
        """What stands beside the finish reason."""

    def _beside(self, answers: Answers) -> dict[str, Any]:
        """What stands beside the choices, by the answers to the first prompt."""
        agreement = answers.answers[0].agreement
        return {} if agreement is None else {"agreement": agreement}

    def _prompt_logprobs(self, prompted: Prompted | None) -> dict[str, Any]:
        """vLLM's `prompt_logprobs`, where they were asked for: a token's id to what is known of it, for each place."""
        if self._prompt_alternatives is None or prompted is None:
            return {}
        return {"prompt_logprobs": [_vllm_logprob(entry, self._prompt_alternatives) for entry in prompted.logprobs]}


class ChatShape(Shape):
    """`chat.completion` and its chunks."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _choice(self, answer: Answer, prompted: Prompted | None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": answer.refusal or None}
        if answer.tool_calls:
            message["tool_calls"] = [_tool_call(call) for call in answer.tool_calls]
        if not answer.text and (answer.tool_calls or answer.refusal):
            message["content"] = None
        return {"message": message, "logprobs": self._logprobs(answer.logprobs)}

    def _opening(self) -> Iterable[dict[str, Any]]:
        yield {"delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}

    def _piece(self, index: int, delta: Delta) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if delta.text or delta.logprobs:
            more["content"] = delta.text
        if delta.refusal:
            more["refusal"] = delta.refusal
        if delta.tool_calls:
            more["tool_calls"] = [{"index": piece.index, **_tool_call(piece)} for piece in delta.tool_calls]
        return {"delta": more, "logprobs": self._logprobs(delta.logprobs)}

    def _ending(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def _beside(self, answers: Answers) -> dict[str, Any]:
        return super()._beside(answers) | self._prompt_logprobs(answers.prompted)

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        return {"content": [logprob_body(entry) for entry in entries], "refusal": None}


class CompletionShape(Shape):
    """`text_completion`, which is what its chunks are too."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, batch: Batch, body: OpenAIBody, asked: GenerationRequest) -> None:
        super().__init__(batch, body, asked)
        self._offsets: defaultdict[int, _Offsets] = defaultdict(_Offsets)

    def _choice(self, answer: Answer, prompted: Prompted | None) -> dict[str, Any]:
        offsets, logprobs, text = _Offsets(), None, answer.text
        if prompted is not None and self._asked.echo:
            text = prompted.text + text
        if self._asked.logprobs is not None:
            tokens = [*self._prompt_tokens(prompted), *map(_token, answer.logprobs)]
            logprobs = self._logprobs(tokens, offsets)
        return {"text": text, "logprobs": logprobs, **self._prompt_logprobs(prompted)}

    def _echoed(self, index: int, prompted: Prompted) -> Iterable[dict[str, Any]]:
        if self._asked.echo:
            logprobs = None
            if self._asked.logprobs is not None:
                logprobs = self._logprobs(self._prompt_tokens(prompted), self._offsets[index])
            yield {"text": prompted.text, "logprobs": logprobs}

    def _piece(self, index: int, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if self._asked.logprobs is not None:
            logprobs = self._logprobs([_token(entry) for entry in delta.logprobs], self._offsets[index])
        return {"text": delta.text, "logprobs": logprobs}

    def _ending(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _prompt_tokens(self, prompted: Prompted | None) -> list[_Token]:
        """The echoed prompt's tokens; the first may have no log-probability."""
        if prompted is None or not self._asked.echo:
            return []
        pairs = zip(prompted.pieces, prompted.logprobs, strict=True)
        return [(text, data, entry) for (text, data), entry in pairs]

    def _logprobs(self, tokens: Sequence[_Token], offsets: _Offsets) -> dict[str, Any]:
        entries = [entry for _, _, entry in tokens]
        return {
            "tokens": [text for text, _, _ in tokens],
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": [offsets.take(data) for _, data, _ in tokens],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The most probable tokens, and the token itself, which need not be among them."""
        top = {other.text: _finite(other.logprob) for other in entry.top[: self._asked.logprobs]}
        return {**top, entry.text: _finite(entry.logprob)}


_Token = tuple[str, bytes, TokenLogprob | None]


class _Offsets:
    """Where each token of a choice's text begins, in characters. Bytes that are half a character count with its end."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def take(self, data: bytes) -> int:
        """Where this token begins; the next begins where it ends."""
        begin = self._characters
        self._characters += len(self._decoder.decode(data))
        return begin


def _token(entry: TokenLogprob) -> _Token:
    return entry.text, entry.data, entry


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)


def _tool_call(piece: ToolCallPiece) -> dict[str, Any]:
    """A call, or more of one: what is not its first piece has arguments alone."""
    if not piece.name:
        return {"function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"id": piece.id, "type": "function", "function": function}


def _chat_logprob(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.text, "logprob": _finite(entry.logprob), "bytes": list(entry.data)}


def _vllm_logprob(entry: TokenLogprob | None, alternatives: int) -> dict[str, Any] | None:
    """The alternatives by their rank, and the token itself, of unknown rank where it is not among them."""
    if entry is None:
        return None
    ranked = {other.token_id: (other, rank) for rank, other in enumerate(entry.top[:alternatives], 1)}
    known: dict[int, tuple[TokenLogprob, int | None]] = {entry.token_id: (entry, None), **ranked}
    return {
        str(token): {"logprob": _finite(one.logprob), "rank": rank, "decoded_token": one.text}
        for token, (one, rank) in known.items()
    }
