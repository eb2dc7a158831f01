from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_store.ledger.sums import AllocationCount
from service.experiments.sample_ratio import sample_ratio
from tests.service.experiments.simulating import RUNS, most


def count(units: dict[str, int], weights: dict[str, float] | None = None, number: int = 1) -> AllocationCount:
    return AllocationCount(number, weights or dict.fromkeys(units, 1.0 / len(units)), units)


def greatest_e_values(
    rng: np.random.Generator, weights: list[tuple[float, ...]], lengths: int, looks: int
) -> list[float]:
    """Of each run, the greatest e-value at any look; allocations follow one another, `looks` of each."""
    found = []
    names = "abc"
    for _ in range(RUNS):
        past: list[AllocationCount] = []
        greatest = 0.0
        for number, shares in enumerate(weights):
            drawn = np.cumsum(rng.multinomial(lengths // looks, shares, size=looks), axis=0)
            for units in drawn:
                told = dict(zip(names, shares, strict=False)), dict(zip(names, units.tolist(), strict=False))
                now = AllocationCount(number, *told)
                greatest = max(greatest, sample_ratio([*past, now]).e_value)
            past.append(now)
        found.append(greatest)
    return found


@pytest.mark.parametrize(
    ("weights", "length", "looks"),
    [
        ([(0.5, 0.5)], 10_000, 12),
        ([(0.8, 0.15, 0.05)], 10_000, 8),
        ([(0.5, 0.5), (0.7, 0.3), (0.9, 0.1), (0.4, 0.6)], 2000, 3),
    ],
)
def test_looked_at_all_the_time_it_alarms_no_more_often_than_alpha(
    weights: list[tuple[float, ...]], length: int, looks: int
) -> None:
    found = greatest_e_values(np.random.default_rng(1), weights, length, looks)

    for alpha in (0.001, 0.05, 0.2):
        assert sum(each > 1.0 / alpha for each in found) <= most(alpha)


shares = st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3)
allocated = st.tuples(shares, st.lists(st.integers(0, 400), min_size=3, max_size=3))


@settings(deadline=None)
@given(st.lists(allocated, min_size=1, max_size=4), st.integers(0, 3), shares)
def test_whichever_allocation_the_next_unit_comes_under_the_e_value_is_expected_to_stay(
    drawn: list[tuple[list[float], list[int]]], place: int, newest: list[float]
) -> None:
    # This and that it begins at 1 are all that Ville's inequality asks: it is so for any past, weights that follow it
    # included, and for units that still come under earlier weights, as from replicas that have not heard of the newest.
    counts = [
        count(dict(zip("abc", units, strict=True)), dict(zip("abc", weights, strict=True)), number)
        for number, (weights, units) in enumerate([*drawn, (newest, [0, 0, 0])])
    ]
    at = place % len(counts)
    whole = sum(counts[at].weights.values())
    expected = 0.0
    for arm, weight in counts[at].weights.items():
        more = replace(counts[at], units={**counts[at].units, arm: counts[at].units[arm] + 1})
        expected += weight / whole * sample_ratio([*counts[:at], more, *counts[at + 1 :]]).e_value

    now = sample_ratio(counts).e_value
    if now < 1e300:  # what is more is cut off
        assert expected == pytest.approx(now, rel=1e-6)


def test_two_points_of_a_half_are_found_at_20_000_units() -> None:
    found = sample_ratio([count({"control": 9600, "first": 10_400})])

    assert found.mismatch
    assert found.p_value < 0.0001
    assert found.expected == {"control": 10_000.0, "first": 10_000.0}
    assert found.observed == {"control": 9600, "first": 10_400}
    assert not sample_ratio([count({"control": 9950, "first": 10_050})]).mismatch


@pytest.mark.parametrize(
    ("lost", "units", "share"), [(0.08, 20_000, 0.9), (0.02, 400_000, 0.9), (0.5, 400, 0.8), (1.0, 60, 1.0)]
)
def test_an_arm_that_loses_units_is_found(lost: float, units: int, share: float) -> None:
    rng = np.random.default_rng(2)
    chance = 0.5 * (1 - lost) / (1 - 0.5 * lost)
    observed = rng.binomial(units, chance, size=200).tolist()

    found = sum(sample_ratio([count({"a": units - each, "b": each})]).mismatch for each in observed)
    assert found >= share * 200


def test_an_arm_that_loses_units_is_found_over_many_short_allocations() -> None:
    rng = np.random.default_rng(3)
    counts = []
    for number in range(200):
        weight = float(rng.uniform(0.1, 0.9))
        chance = 0.9 * weight / (1 - 0.1 * weight)
        first = int(rng.binomial(150, chance))
        counts.append(count({"a": 150 - first, "b": first}, {"a": 1 - weight, "b": weight}, number))

    assert sample_ratio(counts).mismatch
    assert not any(sample_ratio([each]).mismatch for each in counts)


def test_allocations_that_hold_each_by_itself_are_no_mismatch_though_all_units_together_differ_from_the_newest() -> (
    None
):
    counts = [count({"a": 9000, "b": 1000}, {"a": 0.9, "b": 0.1}, 1), count({"a": 500, "b": 500}, number=2)]
    found = sample_ratio(counts)

    assert not found.mismatch
    assert found.expected == pytest.approx({"a": 9500.0, "b": 1500.0})
    assert found.observed == {"a": 9500, "b": 1500}


def test_units_of_an_arm_that_can_have_none_are_a_mismatch() -> None:
    found = sample_ratio([count({"a": 50, "b": 50, "c": 1}, {"a": 0.5, "b": 0.5})])

    assert found.mismatch
    assert found.expected["c"] == 0.0
    assert found.observed["c"] == 1


def test_a_mismatch_beyond_what_a_float_holds_is_one() -> None:
    found = sample_ratio([count({"a": 10_000_000, "b": 0})])

    assert found.mismatch
    assert 0.0 < found.p_value < 1e-300


@pytest.mark.parametrize("counts", [[], [count({}, {"a": 0.5, "b": 0.5})], [count({"a": 0, "b": 0})]])
def test_nothing_is_known_of_no_units(counts: list[AllocationCount]) -> None:
    found = sample_ratio(counts)

    assert found.e_value == pytest.approx(1.0)
    assert found.p_value == pytest.approx(1.0)
    assert not found.mismatch


counted = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000), st.floats(0.05, 0.95)), min_size=1, max_size=6)


@given(counted)
def test_neither_the_order_of_arms_nor_of_allocations_matters(drawn: list[tuple[int, int, float]]) -> None:
    counts = [
        count({"a": a, "b": b}, {"a": weight, "b": 1 - weight}, number) for number, (a, b, weight) in enumerate(drawn)
    ]
    turned = [
        count({"b": b, "a": a}, {"b": 1 - weight, "a": weight}, number) for number, (a, b, weight) in enumerate(drawn)
    ]

    assert sample_ratio(turned[::-1]).e_value == pytest.approx(sample_ratio(counts).e_value, rel=1e-6)
