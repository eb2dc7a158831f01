"""Which arm of an experiment a unit belongs to: always the same one, wherever and whenever it is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from prompt_store.experiments.allocations import SPAN, Allocation
from prompt_store.experiments.experiment import Experiment
from prompt_store.ledger.entries import HOLDOUT

_NO_ATTRIBUTES: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Assigned:
    """What a request is to an experiment: the arm that it counts for, with the probability of that, or none.

    `served` is the arm whose route answers: the control's for units that see nothing of the experiment.
    """

    arm: str
    served: str
    probability: float
    exposed: bool


def position(salt: str, unit: str) -> int:
    """The unit's place on the line from 0 to SPAN - 1; each salt puts units on it independently of every other."""
    digest = hashlib.sha256(f"{salt}\0{unit}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * SPAN >> 64


def assign(
    split: str,
    allocation: Allocation,
    unit: str,
    experiment: Experiment | None = None,
    attributes: Mapping[str, str] = _NO_ATTRIBUTES,
) -> Assigned:
    """The unit's arm of a split, and whether that is to be counted: only where an `experiment` runs on it.

    Requests without an attribute that the experiment asks for get the control's answers and count for nothing. Units
    that are held out of one experiment of a task are held out of all of them.
    """
    if experiment is not None:
        if any(attributes.get(name) not in values for name, values in experiment.targeting.items()):
            return Assigned("", experiment.control, 1.0, exposed=False)
        if experiment.holdout and position(f"{HOLDOUT}\0{experiment.task}", unit) < experiment.holdout * SPAN:
            return Assigned(HOLDOUT, experiment.control, experiment.holdout, exposed=True)
    arm = allocation.arm_at(position(split, unit))
    return Assigned(arm, arm, allocation.weights[arm], exposed=experiment is not None)
