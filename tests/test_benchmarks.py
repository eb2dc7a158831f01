"""The benchmark's own parts: figures from rates, and the HTTP client against a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from benchmarks.engine import cuda
from benchmarks.engine.client import Connection, Refused, closed_loop
from benchmarks.engine.figures import TARGETS, Target, json_line, quantile, rate_name, with_ratios
from benchmarks.engine.shapes import SHAPES
from benchmarks.engine.soak import gauge
from benchmarks.engine.workload import post, questions, soft_prompts
from service.engines.base_model import BaseModel
from service.engines.local.engine import EngineCore
from service.engines.local.options import EngineOptions

_ANSWER = json.dumps({"usage": {"completion_tokens": 3}}).encode()


@asynccontextmanager
async def server(answer: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A port where every request gets this answer, and the bodies that arrived there."""
    bodies: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            while (line := await reader.readline()) != b"\r\n":
                head += line
            length = int(head.lower().split(b"content-length: ")[1].split()[0])
            bodies.append(await reader.readexactly(length))
            writer.write(answer)
            await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1], bodies


def whole(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def chunked(*pieces: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


@pytest.mark.parametrize("answer", [whole(b"200 OK", _ANSWER), chunked(_ANSWER[:5], _ANSWER[5:])])
async def test_the_client_asks_everything_once_and_counts_the_tokens(answer: bytes) -> None:
    async with server(answer) as (port, bodies):
        measured = await closed_loop(port, [post({"index": index}) for index in range(10)], concurrency=4)
    assert measured.tokens == 30
    assert sorted(json.loads(body)["index"] for body in bodies) == list(range(10))


async def test_the_client_yields_each_event_however_its_chunks_are_cut() -> None:
    async with server(chunked(b"data: one\n", b"\ndata: two\n\nda", b"ta: [DONE]\n\n")) as (port, _):
        connection = await Connection.open(port)
        for _ in range(2):  # the connection stays usable
            events = [event async for event in connection.events(post({}))]
            assert events == [b"one", b"two", b"[DONE]"]
        await connection.close()


async def test_the_client_raises_for_an_answer_that_is_none() -> None:
    async with server(whole(b"400 Bad Request", b"no such task")) as (port, _):
        connection = await Connection.open(port)
        with pytest.raises(Refused, match="status 400: no such task"):
            await connection.ask(post({}))
        await connection.close()


def test_ratios_are_of_the_sides_they_name_and_none_where_one_is_missing() -> None:
    rates = {rate_name("softcue", 32, "8m"): 300.0, rate_name("vllm", 32, "8m"): 200.0}
    figures = with_ratios({**rates, rate_name("softcue", 1, "8m"): 10.0})
    assert figures["vs_vllm_c32_8m"] == 1.5
    assert figures["vs_vllm_c1_8m"] is None
    assert {target.figure for target in TARGETS} <= set(figures)
    assert json.loads(json_line({"a": 1.23456, "b": None}, {"cores": 2})) == {"cores": 2, "a": 1.235, "b": None}


def test_a_target_tells_goal_from_floor_in_both_directions() -> None:
    least, most = Target("a", 2.0, 3.0), Target("b", 3.0, 2.0, at_most=True)
    assert [least.verdict(value) for value in (1.9, 2.0, 3.0, None)] == ["missed", "floor", "goal", "not measured"]
    assert [most.verdict(value) for value in (3.1, 3.0, 2.0)] == ["missed", "floor", "goal"]


def test_a_quantile_is_the_value_that_the_fraction_does_not_exceed() -> None:
    assert quantile(list(range(100, 0, -1)), 0.99) == 99
    assert quantile([5.0], 0.99) == 5.0


def test_texts_are_drawn_anew_by_seed_and_hold_no_special_token() -> None:
    asked = questions([0, 1], 64, seed=1)
    assert asked == questions([0, 1], 64, seed=1)
    assert asked != questions([0, 1], 64, seed=2)
    assert all(4 <= token < 64 for question in asked for token in question.text)


def test_a_shape_counts_every_weight_of_a_decode_step() -> None:
    assert sum(out * inner for out, inner in SHAPES["115m"].linears) == 115_605_504


def test_a_gauge_is_read_from_metrics_with_or_without_labels() -> None:
    metrics = 'softcue_engine_kv_bytes{backend="local"} 1.5e+06\nsoftcue_other 2\n'
    assert gauge(metrics, "softcue_engine_kv_bytes") == 1.5e6
    assert gauge(metrics, "softcue_other") == 2
    assert gauge(metrics, "softcue_engine_kv_budget_bytes") is None


def test_the_engine_alone_answers_all_questions_some_at_a_time(base: BaseModel) -> None:
    side = cuda.CoreSide(EngineCore.load(base, EngineOptions()), soft_prompts(2, base.hidden_size))
    asked = questions([0, 1, None, 0, 1], base.vocabulary_size, seed=0, new=4)
    assert side.measure(asked, concurrency=2).tokens == side.measure(asked, concurrency=8).tokens == 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_cuda_benchmark_ends_with_what_it_needs_where_there_is_no_device() -> None:
    with pytest.raises(SystemExit, match=r"needs a CUDA device .* finds none; run it where"):
        cuda.main()
