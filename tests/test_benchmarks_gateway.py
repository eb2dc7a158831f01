"""The gateway benchmark's own parts: its provider against OpenAI's client, and its load against the provider."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI

from benchmarks.gateway.gateways import post
from benchmarks.gateway.load import NoAnswer, Request, Timings, pressing
from benchmarks.gateway.measuring import Added
from benchmarks.gateway.provider import FIRST_WORD, Answering

_MESSAGES = [{"role": "user", "content": "Which planet is nearest to the sun?"}]


@pytest.fixture
async def provider() -> AsyncIterator[int]:
    """The port of a provider in this process."""
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def asked(*, stream: bool, path: str = "/v1/chat/completions", first_token: str = FIRST_WORD) -> Request:
    return Request(post(path, {"model": "m", "messages": _MESSAGES, "stream": stream}, {}), first_token.encode())


async def test_the_official_client_reads_the_same_answer_whole_and_streamed(provider: int) -> None:
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{provider}/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(model="m", messages=_MESSAGES)
        chunks = await client.chat.completions.create(
            model="m", messages=_MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        seen = [chunk async for chunk in chunks]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in seen if chunk.choices)
    assert text.startswith(FIRST_WORD)
    assert text == whole.choices[0].message.content
    assert seen[-1].usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
async def test_the_load_times_every_answer_and_its_first_token(provider: int, *, stream: bool) -> None:
    timings = await pressing(provider, asked(stream=stream), 2, 0.2)
    assert len(timings.whole_s) == len(timings.first_token_s) > 0
    pairs = zip(timings.first_token_s, timings.whole_s, strict=True)
    assert all(0 < first_s <= whole_s for first_s, whole_s in pairs)


async def test_an_answer_without_the_text_that_it_must_hold_is_none(provider: int) -> None:
    with pytest.raises(NoAnswer, match="Mercury"):
        await pressing(provider, asked(stream=False, first_token="Venus"), 2, 0.2)


async def test_a_server_that_hangs_up_ends_the_load() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        with pytest.raises(NoAnswer, match="closed the connection"):
            await pressing(server.sockets[0].getsockname()[1], asked(stream=False), 1, 0.2)


def test_what_a_gateway_adds_is_the_difference_of_medians_and_of_99th_percentiles() -> None:
    added = Added()
    direct = Timings([0.020] * 100, [0.020] * 99 + [0.021], 1.0)
    added.note(Timings([0.021] * 100, [0.022] * 98 + [0.030] * 2, 0.5), direct)
    assert added.p50_ms == pytest.approx([2.0])
    assert added.p99_ms == pytest.approx([10.0])
    assert added.first_token_p50_ms == pytest.approx([1.0])
    assert added.rate == [200.0]
