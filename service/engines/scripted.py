"""An engine that answers from a script, for tests and demonstrations: real events, no model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from service.engines.base import (
    Capabilities,
    Delta,
    EngineStats,
    Finish,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Messages,
    Prompt,
    Prompted,
    RawText,
    ScoreRequest,
    Scores,
    SoftPromptReference,
    TokenIds,
    TokenLogprob,
    Usage,
)
from service.engines.errors import DeadlineExceeded, EngineError
from service.engines.features import check_supported

Script = Callable[[GenerationRequest], Iterable["str | GenerationEvent | EngineError | asyncio.Event"]]
ScoreScript = Callable[[ScoreRequest], Sequence[float]]

FEATURES = frozenset(
    {
        "n",
        "logprobs",
        "prompt_logprobs",
        "echo",
        "structured_output",
        "deadline",
        "min_p",
        "min_tokens",
        "ignore_eos",
        "stop_token_ids",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "scores",
    }
)


def echo(request: GenerationRequest) -> list[str]:
    """The script that repeats the last message, word by word."""
    return words(request.prompt) or [""]


def shared_letters(request: ScoreRequest) -> list[float]:
    """The scores by which a continuation is the more probable the more letters it shares with the last message."""
    content = "".join(words(request.prompt))
    return [float(len(set(text) & set(content)) - len(content)) for text in request.continuations]


def words(prompt: Prompt) -> list[str]:
    """The words of the last message, each a token, with the space before all but the first."""
    match prompt:
        case Messages(messages):
            text = messages[-1].content
        case RawText(text):
            pass
        case TokenIds(ids):
            text = " ".join(map(str, ids))
    found = text.split()
    return [*found[:1], *(f" {word}" for word in found[1:])]


@dataclass
class ScriptedEngine:
    """Plays `script(request)`: a text is a token of every choice, an error is raised, an event is waited for.

    A script that is to say more yields Deltas itself; it also sees to the response format. What one text's token is
    worth and which stand beside it is made up by `_logprob`. Past `max_tokens` the script is cut.
    `running` holds the ids of generations that have begun and not ended, `warmed` the pinned soft prompts' digests.
    """

    script: Script = echo
    scores: ScoreScript = shared_letters
    context_length: int = 1024
    features: frozenset[str] = FEATURES
    payload_kinds: frozenset[str] = frozenset({"soft_prompt", "prefix", "text"})
    running: set[str] = field(default_factory=set)
    warmed: set[str] = field(default_factory=set)
    requests: list[GenerationRequest] = field(default_factory=list)
    score_requests: list[ScoreRequest] = field(default_factory=list)
    _started: bool = False

    async def start(self) -> None:
        self._started = True

    async def close(self, grace_s: float = 0.0) -> None:
        self._started = False

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        check_supported(request, self.capabilities())
        request.check()
        self.requests.append(request)
        self.running.add(request.id)
        try:
            async for event in self._play(request):
                yield event
        finally:
            self.running.discard(request.id)

    async def _play(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        ends_at = time.monotonic() + request.deadline_s if request.deadline_s is not None else None
        if request.echo or request.prompt_logprobs is not None:
            yield _prompted(request)
        made = [0] * request.n
        ended: set[int] = set()
        reason: FinishReason = "stop"
        for item in self.script(request):
            match item:
                case asyncio.Event():
                    await _wait(item, ends_at)
                case EngineError():
                    raise item
                case str():
                    if made[0] >= request.sampling.max_tokens:
                        reason = "length"
                        break
                    for index in range(request.n):
                        made[index] += 1
                        entry = _logprob(made[index], item, request.logprobs)
                        yield Delta(item, (made[index],), index, (entry,) if entry is not None else ())
                case Delta():
                    made[item.index] += len(item.token_ids)
                    if item.finish_reason is not None:
                        ended.add(item.index)
                    yield item
                case Prompted():
                    yield item
                case Finish():
                    yield item
                    return
        for index in range(request.n):
            if index not in ended:
                yield Delta("", (), index, finish_reason=reason)
        virtual = request.soft_prompt.length if request.soft_prompt is not None else 0
        yield Finish(reason, Usage(len(words(request.prompt)), sum(made), virtual))

    async def score(self, request: ScoreRequest) -> Scores:
        self.score_requests.append(request)
        lengths = tuple(len(text.split()) + 1 for text in request.continuations)
        virtual = request.soft_prompt.length if request.soft_prompt is not None else 0
        return Scores(tuple(self.scores(request)), Usage(len(words(request.prompt)), 0, virtual), lengths)

    async def warm(self, soft_prompt: SoftPromptReference) -> None:
        await asyncio.to_thread(soft_prompt.load)
        self.warmed.add(soft_prompt.digest)

    async def release(self, digest: str) -> None:
        self.warmed.discard(digest)

    def stats(self) -> EngineStats:
        return EngineStats(ready=self._started, running=len(self.running), prompts=len(self.warmed))

    def capabilities(self) -> Capabilities:
        return Capabilities(self.payload_kinds, self.features, self.context_length)


async def _wait(event: asyncio.Event, ends_at: float | None) -> None:
    try:
        async with asyncio.timeout(None if ends_at is None else max(ends_at - time.monotonic(), 0.0)):
            await event.wait()
    except TimeoutError:
        raise DeadlineExceeded("the request's deadline passed before its last token; allow it more time") from None


def _logprob(place: int, text: str, alternatives: int | None) -> TokenLogprob | None:
    """Token `place` of an answer has log-probability -place / 8; its alternatives lose 1 each and gain a `~` each."""
    if alternatives is None:
        return None
    best = TokenLogprob(place, -place / 8, (), text, text.encode())
    others = (
        TokenLogprob(place + 1000 * rank, -place / 8 - rank, (), text + "~" * rank, (text + "~" * rank).encode())
        for rank in range(1, alternatives)
    )
    return TokenLogprob(place, best.logprob, (best, *others)[:alternatives], best.text, best.data)


def _prompted(request: GenerationRequest) -> Prompted:
    pieces = words(request.prompt)
    ids = tuple(range(1, len(pieces) + 1))
    if request.prompt_logprobs is None:
        return Prompted(ids, "".join(pieces))
    logprobs = [_logprob(place, text, request.prompt_logprobs) for place, text in zip(ids, pieces, strict=True)]
    if request.soft_prompt is None:
        logprobs[:1] = [None]
    return Prompted(ids, "".join(pieces), tuple(logprobs), tuple((text, text.encode()) for text in pieces))
