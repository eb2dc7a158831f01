from __future__ import annotations

import json
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert

from prompt_store.database import Database
from prompt_store.ledger.entries import Answered, Entry, Exposure, Outcome
from prompt_store.ledger.sums import ExperimentSums, UnitSums
from prompt_store.prompts.registry import Registry
from prompt_store.tables import allocations, exposures
from tests.prompt_store.building import ANNA, task
from tests.prompt_store.ledger.entered import START_MS, answered, exposure, outcome

WEIGHTS = {1: {"a": 0.5, "b": 0.3, "c": 0.2}, 2: {"a": 0.2, "b": 0.3, "c": 0.5}}
METRICS = ("helpful", "latency_ms", "error")
PRODUCTS = [field for field in UnitSums.__dataclass_fields__ if field not in ("arm", "since_ms")]


@pytest.fixture
def registry(location: str) -> Iterator[Registry]:
    with Database.open(location) as database:
        registry = Registry(database)
        registry.apply_task(task("support"), ANNA)
        with database.write() as connection:
            for number, weights in WEIGHTS.items():
                known = {"number": number, "weights": json.dumps(weights), "parts": "[]"}
                connection.execute(
                    insert(allocations).values(
                        task="support", experiment="tone", at=datetime.now(UTC), principal="anna", **known
                    )
                )
        yield registry


def traffic(seed: int) -> list[Entry]:
    """Units with several requests, several arms, gaps, histories, other experiments' rows and forced ones."""
    draw = random.Random(seed)
    entries: list[Entry] = []
    for number in range(120):
        unit = f"u{number}"
        for turn in range(draw.randrange(1, 5)):
            request, allocation = f"{number}-{turn}", draw.choice([1, 1, 2])
            arm = draw.choice(["a", "b", "c", "holdout"] if number % 17 == 0 else ["a", "b", "c"])
            if number % 17 and draw.random() < 0.8:
                arm = "abc"[number % 3]
            weights = WEIGHTS[allocation]
            at_ms = START_MS + draw.randrange(-1, 6) * 200_000  # ties, and a clock that is behind the start
            who: dict[str, Any] = {"arm": arm, "unit_hash": unit}
            forced = draw.random() < 0.05
            entries.append(
                exposure(
                    request, **who, allocation=allocation, probability=weights.get(arm, 0.1), at_ms=at_ms, forced=forced
                )
            )
            counted = "" if forced else "tone"
            ended = draw.choice(["stop", "stop", "length", "error", "cancelled"])
            entries.append(
                answered(request, **who, experiment=counted, outcome=ended, latency_ms=draw.random() * 100, at_ms=at_ms)
            )
            if draw.random() < 0.6:
                entries.append(outcome(request, draw.random(), **who, experiment=counted, generated_ms=at_ms))
            if draw.random() < 0.4:
                earlier = START_MS - draw.randrange(-200, 1000)
                before: dict[str, Any] = {"unit_hash": unit, "experiment": "", "arm": ""}
                entries.append(outcome(f"{request}-x", draw.random(), **before, generated_ms=earlier))
                entries.append(answered(f"{request}-x", **before, latency_ms=draw.random() * 100, at_ms=earlier))
    return entries


def value_of(entry: Answered, metric: str) -> float | None:
    if entry.outcome == "cancelled":
        return None
    if metric == "error":
        return float(entry.outcome == "error")
    return entry.latency_ms if entry.outcome != "error" else None


def reference(entries: list[Entry], metric: str, missing: str) -> dict[str, dict[str, float]]:
    """The sums of UnitSums by arm, as its docstring has them."""
    first: dict[str, Exposure] = {}
    y: defaultdict[str, list[float]] = defaultdict(list)
    x: defaultdict[str, list[float]] = defaultdict(list)
    for entry in entries:
        if isinstance(entry, Exposure):
            known = first.get(entry.unit_hash)
            if not entry.forced and entry.arm != "holdout":
                order = (entry.allocation, entry.at_ms, entry.arm)
                if known is None or order < (known.allocation, known.at_ms, known.arm):
                    first[entry.unit_hash] = entry
            continue
        assert isinstance(entry, Outcome | Answered)
        value: float | None = None
        if isinstance(entry, Outcome) and metric == "helpful":
            value, at_ms = float(entry.value), entry.generated_ms
        elif isinstance(entry, Answered) and metric != "helpful":
            value, at_ms = value_of(entry, metric), entry.at_ms
        if value is not None:
            if entry.experiment == "tone":
                y[entry.unit_hash].append(value)
            elif at_ms < START_MS:
                x[entry.unit_hash].append(value)
    sums: defaultdict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PRODUCTS, 0.0))
    for unit, seen in first.items():
        w, into = 1 / seen.probability, sums[seen.arm]
        mine = statistics.fmean(y[unit]) if y[unit] else 0.0 if missing == "zero" and metric == "helpful" else None
        into["units"] += 1
        into["uw"] += w
        into["uww"] += w * w
        if mine is None:
            continue
        for name, product in (("valued", 1), ("w", w), ("ww", w * w), ("wy", w * mine), ("wwy", w * w * mine)):
            into[name] += product
        into["wwyy"] += w * w * mine * mine
        if x[unit]:
            was = statistics.fmean(x[unit])
            products = {"k": 1, "kw": w, "kww": w * w, "kwwy": w * w * mine, "wx": w * was, "wwx": w * w * was}
            for name, product in {**products, "wwxx": w * w * was * was, "wwxy": w * w * was * mine}.items():
                into[name] += product
    return sums


