"""When a failed request is sent again."""

from __future__ import annotations

import pytest

from service.engines.remote.retrying import RetryPolicy

POLICY = RetryPolicy(attempts=4, first_backoff_s=0.5, max_backoff_s=1.5, max_retry_after_s=30.0)


def highest() -> float:
    return 1.0


def test_the_backoff_doubles_up_to_its_bound() -> None:
    assert [POLICY.wait_s(made, highest) for made in (1, 2, 3)] == [0.5, 1.0, 1.5]


def test_the_wait_is_drawn_from_the_whole_range() -> None:
    assert [POLICY.wait_s(2, lambda share=share: share) for share in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]


def test_no_attempt_is_made_beyond_the_last() -> None:
    assert POLICY.wait_s(4, highest) is None
    assert RetryPolicy(attempts=1).wait_s(1, highest) is None


def test_a_thousand_attempts_do_not_overflow() -> None:
    assert RetryPolicy(attempts=10**6).wait_s(10**5, highest) == 8.0


def test_a_provider_that_says_how_long_is_waited_for_and_not_less() -> None:
    assert POLICY.wait_s(1, lambda: 0.0, retry_after_s=20.0) == 20.0
    assert POLICY.wait_s(1, highest, retry_after_s=20.0) == pytest.approx(22.0)


def test_a_provider_that_wants_longer_than_the_cap_is_not_asked_again() -> None:
    assert POLICY.wait_s(1, highest, retry_after_s=31.0) is None


@pytest.mark.parametrize("left_s", [0.2, 0.5, 0.0, -1.0])
def test_what_would_wait_past_its_deadline_is_given_up_at_once(left_s: float) -> None:
    assert POLICY.wait_s(1, highest, left_s=left_s) is None
    assert POLICY.wait_s(1, lambda: 0.0, retry_after_s=5.0, left_s=left_s) is None


def test_what_was_not_sent_goes_elsewhere_at_once() -> None:
    assert POLICY.wait_s(1, highest, elsewhere=True) == 0.0
    assert POLICY.wait_s(4, highest, elsewhere=True) is None
