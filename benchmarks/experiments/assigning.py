"""What is measured of assignment: the function that the executor asks, after an allocation changed a hundred times."""

from __future__ import annotations

import random
import statistics
import time
from itertools import accumulate

from prompt_store.experiments.allocations import Allocation, initial, reallocate
from prompt_store.experiments.experiment import Experiment, parse_experiment
from service.experiments.assignment import assign

ARMS = ("control", "short", "long", "cheap")
REWEIGHTS = 100
_UNITS = 10_000


def assign_us(rounds: int) -> float:
    """Median microseconds of an assignment by `reweighted`, over rounds of ten thousand units each."""
    experiment, allocation = _experiment(), reweighted()
    attributes = {"country": "de"}
    units = [f"user-{number}" for number in range(_UNITS)]
    taken = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        for unit in units:
            assign(experiment.name, allocation, unit, experiment, attributes)
        taken.append((time.perf_counter() - began_s) / len(units) * 1e6)
    return statistics.median(taken)


def reweighted() -> Allocation:
    """Four arms whose weights were drawn anew a hundred times, as Thompson sampling may move them."""
    drawn = random.Random(1)
    *_, last = accumulate((_weights(drawn) for _ in range(REWEIGHTS)), reallocate, initial=initial(_even()))
    return last


def _even() -> dict[str, float]:
    return dict.fromkeys(ARMS, 1 / len(ARMS))


def _weights(drawn: random.Random) -> dict[str, float]:
    parts = [0.05 + drawn.random() for _ in ARMS]
    return {arm: part / sum(parts) for arm, part in zip(ARMS, parts, strict=True)}


def _experiment() -> Experiment:
    """With all that an assignment looks at: a holdout and targeting."""
    arms = [{"name": arm, "weight": weight} for arm, weight in _even().items()]
    return parse_experiment(
        {"name": "replies", "task": "replies", "control": ARMS[0], "arms": arms, "metric": "helpful", "holdout": 0.05,
         "targeting": {"country": ["de", "at"]}}
    )  # fmt: skip
