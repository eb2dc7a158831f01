from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_store.routing.routes import Arm, DirectRoute, SplitRoute
from service.experiments.best import probabilities_of_best, with_floor

normals = st.builds(NormalDist, st.floats(-3.0, 3.0), st.floats(0.01, 10.0))


@pytest.mark.parametrize("direction", ["maximise", "minimise"])
def test_three_arms_are_best_as_often_as_draws_say(direction: str) -> None:
    arms = {"a": NormalDist(1.0, 0.5), "b": NormalDist(1.2, 0.1), "c": NormalDist(0.0, 2.0)}
    draws = np.random.default_rng(1).normal(size=(1_000_000, 3)) * [0.5, 0.1, 2.0] + [1.0, 1.2, 0.0]
    places = draws.argmax(axis=1) if direction == "maximise" else draws.argmin(axis=1)
    found = probabilities_of_best(arms, direction)

    assert list(found.values()) == pytest.approx(np.bincount(places) / 1_000_000, abs=0.002)


@given(normals, normals)
def test_an_arm_that_cannot_win_changes_nothing_between_two(first: NormalDist, second: NormalDist) -> None:
    two = probabilities_of_best({"a": first, "b": second}, "maximise")
    three = probabilities_of_best({"a": first, "b": second, "c": NormalDist(-1e4, 1.0)}, "maximise")

    assert two["a"] + two["b"] == pytest.approx(1.0)
    assert [three["a"], three["b"]] == pytest.approx([two["a"], two["b"]], abs=1e-7)


@given(st.integers(2, 16), normals)
def test_equal_arms_are_equally_often_best(count: int, each: NormalDist) -> None:
    found = probabilities_of_best({str(place): each for place in range(count)}, "minimise")

    assert list(found.values()) == pytest.approx([1.0 / count] * count)


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=16).filter(any), st.floats(0.001, 1.0))
def test_weights_with_a_floor_sum_to_one_and_keep_their_order(chances: list[float], share: float) -> None:
    best = {str(place): each / math.fsum(chances) for place, each in enumerate(chances)}
    floor = share / len(best)
    weights = with_floor(best, floor)

    assert list(weights) == list(best)
    assert math.fsum(weights.values()) == pytest.approx(1.0, abs=1e-12)
    assert min(weights.values()) >= floor - 1e-12
    ordered = [weights[arm] for arm in sorted(best, key=lambda each: best[each])]
    assert all(less <= more + 1e-12 for less, more in pairwise(ordered))
    arms = [Arm(name=arm, weight=weight, route=DirectRoute()) for arm, weight in weights.items()]
    assert SplitRoute(experiment="tone", arms=tuple(arms)).arms == tuple(arms)


@pytest.mark.parametrize(
    ("best", "floor", "weights"),
    [
        ({"a": 0.6, "b": 0.4}, 0.05, {"a": 0.6, "b": 0.4}),
        ({"a": 1.0, "b": 0.0}, 0.05, {"a": 0.95, "b": 0.05}),
        ({"a": 0.9, "b": 0.06, "c": 0.04}, 0.05, {"a": 0.890625, "b": 0.059375, "c": 0.05}),
        ({"a": 0.94, "b": 0.051, "c": 0.009}, 0.05, {"a": 0.9, "b": 0.05, "c": 0.05}),
        ({"a": 1.0, "b": 0.0}, 0.5, {"a": 0.5, "b": 0.5}),
    ],
)
def test_what_the_floor_takes_is_shared_by_those_above_it(
    best: dict[str, float], floor: float, weights: dict[str, float]
) -> None:
    assert with_floor(best, floor) == pytest.approx(weights)


def test_floors_that_are_more_than_there_is_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a floor of 0\.4 for 3 arms is more than there is; lower it"):
        with_floor({"a": 0.5, "b": 0.3, "c": 0.2}, 0.4)
