"""The engine behind its socket: in a thread, and in a process that can be killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import aclosing
from typing import cast

import pytest

from service.engines.base import (
    Delta,
    Finish,
    GenerationRequest,
    RawText,
    ResponseFormat,
    Sampling,
    ScoreRequest,
    SoftPromptReference,
    TokenIds,
)
from service.engines.base_model import BaseModel
from service.engines.build import build_local
from service.engines.errors import (
    BaseModelError,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    UnsupportedFeature,
    WrongBase,
)
from service.engines.local.client import LocalEngine
from service.engines.local.engine import EngineCore
from service.engines.local.options import EngineOptions
from service.engines.local.process import ProcessHost
from service.engines.local.thread import ThreadHost
from tests.conftest import random_prompt
from tests.service.engines.local.asking import LONG, Blocked, answer, first, request, until


async def test_deltas_are_followed_by_one_finish_with_usage(engine: LocalEngine) -> None:
    prompt = SoftPromptReference.to(random_prompt(1, 7), engine.base.fingerprint)
    events = [event async for event in engine.generate(request("a", soft_prompt=prompt, sampling=Sampling(5)))]
    assert [type(event) for event in events] == [*[Delta] * (len(events) - 1), Finish]
    finish = cast(Finish, events[-1])
    assert finish.usage.virtual_tokens == 7
    assert finish.usage.prompt_tokens == len(engine.base.lay_out(RawText("The house stood")))
    assert finish.usage.completion_tokens == sum(len(e.token_ids) for e in events if isinstance(e, Delta)) <= 5


async def test_leaving_a_stream_frees_its_slot(engine: LocalEngine) -> None:
    async with aclosing(await first(engine, request("a", sampling=LONG))):
        assert engine.stats().running == 1
    await until(lambda: engine.stats().running == 0)


async def test_a_full_queue_refuses_with_a_time_to_come_back(engine: LocalEngine) -> None:
    streams = [await first(engine, request(str(i), sampling=LONG)) for i in range(4)]
    waiting = [asyncio.ensure_future(answer(engine, request(f"w{i}", sampling=Sampling(2)))) for i in range(2)]
    await until(lambda: engine.stats().waiting == 2)
    with pytest.raises(QueueFull) as refused:
        await answer(engine, request("one too many"))
    assert refused.value.retry_after_s > 0
    for stream in streams:
        await stream.aclose()
    assert all([await task for task in waiting])


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"tools": ({"type": "function"},)}, UnsupportedFeature, "tools is not served.*calls no tools"),
        ({"remote_model": "ft:gpt:a"}, UnsupportedFeature, "model is not served"),
        ({"n": 0}, InvalidRequest, "n is 0"),
        ({"logprobs": 21}, InvalidRequest, "logprobs is 21"),
        ({"deadline_s": 0.0}, InvalidRequest, "deadline_s is 0.0"),
        ({"sampling": Sampling(logit_bias={4096: 1.0})}, InvalidRequest, "token id 4096, which is outside"),
        ({"response_format": ResponseFormat("regex", regex="(")}, InvalidRequest, "unclosed group"),
        ({"sampling": Sampling(temperature=3.0)}, InvalidRequest, "temperature is 3.0; it must be between 0 and 2"),
        ({"sampling": Sampling(max_tokens=0)}, InvalidRequest, "max_tokens is 0"),
        ({"sampling": Sampling(stop=("",))}, InvalidRequest, "stop is"),
        ({"prompt": TokenIds((1,) * 1024)}, PromptTooLong, "has 1024 tokens but at most 1023 fit"),
    ],
)
async def test_what_cannot_be_served_is_refused_before_any_compute(
    engine: LocalEngine, changes: dict[str, object], error: type[EngineError], said: str
) -> None:
    before = engine.stats().tokens_generated
    asked = {"prompt": RawText("hello"), **changes}
    with pytest.raises(error, match=said):
        await answer(engine, GenerationRequest("a", **asked))
    assert engine.stats().tokens_generated == before


async def test_a_soft_prompt_of_another_base_is_refused(engine: LocalEngine) -> None:
    foreign = SoftPromptReference.to(random_prompt(1, 4), "f" * 64)
    for work in (answer(engine, request("a", soft_prompt=foreign)), engine.warm(foreign)):
        with pytest.raises(WrongBase, match=r"tuned on base ffffffffffff but this service runs 'demo-base'"):
            await work


async def test_a_prompt_that_cannot_be_loaded_fails_its_requests_and_may_be_tried_again(engine: LocalEngine) -> None:
    prompt, broken = random_prompt(11, 4), [True]

    def load() -> object:
        if broken[0]:
            raise EngineError("the tensor is damaged")
        return prompt

    reference = SoftPromptReference(prompt.digest, 4, engine.base.fingerprint, load)
    asked = [answer(engine, request(str(i), soft_prompt=reference)) for i in range(3)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [str(result) for result in results] == ["the tensor is damaged"] * 3
    broken[0] = False
    assert await answer(engine, request("again", soft_prompt=reference))


async def test_a_warmed_prompt_is_pinned_until_released_and_loaded_once(engine: LocalEngine) -> None:
    prompt, loads = random_prompt(12, 6), []

    def load() -> object:
        loads.append(1)
        return prompt

    reference = SoftPromptReference(prompt.digest, 6, engine.base.fingerprint, load)
    before = engine.stats().prompts
    await engine.warm(reference)
    assert engine.stats().prompts == before + 1
    warm = await answer(engine, request("a", soft_prompt=reference))
    assert len(loads) == 1
    await engine.release(prompt.digest)
    assert await answer(engine, request("b", soft_prompt=reference)) == warm
    assert len(loads) == 2


async def test_a_prompt_may_be_pinned_while_a_request_brings_it(engine: LocalEngine) -> None:
    blocked = Blocked(21, engine)
    asked = asyncio.ensure_future(answer(engine, request("a", soft_prompt=blocked.reference)))
    await until(blocked.asked.is_set)
    pinning = [asyncio.ensure_future(engine.warm(blocked.reference)) for _ in range(2)]
    await asyncio.sleep(0)
    blocked.go.set()
    async with asyncio.timeout(20):
        await asyncio.gather(asked, *pinning)
    assert await answer(engine, request("b", soft_prompt=blocked.reference)) == asked.result()


async def test_a_prompt_released_on_its_way_is_let_go_when_it_arrives(engine: LocalEngine) -> None:
    before = engine.stats().prompts
    blocked = Blocked(22, engine)
    pinning = asyncio.ensure_future(engine.warm(blocked.reference))
    await until(blocked.asked.is_set)
    await engine.release(blocked.prompt.digest)
    blocked.go.set()
    async with asyncio.timeout(20):
        await pinning
    assert await answer(engine, request("after"))  # the engine has read the release by now
    assert engine.stats().prompts == before


async def test_who_asked_first_may_leave_while_others_wait_for_the_same_prompt(engine: LocalEngine) -> None:
    blocked = Blocked(23, engine)
    first_asked = asyncio.ensure_future(answer(engine, request("a", soft_prompt=blocked.reference)))
    await until(blocked.asked.is_set)
    second_asked = asyncio.ensure_future(answer(engine, request("b", soft_prompt=blocked.reference)))
    await asyncio.sleep(0)
    first_asked.cancel()
    blocked.go.set()
    async with asyncio.timeout(20):
        assert await second_asked


async def test_extreme_sampling_is_refused_or_served_and_harms_nobody(engine: LocalEngine) -> None:
    async with aclosing(await first(engine, request("victim", sampling=LONG))) as victim:
        for wrong in (Sampling(top_k=2**63), Sampling(max_tokens=10**30), Sampling(seed=2**70)):
            with pytest.raises(InvalidRequest):
                await answer(engine, request("a", sampling=wrong))
        tiny = Sampling(max_tokens=5, temperature=1e-308, top_k=2**31 - 1, top_p=1e-300, seed=1)
        assert await answer(engine, request("a", sampling=tiny)) == await answer(
            engine, request("b", sampling=Sampling(max_tokens=5))
        )
        assert isinstance(await anext(victim), Delta)
    assert engine.stats().restarts == 0


class FlakyHost(ThreadHost):
    """A ThreadHost whose starts play a script: an error is raised, an engine is loaded, None is lost at once."""

    def __init__(self, *script: Exception | EngineCore | None) -> None:
        super().__init__(lambda: self._engine)
        self._script = list(script)
        self._engine: EngineCore
        self.starts = 0

    def start(self) -> socket.socket:
        self.starts += 1
        step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        if step is None:
            ours, theirs = socket.socketpair()
            theirs.close()
            return ours
        self._engine = step
        return super().start()


async def test_an_engine_that_cannot_be_started_is_tried_again(base: BaseModel, loaded: EngineCore) -> None:
    host = FlakyHost(OSError("no descriptors"), None, loaded)
    engine = LocalEngine(base, host)
    async with asyncio.timeout(20):
        await engine.start()
        assert await answer(engine, request("a"))
    assert (host.starts, engine.stats().restarts) == (3, 2)
    await engine.close()


async def test_a_request_that_waits_for_an_engine_outlives_failed_starts_and_the_queue_is_bounded(
    base: BaseModel, loaded: EngineCore
) -> None:
    host = FlakyHost(None, None, loaded)
    engine = LocalEngine(base, host, max_waiting=2)
    starting = asyncio.ensure_future(engine.start())
    waiting = [asyncio.ensure_future(answer(engine, request(str(i)))) for i in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await answer(engine, request("one too many"))
    async with asyncio.timeout(20):
        await starting
        assert all(await asyncio.gather(*waiting))
    await engine.close()


async def test_close_while_a_restart_is_awaited_ends_at_once_and_starts_nothing(base: BaseModel) -> None:
    host = FlakyHost(*[None] * 100)
    engine = LocalEngine(base, host)
    starting = asyncio.ensure_future(engine.start())
    asked = asyncio.ensure_future(answer(engine, request("a")))
    await until(lambda: host.starts == 3)
    async with asyncio.timeout(5):
        await engine.close()
        await starting
        with pytest.raises(EngineUnavailable, match="stopping"):
            await asked
    starts = host.starts
    await engine.close()
    assert host.starts == starts


async def test_whatever_loading_raises_ends_the_first_start_with_the_reason(base: BaseModel) -> None:
    def load() -> EngineCore:
        raise AssertionError("Torch not compiled with CUDA enabled")

    engine = LocalEngine(base, ThreadHost(load))
    async with asyncio.timeout(20):
        with pytest.raises(BaseModelError, match="AssertionError: Torch not compiled with CUDA"):
            await engine.start()
    assert not engine.stats().ready
    with pytest.raises(BaseModelError):
        await answer(engine, request("a"))
    await engine.close()


async def test_two_requests_with_one_id_are_told_apart_by_refusing_the_second(engine: LocalEngine) -> None:
    async with aclosing(await first(engine, request("same", sampling=LONG))):
        with pytest.raises(InvalidRequest, match="running already"):
            await answer(engine, request("same"))


async def test_close_lets_running_requests_finish_and_fails_those_beyond_the_grace(
    base: BaseModel, loaded: EngineCore
) -> None:
    engine = LocalEngine(base, ThreadHost(lambda: loaded))
    await engine.start()
    short = asyncio.ensure_future(answer(engine, request("short", sampling=Sampling(3))))
    await until(lambda: engine.stats().running == 1 or short.done())
    await engine.close(grace_s=30)
    assert await short
    with pytest.raises(EngineUnavailable, match="stopping"):
        await answer(engine, request("late"))
    again = LocalEngine(base, ThreadHost(lambda: loaded))
    await again.start()
    stream = await first(again, request("long", sampling=LONG))
    closing = asyncio.ensure_future(again.close(grace_s=0))
    with pytest.raises(EngineUnavailable, match="stopping"):
        async for _ in stream:
            pass
    await closing


async def test_a_base_that_cannot_be_served_is_reported_at_start(base: BaseModel) -> None:
    def refuse() -> EngineCore:
        raise BaseModelError("this base cannot be served")

    engine = LocalEngine(base, ThreadHost(refuse))
    with pytest.raises(BaseModelError, match="cannot be served"):
        await engine.start()
    await engine.close()


async def test_a_killed_engine_fails_what_was_in_flight_once_and_is_replaced(base: BaseModel) -> None:
    host = ProcessHost(base, EngineOptions(max_sequences=4))
    engine = LocalEngine(base, host)
    await engine.start()
    try:
        prompt = SoftPromptReference.to(random_prompt(3, 9), base.fingerprint)
        await engine.warm(prompt)
        expected = await answer(engine, request("before", soft_prompt=prompt))
        stream = await first(engine, request("cut", sampling=LONG))
        first_process = host.process_id
        assert first_process is not None
        os.kill(first_process, signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match="was lost"):
            async for _ in stream:
                pass
        assert not engine.stats().ready
        assert await answer(engine, request("after", soft_prompt=prompt)) == expected
        assert engine.stats().restarts == 1
        assert engine.stats().prompts == 1
        assert host.process_id not in (None, first_process)
        scores = await engine.score(ScoreRequest("s", RawText("hello"), ("greeting", "refund"), prompt))
        assert len(scores.log_probabilities) == 2
    finally:
        await engine.close()
    assert host.process_id is None


async def test_the_process_that_supervises_the_engine_imports_no_torch() -> None:
    code = (
        "import sys, service.app, service.commands.experiments, service.commands.serving, prompt_store.commands\n"
        "print([m for m in ('torch', 'transformers', 'openai') if m in sys.modules])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.decode().strip() == "[]"


def test_build_gives_an_engine_in_a_process_of_its_own(base: BaseModel) -> None:
    engine = build_local(base, EngineOptions(), max_waiting=1)
    assert not engine.stats().ready
    assert engine.capabilities().payload_kinds == {"soft_prompt", "prefix", "text"}
