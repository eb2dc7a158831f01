"""An engine that answers from a script, for tests and demonstrations: real events, no model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from service.engines.base import (
    Capabilities,
    Delta,
    EngineStats,
    Finish,
    GenerationEvent,
    GenerationRequest,
    Messages,
    RawText,
    ScoreRequest,
    Scores,
    SoftPromptReference,
    Usage,
    check_supported,
)
from service.engines.errors import EngineError

Script = Callable[[GenerationRequest], Iterable["str | EngineError | asyncio.Event"]]


def echo(request: GenerationRequest) -> list[str]:
    """The script that repeats the last message, word by word."""
    prompt = request.prompt
    if isinstance(prompt, Messages):
        text = prompt.messages[-1].content
    else:
        text = prompt.text if isinstance(prompt, RawText) else " ".join(map(str, prompt.ids))
    words = text.split()
    return [words[0], *(f" {word}" for word in words[1:])] if words else [""]


@dataclass
class ScriptedEngine:
    """Plays `script(request)`: a text is a delta of one token, an error is raised, an event is waited for.

    `running` holds the ids of generations that have begun and not ended, `warmed` the pinned soft prompts' digests.
    A continuation scores higher the more letters it shares with the last message.
    """

    script: Script = echo
    context_length: int = 1024
    running: set[str] = field(default_factory=set)
    warmed: set[str] = field(default_factory=set)
    requests: list[GenerationRequest] = field(default_factory=list)
    _started: bool = False

    async def start(self) -> None:
        self._started = True

    async def close(self, grace_s: float = 0.0) -> None:
        self._started = False

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        check_supported(request, self.capabilities())
        request.sampling.check()
        self.requests.append(request)
        self.running.add(request.id)
        made = 0
        try:
            for item in self.script(request):
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, EngineError):
                    raise item
                else:
                    made += 1
                    yield Delta(item, (made,))
            virtual = request.soft_prompt.length if request.soft_prompt is not None else 0
            yield Finish("stop", Usage(1, made, virtual))
        finally:
            self.running.discard(request.id)

    async def score(self, request: ScoreRequest) -> Scores:
        assert isinstance(request.prompt, Messages)
        content = request.prompt.messages[-1].content
        shared = [len(set(text) & set(content)) for text in request.continuations]
        return Scores(tuple(float(count - len(content)) for count in shared), Usage(1, 0))

    async def warm(self, soft_prompt: SoftPromptReference) -> None:
        await asyncio.to_thread(soft_prompt.load)
        self.warmed.add(soft_prompt.digest)

    async def release(self, digest: str) -> None:
        self.warmed.discard(digest)

    def stats(self) -> EngineStats:
        return EngineStats(self._started, 0, len(self.running), 0, 0, len(self.warmed), 0, 0, 0)

    def capabilities(self) -> Capabilities:
        return Capabilities(frozenset({"soft_prompt", "text"}), frozenset(), self.context_length)
