"""A backend that fails is left alone, and found well again."""

from __future__ import annotations

import pytest

from service.engines.errors import CircuitOpen
from service.engines.remote.breaker import Breaker, BreakerLimits

LIMITS = BreakerLimits(window_s=10.0, min_calls=10, failure_share=0.5, consecutive=5, open_s=3.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker("the provider", LIMITS, clock)


def play(breaker: Breaker, outcomes: str) -> None:
    """`.` a call that succeeds, `x` one that fails, `-` one that is abandoned."""
    for outcome in outcomes:
        ticket = breaker.admit()
        {".": breaker.succeeded, "x": breaker.failed, "-": breaker.abandoned}[outcome](ticket)


def test_failures_in_a_row_open_it_and_it_says_for_how_long(breaker: Breaker, clock: Clock) -> None:
    play(breaker, "xxxxx")
    clock.now += 1.0
    with pytest.raises(CircuitOpen, match=r"the provider .* 2\.0 s") as caught:
        breaker.admit()
    assert caught.value.retry_after_s == pytest.approx(2.0)
    assert breaker.state == "open"
    assert not breaker.admits


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [("xxxx.xxxx", "closed"), ("xxxx.xxxx.", "closed"), ("xxxx.xxxx.x", "open"), (".x.x.x.x.x", "open")],
)
def test_a_share_of_failures_opens_it_from_a_minimum_of_calls_on(breaker: Breaker, outcomes: str, state: str) -> None:
    play(breaker, outcomes)
    assert breaker.state == state


def test_less_than_the_share_leaves_it_closed(breaker: Breaker) -> None:
    play(breaker, ".x..x" * 100)
    assert breaker.state == "closed"


def test_what_left_the_window_is_forgotten(breaker: Breaker, clock: Clock) -> None:
    play(breaker, ".xx.xx.xx")
    clock.now += 11.0
    play(breaker, ".xx.xx.xx")
    assert breaker.state == "closed"
    play(breaker, "x")
    assert breaker.state == "open"


def test_abandoned_calls_count_for_nothing(breaker: Breaker) -> None:
    play(breaker, "xx-x-x")
    assert breaker.state == "closed"
    play(breaker, "-x")
    assert breaker.state == "open"


def opened(breaker: Breaker, clock: Clock) -> None:
    play(breaker, "xxxxx")
    clock.now += 3.0
    assert breaker.state == "half_open"


def test_one_probe_at_a_time_is_let_through(breaker: Breaker, clock: Clock) -> None:
    opened(breaker, clock)
    assert breaker.admits
    breaker.admit()
    assert not breaker.admits
    with pytest.raises(CircuitOpen, match="finding out"):
        breaker.admit()


def test_a_probe_that_succeeds_closes_it_and_clears_what_was(breaker: Breaker, clock: Clock) -> None:
    opened(breaker, clock)
    play(breaker, ".xxxx")
    assert breaker.state == "closed"


def test_a_probe_that_fails_opens_it_for_as_long_again(breaker: Breaker, clock: Clock) -> None:
    opened(breaker, clock)
    play(breaker, "x")
    assert breaker.state == "open"
    clock.now += 2.9
    assert not breaker.admits
    clock.now += 0.1
    assert breaker.admits


def test_the_log_says_once_that_it_opened_and_once_that_it_closed(
    breaker: Breaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    opened(breaker, clock)
    play(breaker, "x")
    clock.now += 3.0
    play(breaker, ".xx..")
    assert [record.getMessage() for record in caplog.records] == [
        "the provider failed so often that it is left alone for 3 s at a time until it answers again",
        "the provider answers again",
    ]


def test_a_probe_that_is_abandoned_frees_its_place(breaker: Breaker, clock: Clock) -> None:
    opened(breaker, clock)
    play(breaker, "--.")
    assert breaker.state == "closed"


def test_calls_from_before_it_opened_are_not_counted_after(breaker: Breaker, clock: Clock) -> None:
    early, late, gone = breaker.admit(), breaker.admit(), breaker.admit()
    opened(breaker, clock)
    probe = breaker.admit()
    breaker.succeeded(early)
    breaker.failed(late)
    breaker.abandoned(gone)
    assert breaker.state == "half_open"
    assert not breaker.admits
    breaker.succeeded(probe)
    assert breaker.state == "closed"
