"""Tokens per second: sides that alternate in one run, and many prompts against one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.engine.figures import median
from benchmarks.engine.sides import Side, at_work
from benchmarks.engine.workload import PROMPTS, questions

MANY_PROMPTS, MANY_REQUESTS, MANY_CONCURRENCY = 1000, 192, 32
_LEAST_S = 1.25


def compare(sides: Sequence[Side], vocabulary_size: int, rounds: int) -> dict[tuple[str, int], float]:
    """Median tokens per second of each side at each of its concurrencies, with new texts in every round.

    Sides take turns at each concurrency. A round before the others warms up and says how many requests last a second.
    """
    for side in sides:
        side.pause()
    requests: dict[tuple[str, int], int] = {}
    rates: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for concurrency in sorted({concurrency for side in sides for concurrency in side.concurrencies}):
            for side in (side for side in sides if concurrency in side.concurrencies):
                key = side.name, concurrency
                prompts = [index % PROMPTS for index in range(requests.get(key, concurrency))]
                asked = questions(prompts, vocabulary_size, seed=turn)
                with at_work(side):
                    measured = side.measure(asked, concurrency)
                if turn == 0:
                    requests[key] = concurrency * math.ceil(_LEAST_S / measured.seconds)
                else:
                    rates.setdefault(key, []).append(measured.tokens_per_s)
    return {key: median(values) for key, values in rates.items()}


def many_against_one(side: Side, vocabulary_size: int, rounds: int) -> tuple[float, float]:
    """Median tokens per second where each request has another of 1,000 prompts, and where all have the same.

    The side must be at work. Every prompt is asked once before, and about once in five rounds.
    """
    side.measure(questions(range(MANY_PROMPTS), vocabulary_size, seed=0, new=1), MANY_CONCURRENCY)
    many, one = [], []
    for turn in range(rounds + 1):
        first = turn * MANY_REQUESTS
        different = [(first + index) % MANY_PROMPTS for index in range(MANY_REQUESTS)]
        for prompts, rates in ((different, many), ([0] * MANY_REQUESTS, one)):
            asked = questions(prompts, vocabulary_size, seed=turn)
            rates.append(side.measure(asked, MANY_CONCURRENCY).tokens_per_s)
    return median(many[1:]), median(one[1:])
