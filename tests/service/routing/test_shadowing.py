"""Shadows that hang: how many there are at most, and what becomes of them at the end."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from prompt_store.prompts.task import parse_task
from service.engines.scripted import ScriptedEngine
from service.routing.run import Step
from service.routing.shadowing import Said, Shadows
from tests.service.routing.routed import LOCAL, V2, Provider, apply, ask, counted, says, serving
from tests.service.serving import COPY, Store

TASK = parse_task(COPY)
STEP = Step("route", None, started_s=0.0)


async def test_of_shadows_that_hang_so_many_are_asked_and_the_rest_left_out_and_counted(store: Store) -> None:
    apply(store, "copy", {"kind": "shadow", "primary": LOCAL, "shadow": V2})
    hung = Provider(says(asyncio.Event()))
    async with asyncio.timeout(30):
        async with serving(store, ScriptedEngine(says("here")), hung) as client:
            bodies = [(await ask(client)).json() for _ in range(19)]
            await counted(client, 'softcue_shadow_answers_total{outcome="left_out",task="copy"} 3.0')
            assert len(hung.running) == 16
        assert hung.running == set()
    assert [body["text"] for body in bodies] == ["here"] * 19
    assert store.registry.shadow_answers("copy") == []


async def test_a_shadow_that_ends_makes_room_for_another() -> None:
    counts: Counter[str] = Counter()
    shadows = Shadows(lambda _: None, lambda _, outcome, __: counts.update([outcome]), at_once=1)
    go = asyncio.Event()

    async def ask() -> Said:
        await go.wait()
        return Said("there", STEP)

    def start(number: int) -> None:
        shadows.start(f"g{number}", "unit", "route", TASK, Said("here", STEP), ask())

    start(1)
    start(2)
    assert counts == {"left_out": 1}
    go.set()
    async with asyncio.timeout(10):
        while counts["answered"] < 1:  # noqa: ASYNC110 (a task ends)
            await asyncio.sleep(0.001)
        start(3)
        while counts["answered"] < 2:  # noqa: ASYNC110 (a task ends)
            await asyncio.sleep(0.001)
    assert counts == {"left_out": 1, "answered": 2}


async def test_closing_ends_what_hangs_writes_what_was_found_and_begins_no_other() -> None:
    counts: Counter[str] = Counter()
    written: list[Any] = []
    shadows = Shadows(written.extend, lambda _, outcome, __: counts.update([outcome]))
    never = asyncio.Event()

    async def ask(wait: bool) -> Said:
        if wait:
            await never.wait()
        return Said("there", STEP)

    def start(number: int, wait: bool) -> None:
        shadows.start(f"g{number}", "unit", "route", TASK, Said("here", STEP), ask(wait))

    for number in range(3):
        start(number, wait=number > 0)
    async with asyncio.timeout(10):
        while counts["answered"] < 1:  # noqa: ASYNC110 (a task ends)
            await asyncio.sleep(0.001)
        await shadows.close()
    start(3, wait=False)
    assert counts == {"answered": 1, "left_out": 3}
    assert [(answer.generation_id, answer.shadow_text) for answer in written] == [("g0", "there")]
