"""What analysis is made of: sums over units, as the store adds them up.

A unit is counted once, under the arm of its first exposure (by allocation number, and only within one by clock), with
the mean of its outcomes. w is one over the probability that the arm had then, y the unit's value, x its mean of the
same metric on generations outside the experiment from before its start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UnitSums:
    """Sums over one arm's units that were first exposed within one interval of time, which begins at `since_ms`.

    Names spell products: `wwy` is the sum of w*w*y. `units`, `uw` and `uww` are over all of them, those with `k` over
    the valued units that have an x, all others over the `valued`, which have a value.
    """

    arm: str
    since_ms: int
    units: int
    uw: float
    uww: float
    valued: int
    w: float
    wy: float
    ww: float
    wwy: float
    wwyy: float
    k: int = 0
    kw: float = 0.0
    kww: float = 0.0
    kwwy: float = 0.0
    wx: float = 0.0
    wwx: float = 0.0
    wwxx: float = 0.0
    wwxy: float = 0.0


@dataclass(frozen=True, slots=True)
class AllocationCount:
    """How many units were first exposed to each arm under one allocation, with the weights that it had."""

    number: int
    weights: dict[str, float]
    units: dict[str, int]


@dataclass(frozen=True, slots=True)
class ServedCount:
    """Of one arm's generations, those that one version on one backend answered; `mean` is of the metric's values."""

    arm: str
    version: str
    backend: str
    generations: int
    units: int
    mean: float | None


@dataclass(frozen=True, slots=True)
class MinuteHealth:
    """One minute of an arm: requests that ended, those that failed, and the 95th percentile of the rest's latency."""

    arm: str
    minute: int
    requests: int
    errors: int
    p95_latency_ms: float | None


@dataclass(frozen=True, slots=True)
class ExperimentSums:
    """All that a report needs, read at one moment. `metrics` are by metric; `crossed` units saw more than one arm.

    `forced` exposures are not among anything else; `held_out` units are in no arm.
    """

    metrics: Mapping[str, Sequence[UnitSums]]
    allocations: Sequence[AllocationCount]
    served: Sequence[ServedCount]
    exposures: int
    crossed: int
    forced: int
    held_out: int
