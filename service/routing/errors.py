"""Why a request cannot be routed.

RoutingError
├── NotServed         the name is legal but nothing here serves it
├── WrongTaskKind     the task is of another kind than the endpoint needs
├── ModelRetired      the version is a remote model that its provider has shut down
├── CostCeilingReached  the task's answers of today have cost what they may; try again after `retry_after_s`
└── UnknownGeneration a generation id that this service did not sign
"""

from __future__ import annotations

from datetime import date


class RoutingError(Exception):
    """Base of routing errors; the message gives the fact and the remedy."""


class NotServed(RoutingError):
    """A legal name that no backend here serves."""


class WrongTaskKind(RoutingError):
    """The task's kind does not fit the endpoint."""


class ModelRetired(RoutingError):
    """A remote model past its shutdown date."""

    def __init__(self, version: str, model: str, on: date) -> None:
        super().__init__(
            f"{version} is answered by '{model}', which its provider shut down on {on}; ask for another version, or "
            "give the task's route a fallback"
        )


class CostCeilingReached(RoutingError):
    """A task's answers of today have cost its daily ceiling; `retry_after_s` is how long today still takes."""

    def __init__(self, task: str, ceiling: float, retry_after_s: float) -> None:
        super().__init__(
            f"the answers of task '{task}' have cost its daily ceiling of {ceiling:g}; try again after midnight UTC, "
            "or raise daily_cost_ceiling in the task's route"
        )
        self.retry_after_s = retry_after_s


class UnknownGeneration(RoutingError):
    """A generation id whose signature does not verify."""
