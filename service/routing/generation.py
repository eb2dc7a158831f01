"""A Generation: the stream of one answer, tagged with task, version, arm and backend, measured and logged once."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from prompt_store.access import Principal
from service.engines.base import Delta, Finish, GenerationEvent, Usage
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
        """Note the time of the first token; later calls change nothing."""
        if self._first_token_s is None:
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
        if self._first_token_s is not None:
            self.metrics.time_to_first_token.labels(*values).observe(self._first_token_s)
        if usage is not None:
            self.metrics.prompt_tokens.labels(*values).inc(usage.prompt_tokens)
            completion_tokens = usage.completion_tokens
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

    async def events(self) -> AsyncIterator[GenerationEvent]:
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

    async def text(self) -> tuple[str, Finish]:
        """The whole answer at once."""
        pieces: list[str] = []
        async with aclosing(cast(AsyncGenerator[GenerationEvent], self.events())) as events:
            async for event in events:
                if isinstance(event, Finish):
                    return "".join(pieces), event
                if isinstance(event, Delta):
                    pieces.append(event.text)
        raise AssertionError("an engine ended a generation without a Finish")
