"""A Generation: the stream of one answer, tagged with task, version, arm and backend, measured and logged once.

A Batch is several of them that answer one request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from prompt_store.access import Principal
from service.engines.base import Delta, Finish, GenerationEvent, Usage
from service.engines.collecting import Answers, all_or_none, collect
from service.generation_ids import GenerationTag, sign, unit_hash
from service.metrics import Labels, Metrics

log = logging.getLogger("softcue.requests")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, for whom, and since when (`time.perf_counter` seconds)."""

    principal: Principal
    unit: str
    started_s: float = field(default_factory=time.perf_counter)


@dataclass(slots=True)
class Record:
    """What is known of one request while it runs; `end` writes it to metrics and log, once."""

    caller: Caller
    labels: Labels
    version_digest: str
    metrics: Metrics
    signing_key: bytes
    streamed_choices: int = 0  # of an answer whose tokens come as they are made; 0 when all of them come at its end
    id: str = field(init=False)
    created_s: int = field(init=False)
    _first_token_s: float | None = None
    _ended: bool = False

    def __post_init__(self) -> None:
        now = time.time()
        self.created_s = int(now)
        tag = GenerationTag(
            self.labels.task,
            self.version_digest[:16],
            self.labels.arm,
            unit_hash(self.caller.unit, self.signing_key),
            int(now * 1000),
        )
        self.id = sign(tag, self.signing_key)

    def first_token(self) -> None:
        """Note the time of the first token; later calls change nothing, nor does one that comes with all others."""
        if self._first_token_s is None and self.streamed_choices:
            self._first_token_s = time.perf_counter() - self.caller.started_s

    def end(self, outcome: str, usage: Usage | None, completion_tokens: int = 0) -> None:
        """Write the request down; later calls change nothing. Without usage, so many tokens had been made."""
        if self._ended:
            return
        self._ended = True
        elapsed_s = time.perf_counter() - self.caller.started_s
        values = self.labels.values()
        self.metrics.requests.labels(*values, outcome).inc()
        self.metrics.duration.labels(*values).observe(elapsed_s)
        if usage is not None:
            self.metrics.prompt_tokens.labels(*values).inc(usage.prompt_tokens)
            completion_tokens = usage.completion_tokens
        if self._first_token_s is not None:
            self.metrics.time_to_first_token.labels(*values).observe(self._first_token_s)
            if (later := completion_tokens / self.streamed_choices - 1) > 0:
                self.metrics.time_per_output_token.labels(*values).observe((elapsed_s - self._first_token_s) / later)
        self.metrics.completion_tokens.labels(*values).inc(completion_tokens)
        line = {
            "id": self.id,
            "task": self.labels.task,
            "arm": self.labels.arm,
            "version": self.labels.version,
            "backend": self.labels.backend,
            "principal": self.caller.principal.name,
            "outcome": outcome,
            "prompt_tokens": usage.prompt_tokens if usage else None,
            "completion_tokens": completion_tokens,
            "milliseconds": round(elapsed_s * 1000, 1),
        }
        log.info(json.dumps(line, separators=(",", ":")))


class Generation:
    """One answer as it is made. Iterate `events` once; leaving it early cancels the engine's work."""

    def __init__(self, record: Record, events: AsyncIterator[GenerationEvent]) -> None:
        self.record = record
        self._events = cast(AsyncGenerator[GenerationEvent], events)
        self._first: GenerationEvent | None = None

    @property
    def id(self) -> str:
        return self.record.id

    async def begin(self) -> None:
        """Wait for the first event, so that whatever is refused is refused before an answer has begun."""
        try:
            self._first = await anext(self._events)
        except BaseException as error:
            self.record.end("error" if isinstance(error, Exception) else "cancelled", None)
            raise

    async def events(self) -> AsyncGenerator[GenerationEvent]:
        """Deltas, then one Finish; raises EngineError when the engine fails midway."""
        outcome, usage, made = "cancelled", None, 0
        try:
            async with aclosing(self._events):
                event = self._first if self._first is not None else await anext(self._events)
                while True:
                    if isinstance(event, Delta):
                        made += len(event.token_ids)
                        self.record.first_token()
                    elif isinstance(event, Finish):
                        outcome, usage = event.reason, event.usage
                    yield event
                    if isinstance(event, Finish):
                        return
                    event = await anext(self._events)
        except Exception:
            outcome = "error"
            raise
        finally:
            self.record.end(outcome, usage, made)

    async def aclose(self) -> None:
        """End it, wherever it stands: the engine frees what it held. Closing twice changes nothing."""
        await self._events.aclose()
        self.record.end("cancelled", None)

    async def whole(self, n: int = 1) -> Answers:
        """All `n` choices at once."""
        return await collect(self.events(), n)


class Batch:
    """Generations that answer one request, one for each of its prompts. One that fails ends all."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._generations = generations
        self.id = generations[0].id
        self.created_s = generations[0].record.created_s

    async def begin(self) -> None:
        """Wait for the first event of each."""
        try:
            await all_or_none(generation.begin() for generation in self._generations)
        except BaseException:
            await self.aclose()
            raise

    async def events(self) -> AsyncGenerator[tuple[int, GenerationEvent]]:
        """The events of all as they come, each with the place of its prompt."""
        if len(self._generations) == 1:
            async with aclosing(self._generations[0].events()) as events:
                async for event in events:
                    yield 0, event
            return
        news: asyncio.Queue[tuple[int, GenerationEvent] | Exception] = asyncio.Queue()

        async def follow(place: int, generation: Generation) -> None:
            try:
                async with aclosing(generation.events()) as events:
                    async for event in events:
                        news.put_nowait((place, event))
            except Exception as error:
                news.put_nowait(error)

        following = [asyncio.create_task(follow(*pair)) for pair in enumerate(self._generations)]
        unfinished = len(following)
        try:
            while unfinished:
                item = await news.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= isinstance(item[1], Finish)
                yield item
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    async def whole(self, n: int = 1) -> list[Answers]:
        """All `n` choices of each prompt at once."""
        return await all_or_none(generation.whole(n) for generation in self._generations)

    async def aclose(self) -> None:
        """End all, wherever they stand. Closing twice changes nothing."""
        for generation in self._generations:
            await generation.aclose()
