"""Whether a failed request is sent again, and when. Pure: what is drawn at random is passed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_SPREAD = 0.1


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most `attempts` in all; between them up to `first_backoff_s`, doubled each time up to `max_backoff_s`.

    A provider that says how long to wait is obeyed up to `max_retry_after_s`, or up to `first_backoff_s` where another
    backend follows; who asks for more is not asked again.
    """

    attempts: int = 3
    first_backoff_s: float = 0.5
    max_backoff_s: float = 8.0
    max_retry_after_s: float = 30.0

    def wait_s(
        self,
        made: int,
        draw: Callable[[], float],
        *,
        retry_after_s: float | None = None,
        left_s: float | None = None,
        elsewhere: bool = False,
        another_follows: bool = False,
    ) -> float | None:
        """Seconds to wait after `made` attempts, or None to give up.

        `draw` gives a number in [0, 1). `left_s` is what is left of the request's deadline: what could not be sent
        within it is given up at once. `elsewhere` says that nothing was sent yet and another address can be asked.
        The wait is drawn from the whole range (full jitter), so that who failed together does not return together.
        Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        """
        if made >= self.attempts:
            return None
        if retry_after_s is not None:
            if retry_after_s > (self.first_backoff_s if another_follows else self.max_retry_after_s):
                return None
            wait_s = retry_after_s * (1.0 + _SPREAD * draw())
        elif elsewhere:
            wait_s = 0.0
        else:
            wait_s = draw() * min(self.max_backoff_s, self.first_backoff_s * 2.0 ** min(made - 1, 30))
        return None if left_s is not None and wait_s >= left_s else wait_s
