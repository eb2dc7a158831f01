"""Attempts, the breaker, the limit and addresses, played together over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import pytest

from service.engines.errors import (
    CircuitOpen,
    DeadlineExceeded,
    EngineUnavailable,
    ProviderDenied,
    ProviderError,
    ProviderMisbehaved,
    ProviderRateLimited,
    ProviderRefused,
    ProviderUnavailable,
    QueueFull,
)
from service.engines.remote.breaker import BreakerLimits
from service.engines.remote.retrying import RetryPolicy
from tests.providers import (
    HANG_UP,
    UNTIL_LEFT,
    Answer,
    Asked,
    ScriptedProvider,
    error_answer,
    event,
    event_stream,
    json_answer,
    stream_head,
    text_answer,
    whole,
)
from tests.service.engines.remote.speaking import AT_ONCE, PATH, read, transport

GOOD = json_answer({"answer": "yes"})
STREAM = event_stream([{"n": 1}, {"n": 2}])
SICK = BreakerLimits(consecutive=2, open_s=60.0)


@pytest.mark.parametrize("failure", [error_answer(500), error_answer(429), [HANG_UP]])
async def test_what_may_help_is_tried_again(failure: Answer) -> None:
    async with ScriptedProvider([failure, failure, GOOD]) as server, transport(server.url, retries=AT_ONCE) as provider:
        assert (await provider.post(PATH, b"{}")).document == {"answer": "yes"}
        assert (provider.stats().retries, provider.stats().failures) == (2, 2)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (error_answer(400), ProviderRefused),
        (error_answer(401), ProviderDenied),
        (error_answer(429, code="insufficient_quota"), ProviderRateLimited),
        (error_answer(500, headers={"x-should-retry": "false"}), ProviderUnavailable),
        (error_answer(429, headers={"retry-after": "31"}), ProviderRateLimited),
        (text_answer("<html>"), ProviderMisbehaved),
    ],
)
async def test_what_does_not_help_is_not_tried_again(failure: Answer, kind: type[Exception]) -> None:
    async with ScriptedProvider([failure, GOOD]) as server, transport(server.url, retries=AT_ONCE) as provider:
        with pytest.raises(kind):
            await provider.post(PATH, b"{}")
        assert len(server.requests) == 1


async def test_the_last_attempts_error_is_the_calls() -> None:
    answers = [error_answer(500, "first"), error_answer(503, "second"), error_answer(502, "third")]
    async with ScriptedProvider(answers) as server, transport(server.url, retries=AT_ONCE) as provider:
        with pytest.raises(ProviderUnavailable, match="502: third"):
            await provider.post(PATH, b"{}")
        assert len(server.requests) == 3


async def test_a_wait_that_would_pass_the_deadline_is_not_begun() -> None:
    async with ScriptedProvider([error_answer(429, headers={"retry-after": "20"})]) as server:
        async with transport(server.url, retries=RetryPolicy()) as provider:
            with pytest.raises(ProviderRateLimited):
                await provider.post(PATH, b"{}", deadline_s=10.0)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "failure", [error_answer(500), [stream_head(), HANG_UP], [stream_head(), event({"error": {"message": "busy"}})]]
)
async def test_a_stream_is_tried_again_until_its_first_event(failure: Answer) -> None:
    async with ScriptedProvider([failure, STREAM]) as server, transport(server.url, retries=AT_ONCE) as provider:
        assert await read(provider) == [{"n": 1}, {"n": 2}]
        assert len(server.requests) == 2


async def test_a_stream_is_never_tried_again_after_its_first_event() -> None:
    async with ScriptedProvider([[stream_head(), event({"n": 1}), HANG_UP], STREAM]) as server:
        async with transport(server.url, retries=AT_ONCE) as provider:
            with pytest.raises(ProviderUnavailable):
                await read(provider)
        assert len(server.requests) == 1


async def test_a_kept_connection_that_was_closed_meanwhile_costs_no_attempt() -> None:
    def script(asked: Asked) -> Answer:
        return [HANG_UP] if len(server.requests) == 2 else GOOD

    async with ScriptedProvider(script) as server, transport(server.url) as provider:
        await provider.post(PATH, b"{}")
        assert (await provider.post(PATH, b"{}")).document == {"answer": "yes"}
        assert [asked.connection for asked in server.requests] == [0, 0, 1]
        assert provider.stats().breaker == "closed"


async def test_connections_that_the_provider_closed_while_idle_are_replaced() -> None:
    async with ScriptedProvider([GOOD]) as server, transport(server.url) as provider:
        for _ in range(3):
            await provider.post(PATH, b"{}")
            await server.close_idle()
        assert server.connections == 3


async def test_a_new_connection_that_is_closed_is_an_attempt() -> None:
    async with ScriptedProvider([[HANG_UP], GOOD]) as server, transport(server.url) as provider:
        with pytest.raises(ProviderUnavailable, match="hung up"):
            await provider.post(PATH, b"{}")
        assert len(server.requests) == 1


async def test_a_provider_that_restarts_is_found_again() -> None:
    server = ScriptedProvider([GOOD])
    async with server:
        url = server.url
    async with transport(url) as provider:
        with pytest.raises(ProviderUnavailable):
            await provider.post(PATH, b"{}")
        async with server:
            assert (await provider.post(PATH, b"{}")).document == {"answer": "yes"}


async def test_a_sick_provider_is_left_alone() -> None:
    async with ScriptedProvider([error_answer(500)]) as server, transport(server.url, breaker=SICK) as provider:
        for _ in range(2):
            with pytest.raises(ProviderUnavailable):
                await provider.post(PATH, b"{}")
        for call in (provider.post(PATH, b"{}"), read(provider)):
            with pytest.raises(CircuitOpen, match="left alone"):
                await call
        assert len(server.requests) == 2
        assert provider.stats().breaker == "open"


async def test_a_breaker_that_opens_between_attempts_does_not_hide_what_the_provider_said() -> None:
    limits = BreakerLimits(consecutive=1, open_s=60.0)
    retries = RetryPolicy(attempts=3, first_backoff_s=1000.0)
    async with (
        ScriptedProvider([error_answer(500, "out of order", {"x-request-id": "req_9"})]) as server,
        transport(server.url, breaker=limits, retries=retries, draw=lambda: 0.9) as provider,
    ):
        with pytest.raises(ProviderUnavailable, match="out of order") as caught:
            await provider.post(PATH, b"{}")
        assert caught.value.request_id == "req_9"
        assert (len(server.requests), provider.stats().retries) == (1, 0)


async def test_a_breaker_that_others_open_while_one_waits_does_not_hide_it_either() -> None:
    def script(asked: Asked) -> Answer:
        if len(server.requests) == 1:
            return error_answer(500, "out of order", {"retry-after-ms": "50"})
        return error_answer(503, "still out of order")

    limits = BreakerLimits(consecutive=2, open_s=60.0)
    retries = RetryPolicy(attempts=2, first_backoff_s=0.0)
    async with (
        ScriptedProvider(script) as server,
        transport(server.url, breaker=limits, retries=retries) as provider,
    ):
        first = asyncio.create_task(provider.post(PATH, b"{}"))
        await server.asked(1)
        while not provider.stats().failures:  # noqa: ASYNC110 (its answer is read)
            await asyncio.sleep(0)
        with pytest.raises(ProviderUnavailable, match="503"):
            await provider.post(PATH, b"{}")
        with pytest.raises(ProviderUnavailable, match="500: out of order"):
            await first
        assert len(server.requests) == 2


@pytest.mark.parametrize("failure", [error_answer(400), error_answer(403), error_answer(404), error_answer(429)])
async def test_refusals_and_rate_limits_do_not_make_a_provider_sick(failure: Answer) -> None:
    async with ScriptedProvider([failure]) as server, transport(server.url, breaker=SICK) as provider:
        for _ in range(5):
            with pytest.raises((ProviderDenied, ProviderRefused, ProviderRateLimited)):
                await provider.post(PATH, b"{}")
        assert provider.stats().breaker == "closed"


@pytest.mark.parametrize(("answer", "state"), [([UNTIL_LEFT], "open"), ([*STREAM[:2], UNTIL_LEFT], "closed")])
async def test_a_deadline_is_held_against_a_provider_that_said_nothing(answer: Answer, state: str) -> None:
    options = {"breaker": SICK, "patience_s": 0.01}
    async with ScriptedProvider([answer]) as server, transport(server.url, **options) as provider:
        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                await read(provider, deadline_s=0.05)
        assert provider.stats().breaker == state


async def test_deadlines_that_leave_no_time_to_answer_do_not_make_a_provider_sick() -> None:
    async with ScriptedProvider([[UNTIL_LEFT]]) as server, transport(server.url, breaker=SICK) as provider:
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                await provider.post(PATH, b"{}", deadline_s=0.01)
        assert provider.stats().breaker == "closed"


async def test_streams_that_break_off_make_a_provider_sick() -> None:
    broken: Answer = [stream_head(), event({"n": 1}), HANG_UP]
    limits = BreakerLimits(min_calls=4, failure_share=0.5)
    async with ScriptedProvider([broken]) as server, transport(server.url, breaker=limits) as provider:
        for _ in range(2):
            with pytest.raises(ProviderUnavailable):
                await read(provider)
        assert provider.stats().breaker == "open"


async def test_a_probe_that_is_cancelled_lets_the_next_through() -> None:
    limits = BreakerLimits(consecutive=1, open_s=0.0)
    async with (
        ScriptedProvider([error_answer(500), [UNTIL_LEFT], GOOD]) as server,
        transport(server.url, breaker=limits) as provider,
    ):
        with pytest.raises(ProviderUnavailable):
            await provider.post(PATH, b"{}")
        probe = asyncio.create_task(provider.post(PATH, b"{}"))
        await server.asked(2)
        with pytest.raises(CircuitOpen, match="finding out"):
            await provider.post(PATH, b"{}")
        probe.cancel()
        await asyncio.wait((probe,))
        assert (await provider.post(PATH, b"{}")).document == {"answer": "yes"}
        assert provider.stats().breaker == "closed"


async def test_what_is_in_flight_is_bounded_and_so_is_the_line() -> None:
    go = asyncio.Event()
    async with (
        ScriptedProvider([[go, *GOOD]]) as server,
        transport(server.url, concurrency=1, max_waiting=1) as provider,
    ):
        first = asyncio.create_task(provider.post(PATH, b"{}"))
        await server.asked(1)
        second = asyncio.create_task(provider.post(PATH, b"{}"))
        await asyncio.sleep(0)
        assert (provider.stats().running, provider.stats().waiting) == (1, 1)
        with pytest.raises(QueueFull):
            await provider.post(PATH, b"{}")
        assert len(server.requests) == 1
        go.set()
        await asyncio.gather(first, second)


async def test_a_body_is_made_when_its_turn_has_come_and_once_for_all_attempts() -> None:
    go = asyncio.Event()
    made: list[bytes] = []

    async def body() -> bytes:
        made.append(b'{"n":%d}' % len(made))
        return made[-1]

    async with (
        ScriptedProvider([[go, *GOOD], error_answer(500), GOOD]) as server,
        transport(server.url, concurrency=1, retries=AT_ONCE) as provider,
    ):
        first = asyncio.create_task(provider.post(PATH, body))
        await server.asked(1)
        second = asyncio.create_task(provider.post(PATH, body))
        while not provider.stats().waiting:  # noqa: ASYNC110 (it is about to)
            await asyncio.sleep(0)
        assert made == [b'{"n":0}']
        go.set()
        await asyncio.gather(first, second)
    assert [asked.body for asked in server.requests] == [b'{"n":0}', b'{"n":1}', b'{"n":1}']


async def test_a_body_that_cannot_be_made_gives_its_turn_back() -> None:
    async def body() -> bytes:
        raise ValueError("no body")

    async with ScriptedProvider([GOOD]) as server, transport(server.url, concurrency=1, max_waiting=0) as provider:
        with pytest.raises(ValueError, match="no body"):
            await provider.post(PATH, body)
        with pytest.raises(ValueError, match="no body"):
            async with provider.events(PATH, body):
                pass
        await provider.post(PATH, b"{}")


async def test_a_stream_holds_its_place_until_it_is_left() -> None:
    async with (
        ScriptedProvider([[*STREAM[:2], UNTIL_LEFT], GOOD]) as server,
        transport(server.url, concurrency=1, max_waiting=0) as provider,
    ):
        async with provider.events(PATH, b"{}"):
            with pytest.raises(QueueFull):
                await provider.post(PATH, b"{}")
        await provider.post(PATH, b"{}")


async def test_whoever_leaves_at_any_moment_leaves_nothing_behind() -> None:
    """Seeded: most of what is asked is cancelled, after as many turns of the loop as chance has it."""
    chance = random.Random(3)
    answers: list[Answer] = [
        STREAM, GOOD, error_answer(500), [HANG_UP], [stream_head(), event({"n": 1}), HANG_UP], [UNTIL_LEFT]
    ]  # fmt: skip
    limits = BreakerLimits(consecutive=3, open_s=0.001)
    patient = {"first_byte_s": 0.2}
    healing = False

    def script(asked: Asked) -> Answer:
        return GOOD if healing else chance.choice(answers)

    async def one() -> None:
        asking = read(provider) if chance.random() < 0.5 else provider.post(PATH, b"{}")
        with contextlib.suppress(ProviderError, EngineUnavailable):
            await asking

    async with (
        ScriptedProvider(script) as server,
        transport(server.url, concurrency=20, max_waiting=0, retries=AT_ONCE, breaker=limits, **patient) as provider,
    ):
        for _ in range(20):
            asking = [asyncio.create_task(one()) for _ in range(20)]
            for task in asking:
                for _ in range(chance.randrange(8)):
                    await asyncio.sleep(0)
                if chance.random() < 0.7:
                    task.cancel()
            await asyncio.wait(asking)
            assert all(task.cancelled() or task.exception() is None for task in asking)
        assert (provider.stats().running, provider.stats().waiting) == (0, 0)
        assert [replica.running for replica in provider.replicas()] == [0]
        healing = True
        while provider.stats().breaker != "closed":
            with contextlib.suppress(EngineUnavailable):
                await provider.post(PATH, b"{}")
        await asyncio.gather(*(provider.post(PATH, b"{}") for _ in range(20)))  # every place is there again


async def test_closing_ends_what_is_in_flight() -> None:
    async with ScriptedProvider([[UNTIL_LEFT]]) as server, transport(server.url, retries=AT_ONCE) as provider:
        call = asyncio.create_task(provider.post(PATH, b"{}"))
        await server.asked(1)
        await provider.close()
        with pytest.raises(EngineUnavailable):
            await call


async def test_an_address_that_is_down_hands_its_requests_to_another_at_once() -> None:
    async with ScriptedProvider([]) as gone:
        down = gone.url
    async with ScriptedProvider([GOOD]) as server:
        retries = RetryPolicy(attempts=2, first_backoff_s=1000.0)
        async with transport(down, server.url, retries=retries, draw=lambda: 1.0) as provider:
            for number in range(20):
                await provider.post(PATH, b"{}", affinity=f"prompt {number}")
            stats = provider.stats()
            assert (stats.replicas, stats.replicas_healthy) == (2, 1)
            assert stats.failures == stats.retries == 1


async def test_a_health_check_brings_an_address_back_and_takes_it_out() -> None:
    def script(asked: Asked) -> Answer:
        return [whole(b"", 200 if well else 503)] if asked.path == "/health" else GOOD

    well = True
    first, second = ScriptedProvider(script), ScriptedProvider(script)
    async with first:
        pass
    async with second, transport(first.url, second.url, retries=AT_ONCE, health_path="/health") as provider:
        await provider.check_health()
        assert provider.stats().replicas_healthy == 1
        async with first:
            await provider.check_health()
            assert provider.stats().replicas_healthy == 2
            well = False
            await provider.check_health()
            assert provider.stats().replicas_healthy == 0
            assert (await provider.post(PATH, b"{}")).document == {"answer": "yes"}


async def test_health_is_looked_at_again_and_again_in_the_background() -> None:
    async with (
        ScriptedProvider([[whole(b"")]]) as first,
        ScriptedProvider([[whole(b"")]]) as second,
        transport(first.url, second.url, health_path="/health", health_every_s=0.01),
    ):
        await first.asked(3)
        await second.asked(3)


async def test_a_drained_address_ends_what_it_has_and_gets_nothing_new() -> None:
    go = asyncio.Event()
    async with (
        ScriptedProvider([[go, *GOOD]]) as first,
        ScriptedProvider([GOOD]) as second,
        transport(first.url, second.url) as provider,
    ):
        provider.drain(second.url)
        running = asyncio.create_task(provider.post(PATH, b"{}"))
        await first.asked(1)
        provider.drain(first.url)
        provider.undrain(second.url)
        for number in range(10):
            await provider.post(PATH, b"{}", affinity=f"prompt {number}")
        assert (len(first.requests), len(second.requests)) == (1, 10)
        go.set()
        assert (await running).document == {"answer": "yes"}


@pytest.mark.parametrize("attempts", [1, 3])
async def test_of_two_thousand_requests_to_a_failing_provider_each_ends_in_one_way(attempts: int) -> None:
    """Seeded: 30 percent of what is asked fails, in every way there is. What was asked and what came of it agree."""
    chance = random.Random(20)
    played: Counter[str] = Counter()
    failures: dict[str, Answer] = {
        "500": error_answer(500),
        "429": error_answer(429),
        "hung up": [HANG_UP],
        "cut off": [whole(b'{"answer": "no"}', headers={"content-length": "99"}), HANG_UP],
        "cut stream": [stream_head(), HANG_UP],
    }

    def script(asked: Asked) -> Answer:
        name = chance.choice(list(failures)) if chance.random() < 0.3 else "good"
        played[name] += 1
        return failures.get(name, STREAM if b"stream" in asked.body else GOOD)

    ended: Counter[str] = Counter()

    async def one(number: int) -> None:
        try:
            if number % 2:
                assert await read(provider, deadline_s=60.0) == [{"n": 1}, {"n": 2}]
            else:
                assert (await provider.post(PATH, b"{}", deadline_s=60.0)).document == {"answer": "yes"}
            ended["good"] += 1
        except (ProviderUnavailable, ProviderRateLimited, ProviderMisbehaved) as error:
            ended[type(error).__name__] += 1

    retries = RetryPolicy(attempts=attempts, first_backoff_s=0.0)
    never = BreakerLimits(min_calls=10**6, consecutive=10**6)
    async with (
        ScriptedProvider(script) as server,
        transport(server.url, retries=retries, breaker=never, concurrency=32, max_waiting=2000) as provider,
    ):
        await asyncio.gather(*(one(number) for number in range(2000)))
        stats = provider.stats()
    assert sum(ended.values()) == 2000
    assert ended["good"] == played["good"]
    assert sum(played.values()) == len(server.requests) == 2000 + stats.retries
    assert stats.failures == len(server.requests) - played["good"]
    assert stats.failures > 500
    assert (stats.running, stats.waiting) == (0, 0)
    if attempts == 3:
        assert ended["good"] > 1800
