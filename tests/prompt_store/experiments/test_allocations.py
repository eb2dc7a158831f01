import random
from collections.abc import Mapping
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_store.experiments.allocations import SPAN, Allocation, initial, reallocate

ARMS = "abcdefgh"

# Small whole shares make weights that stay, vanish and come back likely.
shares = st.dictionaries(st.sampled_from(ARMS), st.integers(1, 5), min_size=1)
fine_shares = st.dictionaries(st.sampled_from(ARMS), st.floats(1e-6, 1.0), min_size=1)
histories = st.lists(st.one_of(shares, fine_shares), min_size=2, max_size=12)


def weights(shares: Mapping[str, float]) -> dict[str, float]:
    whole = sum(shares.values())
    return {arm: share / whole for arm, share in shares.items()}


def replayed(history: list[dict[str, float]]) -> list[Allocation]:
    found = [initial(weights(history[0]))]
    for each in history[1:]:
        found.append(reallocate(found[-1], weights(each)))
    return found


def lengths(allocation: Allocation) -> dict[str, int]:
    found: dict[str, int] = {}
    for start, end, arm in pieces(allocation):
        found[arm] = found.get(arm, 0) + end - start
    return found


def pieces(allocation: Allocation) -> list[tuple[int, int, str]]:
    ends = [end for end, _ in allocation.parts]
    return [(start, end, arm) for start, (end, arm) in zip([0, *ends], allocation.parts, strict=False)]


def moved(before: Allocation, after: Allocation) -> dict[tuple[str, str], int]:
    """How many positions went from one arm to another."""
    found: dict[tuple[str, str], int] = {}
    borders = sorted({0, *(end for end, _ in before.parts), *(end for end, _ in after.parts)})
    for start, end in pairwise(borders):
        way = before.arm_at(start), after.arm_at(start)
        if way[0] != way[1]:
            found[way] = found.get(way, 0) + end - start
    return found


@given(histories)
def test_parts_cover_the_whole_line_and_each_arm_has_its_share(history: list[dict[str, float]]) -> None:
    for step, allocation in enumerate(replayed(history)):
        ends = [end for end, _ in allocation.parts]
        assert ends == sorted(set(ends))
        assert ends[-1] == SPAN
        assert all(one[1] != other[1] for one, other in pairwise(allocation.parts))
        had = lengths(allocation)
        assert had.keys() <= allocation.weights.keys()
        for arm, weight in allocation.weights.items():
            # What rounding leaves is taken up by arms that grow, less than a position for each arm and step.
            assert abs(had.get(arm, 0) - weight * SPAN) <= len(ARMS) * (step + 1)


@given(histories)
def test_an_arm_that_keeps_its_weight_keeps_exactly_its_positions(history: list[dict[str, float]]) -> None:
    for before, after in pairwise(replayed(history)):
        kept = {arm for arm, weight in after.weights.items() if before.weights.get(arm) == weight}
        assert not any(kept & set(way) for way in moved(before, after))


@given(histories)
def test_a_growing_arm_loses_nothing_and_a_shrinking_one_gains_nothing(history: list[dict[str, float]]) -> None:
    for before, after in pairwise(replayed(history)):
        for giver, taker in moved(before, after):
            assert after.weights.get(giver, 0.0) < before.weights[giver]
            assert after.weights[taker] > before.weights.get(taker, 0.0)


@given(histories)
def test_no_more_moves_than_the_lengths_require(history: list[dict[str, float]]) -> None:
    for before, after in pairwise(replayed(history)):
        had, has = lengths(before), lengths(after)
        assert sum(moved(before, after).values()) == sum(max(0, had[arm] - has.get(arm, 0)) for arm in had)


@given(shares)
def test_the_same_weights_change_nothing(given_shares: dict[str, float]) -> None:
    first = initial(weights(given_shares))
    assert reallocate(first, dict(reversed(list(first.weights.items())))) is first


@given(fine_shares, st.integers(0, SPAN - 1))
def test_the_first_allocation_is_what_units_were_assigned_by_before_there_were_any(
    given_shares: dict[str, float], position: int
) -> None:
    """A unit was of the first arm whose weight, with those of the arms before it, exceeded its place from 0 to 1."""
    wanted = weights(given_shares)
    sums = list(accumulate(wanted.values()))
    if all(abs(position - bound * SPAN) > 1 for bound in sums):
        expected = next(arm for arm, bound in zip(wanted, sums, strict=True) if position / SPAN < bound)
        assert initial(wanted).arm_at(position) == expected


def test_every_position_has_the_arm_of_its_part() -> None:
    allocation = initial({"a": 0.25, "b": 0.75})
    assert allocation.parts == ((2**30, "a"), (SPAN, "b"))
    assert [allocation.arm_at(at) for at in (0, 2**30 - 1, 2**30, SPAN - 1)] == ["a", "a", "b", "b"]


def test_weights_that_sum_to_one_but_for_rounding_are_taken() -> None:
    first = initial({"a": 0.5, "b": 0.5, "c": 1e-7})
    assert lengths(reallocate(first, {"a": 0.5, "b": 0.5}))["a"] >= lengths(first)["a"]
    assert sum(lengths(reallocate(first, {"a": 0.4999999, "b": 0.5})).values()) == SPAN


@pytest.mark.parametrize(("arms", "most"), [(2, 2), (3, 16), (5, 48), (16, 384)])
def test_thousands_of_reweights_leave_few_parts(arms: int, most: int) -> None:
    generator = random.Random(arms)
    names = [f"arm {index}" for index in range(arms)]
    allocation = initial(weights(dict.fromkeys(names, 1.0)))
    for step in range(3000):
        now = list(allocation.weights.values())
        match step % 3:
            case 0:  # everything anew
                now = [generator.gammavariate(0.5, 1.0) + 1e-3 for _ in names]
            case 1:  # all a little
                now = [share * (1.0 + generator.uniform(-0.05, 0.05)) for share in now]
            case 2:  # one pays another, ever less
                giver, taker = generator.sample(range(arms), 2)
                paid = now[giver] * generator.random() / (1 + step / 100)
                now[giver], now[taker] = now[giver] - paid, now[taker] + paid
        allocation = reallocate(allocation, weights(dict(zip(names, now, strict=True))))
        assert len(allocation.parts) <= most


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15), st.integers(1, 60)), min_size=50, max_size=300))
def test_parts_stay_few_whatever_pays_what(payments: list[tuple[int, int, int]]) -> None:
    now = {f"{index:x}": 100 for index in range(16)}
    allocation = initial(weights(now))
    for giver, taker, paid in payments:
        amount = min(paid, now[f"{giver:x}"] - 1)
        now[f"{giver:x}"] -= amount
        now[f"{taker:x}"] += amount
        allocation = reallocate(allocation, weights(now))
    assert len(allocation.parts) <= 384
