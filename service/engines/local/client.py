"""The local engine as the service sees it: the `Engine` protocol over the socket of an engine that may die.

Lays prompts out and refuses what cannot be served before anything is sent; keeps the engine's known soft prompts; when
the engine is lost, answers what was in flight with one retriable error, starts another, and pins again what was pinned.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import cast

import msgspec

from service.engines.base import (
    Capabilities,
    Delta,
    EngineStats,
    Finish,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    ScoreRequest,
    Scores,
    SoftPromptReference,
    Usage,
)
from service.engines.base_model import BaseModel
from service.engines.errors import (
    BaseModelError,
    DeadlineExceeded,
    EngineError,
    EngineUnavailable,
    GenerationFailed,
    InvalidRequest,
    QueueFull,
)
from service.engines.features import check_supported
from service.engines.layout import check_base, lay_out
from service.engines.local.grammar import check_grammar
from service.engines.local.known_prompts import KnownPrompts
from service.engines.local.messages import (
    LENGTH_BYTES,
    Cancel,
    Command,
    Event,
    Output,
    PromptScored,
    Ready,
    Registered,
    Score,
    Scored,
    Shutdown,
    StartFailed,
    Stats,
    Step,
    Submit,
    decode_event,
    frame,
)
from service.engines.local.process import Host
from service.engines.local.translation import Translation

log = logging.getLogger(__name__)

_NO_STATS = Stats()
_LONGEST_PAUSE_S = 10.0
_STEADY_AFTER_S = 60.0
_STOP_TIMEOUT_S = 5.0

_FEATURES = frozenset(
    {
        "n", "logprobs", "prompt_logprobs", "echo", "structured_output", "deadline", "min_p", "min_tokens",
        "ignore_eos", "stop_token_ids", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias",
        "scores",
    }
)  # fmt: skip
_FAILURES: dict[str, Callable[[str], EngineError]] = {
    "failed": GenerationFailed,
    "deadline": DeadlineExceeded,
    "invalid": InvalidRequest,
}

_News = Output | PromptScored | Scored | EngineError


class LocalEngine:
    """An Engine on this machine.

    At most `max_waiting` requests wait beside those that run; further ones raise QueueFull. A request that meets an
    engine that is being restarted waits `ready_timeout_s` for it, then raises EngineUnavailable.
    """

    def __init__(self, base: BaseModel, host: Host, *, max_waiting: int = 256, ready_timeout_s: float = 30.0) -> None:
        self.base = base
        self._host = host
        self._translation = Translation(base)
        self._max_waiting = max_waiting
        self._ready_timeout_s = ready_timeout_s
        self._ready = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stats = _NO_STATS
        self._restarts = 0
        self._run_as = ""
        self._max_running = 0
        self._closing = asyncio.Event()
        self._started_once = False
        self._refused: BaseModelError | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._pending: dict[str, asyncio.Queue[_News]] = {}
        self._sent: set[str] = set()
        self._prompts = KnownPrompts(self._send)

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises BaseModelError when it refuses the base model."""
        self._supervisor = asyncio.create_task(self._supervise(), name="softcue-engine-supervisor")
        await self._ready.wait()
        if self._refused is not None:
            raise self._refused

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more requests, let running ones finish for `grace_s` seconds, fail the rest, end the engine.

        Closing twice waits for the first close.
        """
        self._closing.set()
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            self._fail(self._pending, "the service is stopping; send the request again to another replica")
        self._send(Shutdown())
        if self._supervisor is None:
            return
        done, _ = await asyncio.wait({self._supervisor}, timeout=_STOP_TIMEOUT_S)
        if not done:
            await asyncio.to_thread(self._host.stop)
        await asyncio.wait({self._supervisor})

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Deltas, then one Finish. See `Engine`; raises any of the EngineError tree."""
        check_supported(request, self.capabilities())
        asked_s = time.monotonic()
        token_ids = await lay_out(self.base, request.prompt, request.soft_prompt)
        command = self._translation.submit(request, token_ids)
        if command.grammar is not None:  # a hostile one takes a third of a second to be refused
            await asyncio.to_thread(check_grammar, command.grammar)
        news = await self._admit(request.id, request.soft_prompt, _time_left(request.deadline_s, asked_s))
        prompted = self._translation.prompted(request, token_ids)
        completion_tokens = 0
        reasons: dict[int, FinishReason] = {}
        virtual_tokens = request.soft_prompt.length if request.soft_prompt else 0
        try:
            self._ask(msgspec.structs.replace(command, deadline_s=_time_left(request.deadline_s, asked_s)))
            while len(reasons) < request.n:
                output = await news.get()
                if isinstance(output, EngineError):
                    raise output
                if isinstance(output, PromptScored):
                    assert prompted is not None
                    prompted = self._translation.scored(prompted, output)
                    continue
                assert isinstance(output, Output)
                if prompted is not None:
                    yield prompted
                    prompted = None
                completion_tokens += len(output.token_ids)
                reason = cast(FinishReason | None, output.finish_reason)
                logprobs = tuple(map(self._translation.logprob, output.logprobs))
                yield Delta(output.text, tuple(output.token_ids), output.index, logprobs, reason)
                if reason is not None:
                    reasons[output.index] = reason
            self._forget(request.id)
            yield Finish(reasons[0], Usage(len(token_ids), completion_tokens, virtual_tokens))
        finally:
            self._leave(request.id)

    async def score(self, request: ScoreRequest) -> Scores:
        """Log-probabilities of the continuations; see `ScoreRequest`."""
        request.check()
        asked_s = time.monotonic()
        token_ids = await lay_out(self.base, request.prompt, request.soft_prompt)
        virtual_tokens = request.soft_prompt.length if request.soft_prompt else 0
        continuations = [self.base.continuation(text) for text in request.continuations]
        self.base.check_length(len(token_ids) + max(map(len, continuations)) - 1, virtual_tokens)
        digest = request.soft_prompt.digest if request.soft_prompt else None
        news = await self._admit(request.id, request.soft_prompt, _time_left(request.deadline_s, asked_s))
        try:
            left_s = _time_left(request.deadline_s, asked_s)
            self._ask(Score(request.id, token_ids, digest, continuations, left_s, request.task))
            answer = await news.get()
            if isinstance(answer, EngineError):
                raise answer
            assert isinstance(answer, Scored)
        finally:
            self._leave(request.id)
        usage = Usage(len(token_ids), 0, virtual_tokens)
        return Scores(tuple(answer.log_probabilities), usage, tuple(map(len, continuations)))

    async def warm(self, soft_prompt: SoftPromptReference) -> None:
        """Compute a soft prompt's KV now and keep it until `release`, over restarts too."""
        check_base(self.base, soft_prompt)
        await self._wait_ready()
        await self._prompts.pin(soft_prompt)

    async def release(self, digest: str) -> None:
        """Let a soft prompt go; running generations keep their copy of its KV."""
        self._prompts.release(digest)

    def stats(self) -> EngineStats:
        ready = self._ready.is_set() and not self._closing.is_set() and self._refused is None
        return EngineStats(ready=ready, restarts=self._restarts, **msgspec.structs.asdict(self._stats))

    def capabilities(self) -> Capabilities:
        return Capabilities(
            payload_kinds=frozenset({"soft_prompt", "prefix", "text"}),
            features=_FEATURES,
            context_length=self.base.context_length,
            run_as=self._run_as,
        )

    async def _admit(
        self, request_id: str, soft_prompt: SoftPromptReference | None, left_s: float | None
    ) -> asyncio.Queue[_News]:
        """A place for a request's news, once the engine is ready and knows the soft prompt.

        Raises DeadlineExceeded where that takes longer than `left_s` seconds.
        """
        self._check_open()
        if len(self._pending) >= self._max_running + self._max_waiting:
            raise QueueFull(len(self._pending) - self._max_running, retry_after_s=1.0)
        if request_id in self._pending:
            raise InvalidRequest(
                f"a request with id {request_id} is running already; give each its own", parameter="id"
            )
        news: asyncio.Queue[_News] = asyncio.Queue()
        self._pending[request_id] = news
        self._idle.clear()
        try:
            async with asyncio.timeout(left_s) as limit:
                await self._wait_ready()
                if soft_prompt is not None:
                    await self._prompts.ensure(soft_prompt)
            if not news.empty() and isinstance(lost := news.get_nowait(), EngineError):
                raise lost  # the engine was lost while we waited; what it was told is gone
        except BaseException as error:
            self._forget(request_id)
            if isinstance(error, TimeoutError) and limit.expired():
                raise DeadlineExceeded("the deadline passed before the engine could begin; allow more time") from None
            raise
        return news

    async def _wait_ready(self) -> None:
        try:
            async with asyncio.timeout(self._ready_timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise EngineUnavailable(
                f"the engine was not ready within {self._ready_timeout_s:.0f} s; send the request again"
            ) from None
        self._check_open()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise EngineUnavailable("the service is stopping; send the request again to another replica")
        if self._refused is not None:
            raise self._refused

    def _leave(self, request_id: str) -> None:
        """Cancel what has not ended. The engine ignores ids that are done."""
        if request_id in self._pending:
            self._forget(request_id)
            self._send(Cancel(request_id))

    def _forget(self, request_id: str) -> None:
        self._pending.pop(request_id, None)
        self._sent.discard(request_id)
        if not self._pending:
            self._idle.set()

    def _deliver(self, request_id: str, news: _News, *, last: bool) -> None:
        waiting = self._pending.get(request_id)
        if waiting is not None:
            waiting.put_nowait(news)
            if last:
                self._forget(request_id)

    def _fail(self, request_ids: Iterable[str], message: str) -> None:
        for request_id in list(request_ids):
            self._deliver(request_id, EngineUnavailable(message), last=True)

    def _ask(self, command: Submit | Score) -> None:
        """Send a request; from now on it is lost if the engine is."""
        if not self._send(command):
            raise EngineUnavailable("the engine was lost; send the request again")
        self._sent.add(command.id)

    def _send(self, command: Command) -> bool:
        """Queue a command. False when there is no engine to take it."""
        if self._writer is None or self._writer.is_closing():
            return False
        self._writer.write(frame(command))
        return True

    async def _supervise(self) -> None:
        """Keep an engine running until close; restarts pause longer each time one dies soon after its start."""
        pause_s = 0.1
        while not self._closing.is_set() and self._refused is None:
            started = time.monotonic()
            try:
                await self._run_once()
            except Exception:  # no process, no memory, no descriptor: the next start may find some
                log.exception("the engine could not be run")
            if self._closing.is_set() or self._refused is not None:
                break
            steady = time.monotonic() - started > _STEADY_AFTER_S
            pause_s = 0.1 if steady else min(2 * pause_s, _LONGEST_PAUSE_S)
            self._restarts += 1
            log.error("the engine was lost; starting another in %.1f s (restart %d)", pause_s, self._restarts)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), pause_s)
        self._ready.set()  # whoever waits learns that nothing comes

    async def _run_once(self) -> None:
        """One engine, from its start to its loss."""
        connection = await asyncio.to_thread(self._host.start)
        try:
            reader, self._writer = await asyncio.open_connection(sock=connection)
            try:
                if self._closing.is_set():
                    self._send(Shutdown())
                await self._listen(reader)
            finally:
                self._lose()
                self._writer.close()
                self._writer = None
        finally:
            await asyncio.to_thread(self._host.stop)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Take events until the engine closes its side."""
        while True:
            try:
                size = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
                event: Event = decode_event(await reader.readexactly(size))
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            match event:
                case Step():
                    self._stats = event.stats
                    for prompt in event.prompts:
                        self._deliver(prompt.id, prompt, last=False)
                    for output in event.outputs:
                        self._deliver(output.id, output, last=False)
                    for scored in event.scored:
                        self._deliver(scored.id, scored, last=True)
                    for failure in event.failures:
                        self._deliver(failure.id, _FAILURES[failure.kind](failure.message), last=True)
                    for registered in event.registered:
                        self._prompts.registered(registered.digest, registered.error)
                case Registered():
                    self._stats = event.stats
                    self._prompts.registered(event.digest, event.error)
                case Ready():
                    self._stats = event.stats
                    self._max_running = event.stats.max_running
                    self._run_as = event.run_as
                    self._started_once = True
                    self._ready.set()
                    self._prompts.engine_started()
                case StartFailed():
                    log.error("the engine did not start: %s", event.message)
                    if event.permanent or not self._started_once:
                        self._refused = BaseModelError(event.message)

    def _lose(self) -> None:
        """The engine is gone: everyone who waits for it gets one retriable error."""
        self._ready.clear()
        self._stats = _NO_STATS
        self._prompts.engine_lost()
        self._fail(self._sent, "the engine was lost while it worked on this; send the request again")


def _time_left(deadline_s: float | None, asked_s: float) -> float | None:
    """Seconds that are left of a deadline counted from `asked_s` (`time.monotonic`)."""
    return None if deadline_s is None else deadline_s - (time.monotonic() - asked_s)
