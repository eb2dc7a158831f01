"""Captured traffic in a store, as a service would have shipped it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from prompt_store.ledger.entries import Answered, Captured, Entry, Outcome

Value = bool | float | str


@dataclass(frozen=True)
class Asked:
    """One request of a task with the input `message`, and what came of it."""

    request: str
    message: str | None
    answer: str
    unit: str = "u1"
    outcomes: dict[str, Value] = field(default_factory=dict)
    latency_ms: float = 100.0
    at_ms: int = 1_000
    experiment: str = ""
    arm: str = ""
    version: str = "a" * 64
    inputs: dict[str, str] | None = None

    def captured(self) -> Captured:
        inputs = self.inputs or ({"message": self.message} if self.message is not None else None)
        return Captured(
            self.request, "colours", "c" * 64, self.version, self.unit, inputs, "the prompt", self.answer, self.at_ms,
            self.at_ms + 10**14, "anonymous",
        )  # fmt: skip

    def entries(self) -> Sequence[Entry]:
        return [
            Answered(
                self.request, "colours", self.experiment, self.arm, self.unit, self.version, "local", "stop",
                self.latency_ms, None, 0.0, 10, 3, False, None, self.at_ms, "anonymous",
            ),
            self.captured(),
            *(
                Outcome(
                    self.request, "colours", self.experiment, self.arm, self.unit, self.version[:16], self.at_ms,
                    metric, value, self.at_ms + 1, "caller", "anonymous",
                )
                for metric, value in self.outcomes.items()
            ),
        ]  # fmt: skip
