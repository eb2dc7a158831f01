from __future__ import annotations

import math
from collections import Counter

import pytest

from prompt_store.experiments.allocations import SPAN, initial, reallocate
from prompt_store.experiments.experiment import Experiment, parse_experiment
from service.experiments.assignment import assign, position

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
UNITS = [f"user {number}" for number in range(20_000)]


def experiment(**changes: object) -> Experiment:
    return parse_experiment({"name": "tone", "task": "support", "control": "a", "metric": "helpful", **changes})


def arms(split: str, weights: dict[str, float]) -> dict[str, str]:
    return {unit: assign(split, initial(weights), unit).arm for unit in UNITS}


@pytest.mark.parametrize(
    ("salt", "unit", "place"),
    [
        ("tone", "user 7", 146509266),
        ("tone", "user 8", 3782213303),
        ("", "", 1848904604),
        ("holdout\0support", "user 7", 3599307425),
    ],
)
def test_a_units_place_is_the_same_in_every_release(salt: str, unit: str, place: int) -> None:
    assert position(salt, unit) == place


def test_each_arm_gets_its_share_of_units() -> None:
    counts = Counter(arms("tone", WEIGHTS).values())
    for arm, weight in WEIGHTS.items():
        deviation = math.sqrt(len(UNITS) * weight * (1 - weight))
        assert abs(counts[arm] - len(UNITS) * weight) < 4 * deviation


def test_the_arms_of_two_splits_are_drawn_independently() -> None:
    one, other = arms("tone", {"a": 0.5, "b": 0.5}), arms("length", {"a": 0.5, "b": 0.5})
    both = sum(one[unit] == other[unit] == "a" for unit in UNITS)
    assert abs(both - len(UNITS) / 4) < 4 * math.sqrt(len(UNITS) * 3 / 16)


def test_units_of_an_arm_that_keeps_or_gains_share_stay() -> None:
    before = initial(WEIGHTS)
    after = reallocate(before, {"a": 0.3, "b": 0.3, "c": 0.4})
    moved = 0
    for unit in UNITS:
        was, now = assign("tone", before, unit).arm, assign("tone", after, unit).arm
        assert was == now or (was, now) == ("a", "c")
        moved += was != now
    assert abs(moved - 0.2 * len(UNITS)) < 4 * math.sqrt(len(UNITS) * 0.16)


def test_what_is_counted_has_the_probability_that_its_arm_has_now() -> None:
    allocation = initial(WEIGHTS)
    assert not assign("tone", allocation, "user 7").exposed
    assigned = assign("tone", allocation, "user 7", experiment())
    assert assigned.exposed
    assert assigned.arm == assigned.served
    assert assigned.probability == WEIGHTS[assigned.arm]


def test_held_out_units_get_the_control_and_are_the_same_in_every_experiment_of_a_task() -> None:
    allocation = initial({"b": 0.5, "a": 0.5})
    first, second = experiment(holdout=0.1), experiment(holdout=0.1, name="length")
    elsewhere = experiment(holdout=0.1, task="sales")
    held = {each.name + each.task: set() for each in (first, second, elsewhere)}
    for each in (first, second, elsewhere):
        for unit in UNITS:
            assigned = assign(each.name, allocation, unit, each)
            if assigned.arm == "holdout":
                assert (assigned.served, assigned.probability, assigned.exposed) == ("a", 0.1, True)
                held[each.name + each.task].add(unit)
    assert held["tonesupport"] == held["lengthsupport"] != held["tonesales"]
    assert abs(len(held["tonesupport"]) - 0.1 * len(UNITS)) < 4 * math.sqrt(len(UNITS) * 0.09)


def test_a_request_without_the_attributes_gets_the_control_and_counts_for_nothing() -> None:
    allocation = initial({"b": 1 - 1 / SPAN, "a": 1 / SPAN})
    targeted = experiment(targeting={"country": ("de", "at"), "plan": ("pro",)})
    taking_part = assign("tone", allocation, "user 7", targeted, {"country": "at", "plan": "pro", "more": "x"})
    assert (taking_part.arm, taking_part.exposed) == ("b", True)
    for attributes in ({}, {"country": "fr", "plan": "pro"}, {"country": "de"}):
        assigned = assign("tone", allocation, "user 7", targeted, attributes)
        assert (assigned.arm, assigned.served, assigned.exposed) == ("", "a", False)
