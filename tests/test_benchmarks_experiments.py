"""The experiments benchmark's own parts: its open loop of requests, and the allocation that it assigns by."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator

import pytest

from benchmarks.experiments.assigning import ARMS, REWEIGHTS, assign_us, reweighted
from benchmarks.experiments.open_loop import OpenLoop
from benchmarks.gateway.gateways import post
from benchmarks.gateway.load import NoAnswer
from benchmarks.gateway.provider import DELAY_S, Answering


class Provider:
    """The benchmark's provider in a thread, with what it was asked."""

    def __init__(self, protocol: type[asyncio.Protocol] | None = None) -> None:
        self.asked: list[bytes] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asked = self.asked

        class Counting(Answering):
            def data_received(self, data: bytes) -> None:
                asked.append(data)
                super().data_received(data)

        kind = protocol or Counting
        opened = self._opened = list[asyncio.BaseTransport]()

        class Kept(kind):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                opened.append(transport)
                super().connection_made(transport)

        self._server = asyncio.run_coroutine_threadsafe(
            self._loop.create_server(Kept, "127.0.0.1", 0), self._loop
        ).result()
        self.port = int(self._server.sockets[0].getsockname()[1])

    def end(self) -> None:
        async def close() -> None:
            self._server.close()
            for transport in self._opened:
                transport.close()
            await self._server.wait_closed()
            await asyncio.sleep(0)  # the loop closes sockets in its next turn

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    running = Provider()
    yield running
    running.end()


def numbered() -> Iterator[bytes]:
    for number in itertools.count():
        yield post("/v1/chat/completions", {"model": f"m-{number}", "messages": []}, {})


def test_requests_are_sent_whether_others_are_answered_or_not_and_timed_to_their_answers(provider: Provider) -> None:
    loop = OpenLoop(provider.port, rate=400, seconds=0.5, warm_up_s=0.1)
    taken_s = loop.run(numbered())
    # One connection after another could not have answered this many in the time.
    assert 0.5 / DELAY_S < len(taken_s) < len(provider.asked)
    assert all(one_s >= DELAY_S for one_s in taken_s)
    assert len({data[data.index(b"m-") :] for data in provider.asked}) == len(provider.asked)


def test_what_follows_an_answer_is_made_of_it_sent_and_not_timed(provider: Provider) -> None:
    loop = OpenLoop(provider.port, rate=100, seconds=0.2, warm_up_s=0.0)
    answers: list[bytes] = []

    def follow_up(answer: bytes) -> bytes:
        answers.append(answer)
        return post("/v1/outcomes", {"model": "m", "messages": []}, {})

    taken_s = loop.run(numbered(), follow_up)
    assert len(answers) == len(taken_s) > 0
    assert all(b"Mercury" in answer for answer in answers)
    assert sum(data.startswith(b"POST /v1/outcomes ") for data in provider.asked) == len(answers)


def test_the_same_seed_sends_at_the_same_moments() -> None:
    moments = [OpenLoop(0, rate=100, seconds=1.0, seed=seed)._moments_s for seed in (1, 1, 2)]
    assert moments[0] == moments[1] != moments[2]


class HangingUp(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class Refusing(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy")


@pytest.mark.parametrize(
    ("protocol", "said"), [(HangingUp, "closed the connection"), (Refusing, "this is no answer: .* 503")]
)
def test_an_answer_that_is_none_ends_the_load(protocol: type[asyncio.Protocol], said: str) -> None:
    server = Provider(protocol)
    try:
        with pytest.raises(NoAnswer, match=said):
            OpenLoop(server.port, rate=100, seconds=5.0).run(numbered())
    finally:
        server.end()


def test_assignment_is_timed_with_an_allocation_of_many_parts() -> None:
    allocation = reweighted()
    assert {arm for _, arm in allocation.parts} == set(ARMS)
    assert len(allocation.parts) > len(ARMS)
    assert REWEIGHTS == 100
    assert assign_us(1) > 0
