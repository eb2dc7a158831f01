"""What is left of a request's deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.engines.errors import DeadlineExceeded


def sooner(one: float | None, other: float | None) -> float | None:
    """The less of two times, None being for ever."""
    return min((time for time in (one, other) if time is not None), default=None)


def left_s(
    until: float | None, clock: Callable[[], float] = time.monotonic, *, before: str = "it was answered"
) -> float | None:
    """Seconds until then by `clock`, None for ever.

    Raises DeadlineExceeded where there are none, which says `before` what the deadline passed.
    """
    if until is None:
        return None
    seconds = until - clock()
    if seconds <= 0.0:
        raise DeadlineExceeded(f"the request's deadline passed before {before}; allow it more time")
    return seconds
