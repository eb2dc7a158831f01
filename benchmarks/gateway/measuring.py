"""What is measured: each gateway's latencies beside the provider's, and the gaps of local streams under load."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvloop

from benchmarks.engine.client import Connection
from benchmarks.engine.figures import median, quantile
from benchmarks.gateway.gateways import BASE_FOLDER, Side, post
from benchmarks.gateway.load import WARM_UP_S, Timings, press, pressing, without_garbage_collection

CONCURRENCIES = (16, 64)
_STREAMS, _STREAMED_TOKENS = 4, 256
_MIDWAY = b'"finish_reason":null'
_HEATING_S = 4.0


@dataclass
class Added:
    """What a gateway took beyond the provider in one cell, in milliseconds, and its answers per second; by round."""

    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    first_token_p50_ms: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)

    def note(self, through: Timings, direct: Timings) -> None:
        """Of timings that were taken one after the other."""
        self.p50_ms.append((median(through.whole_s) - median(direct.whole_s)) * 1000)
        self.p99_ms.append((quantile(through.whole_s, 0.99) - quantile(direct.whole_s, 0.99)) * 1000)
        self.first_token_p50_ms.append((median(through.first_token_s) - median(direct.first_token_s)) * 1000)
        self.rate.append(through.rate)


Cell = tuple[str, int, bool]
"""A gateway's name, a concurrency, and whether answers are streamed."""


def compare(direct: Side, gateways: Sequence[Side], rounds: int, seconds: float) -> dict[Cell, Added]:
    """Every gateway in every cell, in turns with the provider itself; whoever waits is stopped. Raises NoAnswer."""
    for gateway in gateways:
        with _at_work(gateway):
            for stream in (False, True):  # code is compiled, connections are opened, memory is taken
                press(gateway.server.port, gateway.request(stream=stream), CONCURRENCIES[0], _HEATING_S)
    found: dict[Cell, Added] = defaultdict(Added)
    for _ in range(rounds):
        for concurrency in CONCURRENCIES:
            for stream in (False, True):
                alone = press(direct.server.port, direct.request(stream=stream), concurrency, seconds)
                for gateway in gateways:
                    with _at_work(gateway):
                        request = gateway.request(stream=stream)
                        through = press(gateway.server.port, request, concurrency, seconds)
                    found[gateway.name, concurrency, stream].note(through, alone)
    return found


def local_gaps(gateway: Side, seconds: float) -> dict[str, float]:
    """Milliseconds between tokens of streams by the local engine, alone and beside requests to the provider."""
    figures = {}
    for name, loaded in (("local_gap", False), ("local_gap_loaded", True)):
        with without_garbage_collection():
            gaps = uvloop.run(_gaps(gateway, seconds, loaded=loaded))
        figures |= {f"{name}_ms": median(gaps) * 1000, f"{name}_p99_ms": quantile(gaps, 0.99) * 1000}
    return figures


async def _gaps(gateway: Side, seconds: float, *, loaded: bool) -> list[float]:
    asked = {"model": BASE_FOLDER.name, "prompt": "Once upon a time", "ignore_eos": True, "stream": True}
    request = post("/v1/completions", {**asked, "max_tokens": _STREAMED_TOKENS}, {})
    begins_s = time.perf_counter() + WARM_UP_S
    gaps: list[float] = []

    async def stream() -> None:
        connection = await Connection.open(gateway.server.port)
        while time.perf_counter() < begins_s + seconds:
            before_s: float | None = None
            async for event in connection.events(request):
                now_s = time.perf_counter()
                if before_s is not None and before_s > begins_s and _MIDWAY in event:
                    gaps.append(now_s - before_s)
                before_s = now_s
        await connection.close()

    load = [pressing(gateway.server.port, gateway.request(stream=False), CONCURRENCIES[0], seconds)] if loaded else []
    await asyncio.gather(*load, *(stream() for _ in range(_STREAMS)))
    return gaps


@contextmanager
def _at_work(gateway: Side) -> Iterator[None]:
    gateway.server.resume()
    try:
        yield
    finally:
        gateway.server.pause()
