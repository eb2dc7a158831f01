"""Several addresses that serve the same: which one a request goes to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from yarl import URL

from service.engines.errors import EngineUnavailable
from service.engines.remote.breaker import Breaker, BreakerLimits, BreakerState

_CLEARLY_MORE = 4
"""By so many requests the affine address may be ahead of the least loaded one; beyond, warmth is not worth the wait."""
_KNOWN_TARGETS = 1024
"""Parsed URLs that are kept. A path may name the model (Azure's do), and so whatever a client asks for."""


@dataclass(slots=True)
class Replica:
    """One address. `running` counts what is in flight; nothing new goes to it before `down_until`, nor if `drained`."""

    url: str
    breaker: Breaker
    running: int = 0
    down_until: float = 0.0
    drained: bool = False

    def target(self, path: str) -> URL:
        """Where `path` is, which begins with a slash."""
        return _target(self.url, path)

    def health(self, path: str) -> URL:
        return URL(self.url).with_path(path)


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """How one address fares: whether requests may go there now, and how many are in flight."""

    url: str
    healthy: bool
    drained: bool
    running: int


class Replicas:
    """The addresses of one backend."""

    def __init__(self, urls: tuple[str, ...], breaker: BreakerLimits, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.all = tuple(Replica(url, Breaker(f"the provider at {URL(url).authority}", breaker, clock)) for url in urls)
        self._only = self.all[0] if len(self.all) == 1 else None

    def choose(self, affinity: str = "", avoid: Replica | None = None) -> Replica:
        """The address for a request: the first by its affinity, unless that has clearly more to do than the idlest.

        One that fails is chosen only where all do. `avoid` is left out where there is another. Raises EngineUnavailable
        where all are drained.
        """
        if self._only is not None and not self._only.drained:
            return self._only
        now = self._clock()
        open_ones = [replica for replica in self.all if not replica.drained]
        if not open_ones:
            raise EngineUnavailable("every address of the backend is drained; undrain one, or send requests elsewhere")
        well = [replica for replica in open_ones if replica.down_until <= now and replica.breaker.admits]
        candidates = [replica for replica in well if replica is not avoid] or well or open_ones
        least = min(candidates, key=_running)
        if affinity:
            first = max(candidates, key=lambda replica: _rank(affinity, replica.url))
            if first.running <= least.running + _CLEARLY_MORE:
                return first
        return least

    def another(self, than: Replica) -> bool:
        """Whether a request that failed at one address can go to another."""
        return self._only is None and self.choose(avoid=than) is not than

    @property
    def admits(self) -> bool:
        """Whether any address would take a request now, be it one that fails."""
        return any(not replica.drained and replica.breaker.admits for replica in self.all)

    def mark(self, replica: Replica, *, down_for_s: float) -> None:
        """Send nothing to an address for a while; 0 brings it back at once."""
        replica.down_until = self._clock() + down_for_s if down_for_s else 0.0

    def drain(self, url: str) -> None:
        """Send nothing new to an address; what runs there ends by itself. Raises KeyError for one that is not there."""
        self._named(url).drained = True

    def undrain(self, url: str) -> None:
        """Raises KeyError."""
        self._named(url).drained = False

    def states(self) -> tuple[ReplicaState, ...]:
        """Every address, in the order of the options."""
        now = self._clock()
        return tuple(ReplicaState(one.url, _takes(one, now), one.drained, one.running) for one in self.all)

    def healthy(self) -> int:
        """How many addresses take requests."""
        now = self._clock()
        return sum(_takes(one, now) for one in self.all)

    def breaker_state(self) -> BreakerState:
        """The best state of any address's breaker."""
        states = {replica.breaker.state for replica in self.all}
        return next(state for state in ("closed", "half_open", "open") if state in states)

    def _named(self, url: str) -> Replica:
        for replica in self.all:
            if replica.url == url:
                return replica
        raise KeyError(url)


@lru_cache(_KNOWN_TARGETS)
def _target(url: str, path: str) -> URL:
    return URL(url.rstrip("/") + path)


def _takes(replica: Replica, now: float) -> bool:
    return not replica.drained and replica.down_until <= now and replica.breaker.admits


def _running(replica: Replica) -> int:
    return replica.running


def _rank(affinity: str, url: str) -> bytes:
    """Rendezvous hashing: where an address comes or goes, only what was first there moves.

    Source: Thaler and Ravishankar 1998, doi:10.1109/90.663936.
    """
    return hashlib.blake2b(f"{affinity}\0{url}".encode(), digest_size=8).digest()
