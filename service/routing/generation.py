"""A Generation: the stream of one answer, tagged with task, version, arm and backend, recorded once.

A Batch is several of them that answer one request; a Classification is what a task's labels are answered with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from service.engines.base import Delta, Finish, GenerationEvent
from service.engines.collecting import Answers, all_or_none, collect
from service.routing.leaf_classification import Classified
from service.routing.leaf_generation import Begun
from service.routing.plan import Target
from service.routing.record import Record
from service.routing.run import Run


class Generation:
    """One answer as it is made. Iterate `events` once; leaving it early cancels the engine's work."""

    def __init__(self, record: Record, begin: Callable[[], Awaitable[Begun]]) -> None:
        self.run = record.run
        self.record = record
        self._begin = begin
        self._begun: Begun | None = None

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def target(self) -> Target:
        """Who answers, once it has begun."""
        assert self._begun is not None
        return self._begun.target

    async def begin(self) -> None:
        """Wait for the first event, so that whatever is refused is refused before an answer has begun."""
        try:
            self._begun = await self._begin()
        except BaseException as error:
            self.record.answered_by(self.run.last_target)
            self.record.end("error" if isinstance(error, Exception) else "cancelled", None)
            raise
        self.record.answered_by(self._begun.target)
        if self._begun.whole is not None:
            self.record.streamed_choices = 0

    async def events(self) -> AsyncGenerator[GenerationEvent]:
        """Deltas, then one Finish; raises EngineError when the engine fails midway."""
        assert self._begun is not None
        outcome, usage, made = "cancelled", None, 0
        try:
            async with aclosing(self._begun):
                async for event in self._begun.events:
                    if isinstance(event, Delta):
                        made += len(event.token_ids)
                        self.record.first_token()
                        self.run.refused |= bool(event.refusal)
                        if event.index == 0 and (self.run.listened or self.run.shadows):
                            self.run.said.append(event.text)
                    elif isinstance(event, Finish):
                        outcome, usage = event.reason, event.usage
                        # Whoever reads the last event may never ask for the end behind it.
                        self.record.end(outcome, usage, made)
                    yield event
        except Exception:
            outcome = "error"
            raise
        finally:
            self.record.end(outcome, usage, made)

    async def aclose(self) -> None:
        """End it, wherever it stands: the engine frees what it held. Closing twice changes nothing."""
        try:
            if self._begun is not None:
                await self._begun.aclose()
        finally:  # also where whoever closes it is cancelled again meanwhile
            self.record.end("cancelled", None)

    async def whole(self, n: int = 1) -> Answers:
        """All `n` choices at once. However that ends, it is closed."""
        try:
            return await collect(self.events(), n)
        finally:
            await self.aclose()


@dataclass(frozen=True, slots=True)
class Classification:
    """A task's labels as they were answered, and what the request did on its way."""

    id: str
    run: Run
    answer: Classified


class Batch:
    """Generations that answer one request, one for each of its prompts. One that fails ends all."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self.generations = generations

    @property
    def id(self) -> str:
        """That of the first, once it has begun."""
        return self.generations[0].id

    @property
    def created_s(self) -> int:
        return self.generations[0].record.created_s

    @property
    def target(self) -> Target:
        """Who answers the first, once it has begun."""
        return self.generations[0].target

    @property
    def runs(self) -> list[Run]:
        """What each did on its way."""
        return [generation.run for generation in self.generations]

    async def begin(self) -> None:
        """Wait for the first event of each."""
        try:
            await all_or_none(generation.begin() for generation in self.generations)
        except BaseException:
            await self.aclose()
            raise

    async def events(self) -> AsyncGenerator[tuple[int, GenerationEvent]]:
        """The events of all as they come, each with the place of its prompt."""
        if len(self.generations) == 1:
            async with aclosing(self.generations[0].events()) as events:
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

        following = [asyncio.create_task(follow(*pair)) for pair in enumerate(self.generations)]
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
        """All `n` choices of each prompt at once. However that ends, all are closed."""
        try:
            return await all_or_none(generation.whole(n) for generation in self.generations)
        finally:
            await self.aclose()  # also those that had not begun to be read

    async def aclose(self) -> None:
        """End all, wherever they stand. Closing twice changes nothing."""
        for generation in self.generations:
            await generation.aclose()
