"""A circuit breaker: a backend that fails so often is left alone for a while, and logged. Time is passed in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from service.engines.errors import CircuitOpen

log = logging.getLogger(__name__)

BreakerState = Literal["closed", "open", "half_open"]
_BUCKETS = 10


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """Opens where of at least `min_calls` in `window_s` the share `failure_share` failed, or `consecutive` in a row.

    After `open_s` one call at a time is let through as a probe, and its success closes the breaker.
    """

    window_s: float = 30.0
    min_calls: int = 20
    failure_share: float = 0.5
    consecutive: int = 10
    open_s: float = 10.0


class Breaker:
    """Each admitted call ends in exactly one of `succeeded`, `failed` and `abandoned`, with the ticket it was given.

    A ticket is the number of the state that the call began in, so what ends after a change of state is not counted.
    A stream that breaks after it had succeeded may be reported by `failed` once more.
    """

    def __init__(self, name: str, limits: BreakerLimits, clock: Callable[[], float]) -> None:
        self._name = name
        self._limits = limits
        self._clock = clock
        self._window = _Window(limits.window_s)
        self._in_a_row = 0
        self._opened_at = 0.0
        self._generation = 0
        self._state: BreakerState = "closed"
        self._probing = False

    @property
    def state(self) -> BreakerState:
        """`half_open` as soon as a probe would be let through."""
        return "half_open" if self._state == "open" and self._opens_in() <= 0.0 else self._state

    @property
    def admits(self) -> bool:
        """Whether `admit` would let a call through now."""
        return self._state == "closed" or (self.state == "half_open" and not self._probing)

    def admit(self) -> int:
        """A ticket for one call. Raises CircuitOpen."""
        if self._state == "closed":
            return self._generation
        if self._state == "open":
            if (left_s := self._opens_in()) > 0.0:
                raise CircuitOpen(
                    f"{self._name} failed so often that it is left alone for {left_s:.1f} s; try again then, or give "
                    "the route a fallback",
                    retry_after_s=left_s,
                )
            self._become("half_open")
        if self._probing:
            raise CircuitOpen(
                f"{self._name} failed often and one request is finding out whether it answers again; try again in a "
                "second, or give the route a fallback",
                retry_after_s=1.0,
            )
        self._probing = True
        return self._generation

    def succeeded(self, ticket: int) -> None:
        """The backend answered, be it with a refusal of this request."""
        if ticket != self._generation:
            return
        if self._state == "half_open":
            log.warning("%s answers again", self._name)
            self._become("closed")
            return
        self._in_a_row = 0
        self._window.add(self._clock(), failed=False)

    def failed(self, ticket: int) -> None:
        """The backend is to blame for a failure."""
        if ticket != self._generation:
            return
        now = self._clock()
        self._in_a_row += 1
        calls, failures = self._window.add(now, failed=True)
        share = failures / calls
        sick = calls >= self._limits.min_calls and share >= self._limits.failure_share
        if self._state == "half_open" or sick or self._in_a_row >= self._limits.consecutive:
            if self._state == "closed":
                log.warning(
                    "%s failed so often that it is left alone for %g s at a time until it answers again",
                    self._name, self._limits.open_s,
                )  # fmt: skip
            self._opened_at = now
            self._become("open")

    def abandoned(self, ticket: int) -> None:
        """The call ended and tells nothing about the backend: it was cancelled, say."""
        if ticket == self._generation:
            self._probing = False

    def _opens_in(self) -> float:
        return self._opened_at + self._limits.open_s - self._clock()

    def _become(self, state: BreakerState) -> None:
        self._state = state
        self._generation += 1
        self._probing = False
        self._in_a_row = 0
        self._window = _Window(self._limits.window_s)


class _Window:
    """Calls and failures of the last `length_s`, in slices of a tenth."""

    def __init__(self, length_s: float) -> None:
        self._slice_s = length_s / _BUCKETS
        self._calls = [0] * _BUCKETS
        self._failures = [0] * _BUCKETS
        self._newest = 0

    def add(self, now: float, *, failed: bool) -> tuple[int, int]:
        """Count a call; returns how many calls and failures the window holds."""
        newest = int(now / self._slice_s)
        for passed in range(max(self._newest + 1, newest - _BUCKETS + 1), newest + 1):
            self._calls[passed % _BUCKETS] = self._failures[passed % _BUCKETS] = 0
        self._newest = max(self._newest, newest)
        self._calls[self._newest % _BUCKETS] += 1
        self._failures[self._newest % _BUCKETS] += failed
        return sum(self._calls), sum(self._failures)
