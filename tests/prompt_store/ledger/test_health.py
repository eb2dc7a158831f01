from __future__ import annotations

import math
import random

from prompt_store.database import Database
from prompt_store.ledger.entries import Answered
from prompt_store.ledger.sums import MinuteHealth
from prompt_store.prompts.registry import Registry
from tests.prompt_store.ledger.entered import START_MS, answered


def test_minutes_are_told_apart_by_arm(location: str) -> None:
    draw = random.Random(3)
    entries: list[Answered] = [
        answered(
            str(place), arm=draw.choice("ab"), outcome=draw.choice(["stop"] * 6 + ["error", "cancelled"]),
            latency_ms=float(draw.randrange(1000)), at_ms=START_MS + draw.randrange(180_000),
            experiment=draw.choice(["tone", "tone", "other"]),
        )
        for place in range(400)
    ]  # fmt: skip
    since_ms = START_MS + 30_000
    with Database.open(location) as database:
        registry = Registry(database)
        registry.add_entries(entries)
        found = registry.health("tone", since_ms)
    wanted = []
    counted = [
        each for each in entries if each.experiment == "tone" and each.outcome != "cancelled" and each.at_ms >= since_ms
    ]
    for minute, arm in sorted({(each.at_ms // 60_000, each.arm) for each in counted}):
        here = [each for each in counted if (each.at_ms // 60_000, each.arm) == (minute, arm)]
        well = sorted(each.latency_ms for each in here if each.outcome != "error")
        p95 = well[math.ceil(len(well) * 0.95) - 1] if well else None
        wanted.append(MinuteHealth(arm, minute, len(here), len(here) - len(well), p95))
    assert found == wanted
