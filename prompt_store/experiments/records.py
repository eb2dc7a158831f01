"""An experiment as the store keeps it: its document, its state, and the weights that it has now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from prompt_store.experiments.allocations import Allocation
from prompt_store.experiments.experiment import Experiment

State = Literal["running", "stopped", "promoted", "rolled_back"]


@dataclass(frozen=True, slots=True)
class NumberedAllocation:
    """A split's allocation; `number` is what exposures name, counted by task and split from 1; 0 is of none stored."""

    number: int
    allocation: Allocation


@dataclass(frozen=True, slots=True)
class ExperimentRecord:
    """One experiment. `revision` counts its changes, for compare-and-set; `weights` are by arm, the control first.

    `versions` are the labels that each arm's leaves were pinned to when it started, in their order. `winner` is the arm
    that was promoted.
    """

    experiment: Experiment
    state: State
    revision: int
    weights: Mapping[str, float]
    versions: Mapping[str, tuple[str, ...]]
    started_at: datetime
    started_by: str
    ended_at: datetime | None = None
    ended_by: str = ""
    reason: str = ""
    winner: str | None = None


@dataclass(frozen=True, slots=True)
class ExperimentEvent:
    """One entry of an experiment's history, from the audit trail; `details` are the numbers that it rests on."""

    sequence: int
    action: str
    reason: str
    details: Mapping[str, Any]
    at: datetime
    principal: str
