"""Which part of all units belongs to which arm, and how little of it moves when weights change. Pure.

The line from 0 to SPAN stands for all units. An arm that shrinks gives parts up and one that grows takes them, so an
arm that keeps its share keeps its units, and of one that grows none leave.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

SPAN = 2**32


@dataclass(frozen=True)
class Allocation:
    """`parts` are the arms along the line, each with where its part ends: ascending, the last at SPAN.

    `weights` are the arms' shares as they were asked for; an arm of less than half a position has no part.
    """

    weights: Mapping[str, float]
    parts: tuple[tuple[int, str], ...]

    def arm_at(self, position: int) -> str:
        """The arm of a position from 0 to SPAN - 1."""
        return self.parts[bisect_right(self._ends, position)][1]

    @cached_property
    def _ends(self) -> list[int]:
        return [end for end, _ in self.parts]


def initial(weights: Mapping[str, float]) -> Allocation:
    """Each arm's part in one piece, in their order. Weights sum to 1."""
    lengths = _shared_out(SPAN, weights)
    return Allocation(dict(weights), _parts((length, arm) for arm, length in lengths.items()))


def reallocate(previous: Allocation, weights: Mapping[str, float]) -> Allocation:
    """The same line with other weights, which sum to 1; arms may come and go.

    No more moves than must. Where a part of a shrinking arm lies beside one of a growing arm, the border between them
    moves, at the smallest such part first; a new part is made only where no two lie so. So there are few parts, however
    often weights change.
    """
    if weights == previous.weights:
        return previous
    pieces = _pieces(previous.parts)
    had: dict[str, int] = {}
    for length, arm in pieces:
        had[arm] = had.get(arm, 0) + length
    gives, takes = _moves(had, previous.weights, weights)
    while gives:
        if not _move_border(pieces, gives, takes):
            _hand_over(pieces, gives, takes)
        pieces = _merged(pieces)
    return Allocation(dict(weights), _parts(pieces))


def _moves(
    had: Mapping[str, int], before: Mapping[str, float], weights: Mapping[str, float]
) -> tuple[dict[str, int], dict[str, int]]:
    """How much of the line each shrinking arm gives, and each growing one takes: as much together.

    An arm whose weight stays gives and takes nothing, so the growing ones take up what rounding leaves.
    """
    wanted = _shared_out(SPAN, weights)
    lacking = {arm: wanted[arm] - had.get(arm, 0) for arm in weights if wanted[arm] > had.get(arm, 0)}
    growing = [arm for arm in weights if weights[arm] > before.get(arm, 0.0)]
    gives = {
        arm: length - wanted.get(arm, 0)
        for arm, length in had.items()
        if wanted.get(arm, 0) < length and weights.get(arm, 0.0) < before[arm]
    }
    takers = {arm: lacking[arm] for arm in growing if arm in lacking} or lacking or dict.fromkeys(growing, 1)
    if not takers:
        return {}, {}
    takes = _shared_out(sum(gives.values()), takers)
    return gives, {arm: length for arm, length in takes.items() if length}


def _move_border(pieces: list[tuple[int, str]], gives: dict[str, int], takes: dict[str, int]) -> bool:
    """Moves one border between a part that gives and one that takes; False where no two lie beside each other."""
    borders = [
        (pieces[giver][0], giver, taker)
        for giver in range(len(pieces))
        if pieces[giver][1] in gives
        for taker in (giver - 1, giver + 1)
        if 0 <= taker < len(pieces) and pieces[taker][1] in takes
    ]
    if not borders:
        return False
    length, giver, taker = min(borders)
    (_, from_arm), (grown, to_arm) = pieces[giver], pieces[taker]
    moved = _spend(length, from_arm, to_arm, gives, takes)
    pieces[giver], pieces[taker] = (length - moved, from_arm), (grown + moved, to_arm)
    return True


def _hand_over(pieces: list[tuple[int, str]], gives: dict[str, int], takes: dict[str, int]) -> None:
    """Gives a whole part to an arm that lies nowhere beside it, or where that is too much, the end of the largest."""
    from_arm, to_arm = next(iter(gives)), next(iter(takes))
    own = [(length, place) for place, (length, arm) in enumerate(pieces) if arm == from_arm]
    length, place = min(own)
    if length > min(gives[from_arm], takes[to_arm]):
        length, place = max(own)
    moved = _spend(length, from_arm, to_arm, gives, takes)
    pieces[place : place + 1] = [(length - moved, from_arm), (moved, to_arm)]


def _spend(length: int, from_arm: str, to_arm: str, gives: dict[str, int], takes: dict[str, int]) -> int:
    """How much of a part of that length goes from one arm to the other; what is done is taken off both accounts."""
    moved = min(length, gives[from_arm], takes[to_arm])
    for account, arm in ((gives, from_arm), (takes, to_arm)):
        account[arm] -= moved
        if not account[arm]:
            del account[arm]
    return moved


def _shared_out(whole: int, shares: Mapping[str, float]) -> dict[str, int]:
    """All of a length, in proportion to shares."""
    sums = list(accumulate(shares.values()))
    ends = [round(each / sums[-1] * whole) for each in sums]
    return {arm: end - start for arm, start, end in zip(shares, [0, *ends[:-1]], ends, strict=True)}


def _pieces(parts: tuple[tuple[int, str], ...]) -> list[tuple[int, str]]:
    """Parts by their lengths."""
    starts = [0, *(end for end, _ in parts[:-1])]
    return [(end - start, arm) for start, (end, arm) in zip(starts, parts, strict=True)]


def _merged(pieces: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Without pieces of no length, and with neighbours of one arm as one."""
    merged: list[tuple[int, str]] = []
    for length, arm in pieces:
        if merged and merged[-1][1] == arm:
            merged[-1] = (merged[-1][0] + length, arm)
        elif length:
            merged.append((length, arm))
    return merged


def _parts(pieces: Iterable[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    """Pieces by where they end."""
    merged = _merged(pieces)
    return tuple(zip(accumulate(length for length, _ in merged), (arm for _, arm in merged), strict=True))
