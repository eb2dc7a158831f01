"""One request on its way through its route: the time it has, and the steps that it took.

A Run is told what happens; who decides what to do next is `execute`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from prompt_store.access import Principal
from prompt_store.errors import StoreError
from prompt_store.routing.routes import Route
from service.engines.deadlines import left_s
from service.engines.errors import DeadlineExceeded, EngineError
from service.routing.errors import RoutingError
from service.routing.plan import Plan, Target

T = TypeVar("T")

# One step at most has `answered` once a request has ended; `passed_over` are answers that others were given instead of.
Outcome = Literal["running", "answered", "passed_over", "failed", "cancelled"]

_MOMENT_S = 0.02
_MOMENT_SHARE = 0.05

# What a route can do something about by asking another leaf.
Failure = (EngineError, StoreError, RoutingError)


@dataclass(slots=True)
class Step:
    """A leaf that was asked. `place` is where in the route it stands, `reason` why it failed or was passed over.

    `error` is the type of what failed, and says nothing of the request.
    """

    place: str
    target: Target | None
    started_s: float
    outcome: Outcome = "running"
    reason: str = ""
    error: str = ""
    note: str = ""
    confidence: float | None = None
    cost: float = 0.0
    provider_request_id: str = ""
    seconds: float = 0.0

    @property
    def backend(self) -> str:
        """Empty where it was not known whom to ask."""
        return self.target.backend if self.target is not None else ""

    @property
    def label(self) -> str:
        """The target's, empty likewise."""
        return self.target.label if self.target is not None else ""

    def end(self, outcome: Outcome, reason: str = "") -> None:
        """How it came out; what is said later changes nothing, except that an answer may be passed over."""
        if self.outcome == "running":
            self.seconds = time.perf_counter() - self.started_s
            self.outcome, self.reason = outcome, reason

    def answer(self, provider_request_id: str = "") -> None:
        """It has answered whole."""
        self.provider_request_id = provider_request_id
        self.end("answered")

    def fail(self, error: BaseException) -> None:
        """It raised this, or was cut off because of it."""
        if not isinstance(error, Exception):
            self.end("cancelled")
            return
        if self.outcome == "cancelled":
            self.outcome = "running"
        if self.outcome == "running":
            self.end("failed", str(error))
            self.error = type(error).__name__
            self.provider_request_id = self.provider_request_id or getattr(error, "request_id", "")

    def pass_over(self, reason: str) -> None:
        """It answered, and its answer is not the one that counts."""
        self.outcome, self.reason = "passed_over", reason

    def take_back(self, note: str) -> None:
        """It was passed over, and its answer is the one that counts all the same."""
        self.outcome, self.reason, self.note = "answered", "", note

    def document(self) -> dict[str, Any]:
        """For an answer's body: what it did, without what it did not."""
        known: dict[str, Any] = {
            "place": self.place,
            "backend": self.backend,
            "version": self.label,
            "outcome": self.outcome,
            "milliseconds": round(self.seconds * 1000, 1),
            "cost": self.cost,
        }
        if self.reason:
            known["reason"] = self.reason
        if self.note:
            known["note"] = self.note
        if self.confidence is not None:
            known["confidence"] = self.confidence
        if self.provider_request_id:
            known["provider_request_id"] = self.provider_request_id
        return known


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, for whom, and since when (`time.perf_counter` seconds).

    Without a `unit`, each of its requests is one of its own. Experiments choose requests by their `attributes`; `arm`
    is asked for instead of drawn.
    """

    principal: Principal
    unit: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    arm: str = ""
    started_s: float = field(default_factory=time.perf_counter)


@dataclass(slots=True)
class Run:
    """A request under way. `ends_at` is by `time.monotonic`, None where it may take as long as it takes.

    `arm` is that of the last split on its way, `experiment` the one that it counts for, if any; one that is not
    `counted` is of the service's own.
    `held_back` says that an answer waited until it was accepted before any of it was sent. `shadows` are routes that
    are to be asked the same once the answer has ended. Its text is `said` then, where it is `listened` to.
    """

    id: str
    plan: Plan
    caller: Caller
    unit: str
    unit_hash: str
    ends_at: float | None = None
    counted: bool = True
    arm: str = ""
    experiment: str = ""
    held_back: bool = False
    steps: list[Step] = field(default_factory=list)
    shadows: list[tuple[Route, str]] = field(default_factory=list)
    captured: bool = False
    listened: bool = False
    said: list[str] = field(default_factory=list)
    refused: bool = False

    @property
    def last_target(self) -> Target | None:
        """Who was asked last."""
        return self.steps[-1].target if self.steps else self.plan.target

    @property
    def cost(self) -> float:
        """What all steps cost together, as far as they are known."""
        return sum(step.cost for step in self.steps)

    def begin(self, place: str, target: Target | None) -> Step:
        """A leaf is asked now."""
        step = Step(place, target, time.perf_counter())
        self.steps.append(step)
        return step

    def document(self) -> dict[str, Any]:
        """The path taken and its cost, as answers show them."""
        shown: dict[str, Any] = {"route": [step.document() for step in self.steps], "cost": self.cost}
        if self.arm:
            shown["arm"] = self.arm
        if self.held_back:
            shown["held_back"] = True
        return shown


@dataclass(frozen=True, slots=True)
class Turn:
    """What a leaf is given: until when it must begin to answer, and whether another is asked where it fails.

    `until` is by `time.monotonic`, None where it may take as long as it takes.
    """

    until: float | None
    another_follows: bool = False


def for_an_engine(until: float | None) -> float | None:
    """The seconds until then, less a moment: an engine that is late says so itself, before its caller hangs up on it.

    Only then does it hold that against its provider. Raises DeadlineExceeded where no time is left.
    """
    seconds = left_s(until)
    return None if seconds is None else seconds - min(_MOMENT_S, seconds * _MOMENT_SHARE)


async def within(until: float | None, work: Awaitable[T], late: str = "the answer was not there whole") -> T:
    """The result of work. Raises DeadlineExceeded, which says what is `late`, where it is not there by then.

    Work is begun in any case, so that it ends what it is to end.
    """
    seconds = None if until is None else max(until - time.monotonic(), 0.0)
    try:
        async with asyncio.timeout(seconds) as limit:
            return await work
    except TimeoutError:
        if seconds is None or not limit.expired():
            raise
        raise DeadlineExceeded(
            f"{late} after {seconds:.3g} s, its share of the request's deadline; allow it more time"
        ) from None