def by_arm(sums: ExperimentSums, metric: str) -> dict[str, dict[str, float]]:
    found: defaultdict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PRODUCTS, 0.0))
    for each in sums.metrics[metric]:
        for name in PRODUCTS:
            found[each.arm][name] += getattr(each, name)
    return found


@pytest.mark.parametrize("missing", ["ignore", "zero"])
@pytest.mark.parametrize("seed", range(3))
def test_the_databases_sums_are_those_of_their_definition(registry: Registry, seed: int, missing: Any) -> None:
    entries = traffic(seed)
    registry.add_entries(entries)
    sums = registry.experiment_sums("tone", "support", METRICS, missing=missing, started_ms=START_MS)
    for metric in METRICS:
        wanted = reference(entries, metric, missing)
        assert by_arm(sums, metric) == {arm: pytest.approx(products) for arm, products in wanted.items()}
    shown = [each for each in entries if isinstance(each, Exposure) and not each.forced]
    arms: defaultdict[str, set[str]] = defaultdict(set)
    for each in shown:
        arms[each.unit_hash].add(each.arm)
    drawn = {unit: seen - {"holdout"} for unit, seen in arms.items() if seen - {"holdout"}}
    assert sums.exposures == sum(each.arm != "holdout" for each in shown)
    assert sums.crossed == sum(len(seen) > 1 for seen in drawn.values())
    assert sums.forced == sum(isinstance(each, Exposure) and each.forced for each in entries)
    assert sums.held_out == sum("holdout" in seen for seen in arms.values())
    assert {count.number: count.weights for count in sums.allocations} == WEIGHTS
    assert sum(sum(count.units.values()) for count in sums.allocations) == len(drawn)
    ended = [each for each in entries if isinstance(each, Answered) and each.experiment and each.outcome != "cancelled"]
    assert sum(each.generations for each in sums.served) == sum(each.arm != "holdout" for each in ended)


def test_clocks_that_differ_by_hours_change_no_arms_count(registry: Registry) -> None:
    entries = traffic(7)
    registry.add_entries(entries)
    right = registry.experiment_sums("tone", "support", METRICS, missing="ignore", started_ms=START_MS)
    with registry.database.write() as connection:
        connection.execute(exposures.delete())
    # Of two replicas, one has a clock that is five hours late. A unit has one arm under one allocation.
    stable = [each for each in entries if isinstance(each, Exposure)]
    arm_of = {(each.unit_hash, each.allocation): each for each in sorted(stable, key=lambda each: -each.at_ms)}
    for late_ms in (0, 5 * 3600 * 1000):
        registry.add_entries(
            [
                msgspec.structs.replace(
                    each,
                    request=f"{late_ms}-{each.request}",
                    arm=arm_of[each.unit_hash, each.allocation].arm,
                    forced=False,
                    at_ms=each.at_ms - late_ms * (place % 2),
                )
                for place, each in enumerate(stable)
            ]
        )
        sums = registry.experiment_sums("tone", "support", METRICS, missing="ignore", started_ms=START_MS)
        units = {arm: products["units"] for arm, products in by_arm(sums, "helpful").items()}
        counts = {count.number: count.units for count in sums.allocations}
        if not late_ms:
            wanted = units, counts
    assert (units, counts) == wanted
    assert right.exposures


def test_an_experiment_without_exposures_has_sums_of_nothing(registry: Registry) -> None:
    sums = registry.experiment_sums("tone", "support", METRICS, missing="ignore", started_ms=START_MS)
    assert sums == ExperimentSums({metric: [] for metric in METRICS}, [], [], 0, 0, 0, 0)


def test_what_is_shown_over_time_adds_up_to_the_whole(registry: Registry) -> None:
    registry.add_entries([exposure(str(place), at_ms=START_MS + place * 1000) for place in range(500)])
    sums = registry.experiment_sums("tone", "support", METRICS, missing="ignore", started_ms=START_MS)
    shown = [each.since_ms for each in sums.metrics["helpful"]]
    assert shown == sorted(set(shown))
    assert 50 <= len(shown) <= 60
    assert sum(each.units for each in sums.metrics["helpful"]) == 500
