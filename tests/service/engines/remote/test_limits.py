"""How many run, and who waits."""

from __future__ import annotations

import asyncio
import time

import pytest

from service.engines.errors import DeadlineExceeded, QueueFull
from service.engines.remote.limits import ConcurrencyLimit


async def waiting(limit: ConcurrencyLimit, *names: str, entered: list[str]) -> list[asyncio.Task[None]]:
    """Tasks that wait in line, in this order; each notes its name once it has its turn."""

    async def enter(name: str) -> None:
        await limit.enter(None)
        entered.append(name)

    tasks = [asyncio.create_task(enter(name)) for name in names]
    await asyncio.sleep(0)  # each runs until it waits
    return tasks


async def test_turns_come_in_the_order_of_asking_and_a_new_comer_does_not_push_in() -> None:
    limit, entered = ConcurrencyLimit(1, 10, time.monotonic), []
    await limit.enter(None)
    tasks = await waiting(limit, "a", "b", entered=entered)
    limit.leave()
    tasks += await waiting(limit, "c", entered=entered)
    assert (limit.running, limit.waiting) == (1, 2)
    for task in tasks:
        await task
        limit.leave()
    assert entered == ["a", "b", "c"]
    assert (limit.running, limit.waiting) == (0, 0)


async def test_beyond_the_line_requests_are_refused() -> None:
    limit = ConcurrencyLimit(1, 1, time.monotonic)
    await limit.enter(None)
    tasks = await waiting(limit, "a", entered=[])
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        await limit.enter(None)
    limit.leave()
    await asyncio.gather(*tasks)


async def test_nobody_waits_past_his_deadline() -> None:
    limit = ConcurrencyLimit(1, 1, time.monotonic)
    await limit.enter(None)
    with pytest.raises(DeadlineExceeded, match="waited for its turn"):
        await limit.enter(time.monotonic() + 0.01)
    assert (limit.running, limit.waiting) == (1, 0)


@pytest.mark.parametrize("after_the_turn_was_given", [False, True])
async def test_a_waiter_who_is_cancelled_leaves_no_hole(after_the_turn_was_given: bool) -> None:
    limit, entered = ConcurrencyLimit(1, 10, time.monotonic), []
    await limit.enter(None)
    first, second = await waiting(limit, "a", "b", entered=entered)
    if after_the_turn_was_given:
        limit.leave()
        first.cancel()
    else:
        first.cancel()
        await asyncio.wait((first,))
        limit.leave()
    await second
    assert first.cancelled()
    assert entered == ["b"]
    assert (limit.running, limit.waiting) == (1, 0)
    limit.leave()
    await limit.enter(None)
