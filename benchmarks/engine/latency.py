"""What a reader of one stream feels: the time to the first token, and the gaps between tokens beside long prompts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from benchmarks.engine.client import Connection
from benchmarks.engine.figures import median, quantile
from benchmarks.engine.workload import PROMPTS, Question, questions, softcue_request

_PAIRS = 50
_STREAMS, _STREAMED_TOKENS, _LONG_TEXT_TOKENS, _MIXED_S = 16, 256, 800, 8.0
_PAUSES_S = (0.0, 0.25)  # between long prompts: always one in work, and now and then one
_MIDWAY = b'"finish_reason":null'


async def time_to_first_token(port: int, base_name: str, vocabulary_size: int) -> tuple[float, float]:
    """Median seconds to the first streamed token with a warmed soft prompt and without one, one request at a time."""
    connection = await Connection.open(port)

    async def ask(question: Question) -> float:
        request = softcue_request(base_name, question, stream=True)
        started = time.perf_counter()
        times = [time.perf_counter() - started async for _ in connection.events(request)]
        return times[0]

    asked = questions([index % PROMPTS for index in range(PROMPTS + _PAIRS)], vocabulary_size, seed=0, new=2)
    pairs = [(await ask(question), await ask(replace(question, prompt=None))) for question in asked]
    await connection.close()
    with_prompt, without = zip(*pairs[PROMPTS:], strict=True)
    return median(with_prompt), median(without)


async def worst_gap_ratio(port: int, base_name: str, vocabulary_size: int) -> float:
    """p99 of the gaps between streamed tokens over their median while long prompts arrive; the worse of two loads."""
    ratios = []
    for pause_s in _PAUSES_S:
        gaps = await _gaps_beside_long_prompts(port, base_name, vocabulary_size, pause_s)
        ratios.append(quantile(gaps, 0.99) / median(gaps))
    return max(ratios)


async def _gaps_beside_long_prompts(port: int, base_name: str, vocabulary_size: int, pause_s: float) -> list[float]:
    gaps: list[float] = []
    ends = time.perf_counter() + _MIXED_S

    async def stream(index: int) -> None:
        connection = await Connection.open(port)
        seed = index
        while time.perf_counter() < ends:
            [question] = questions([index % PROMPTS], vocabulary_size, seed, new=_STREAMED_TOKENS)
            before: float | None = None
            async for event in connection.events(softcue_request(base_name, question, stream=True)):
                now = time.perf_counter()
                if before is not None and now < ends and _MIDWAY in event:
                    gaps.append(now - before)
                before = now
            seed += _STREAMS
        await connection.close()

    async def ask_long() -> None:
        connection = await Connection.open(port)
        count = 0
        while time.perf_counter() < ends:
            [question] = questions([count % PROMPTS], vocabulary_size, -count, text=_LONG_TEXT_TOKENS, new=1)
            await connection.ask(softcue_request(base_name, question))
            count += 1
            await asyncio.sleep(pause_s)
        await connection.close()

    await asyncio.gather(ask_long(), *(stream(index) for index in range(_STREAMS)))
    return gaps
