from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engines.local.pacing import Pacer


def learned(decode_s: float, token_s: float, *, most: int = 512, decoding: int = 8) -> Pacer:
    """A pacer that has seen one step of each kind."""
    pacer = Pacer(most, stretch=2.0)
    pacer.learn(decoding, 0, decode_s)
    pacer.learn(0, 100, 100 * token_s)
    return pacer


def test_a_pacer_that_knows_nothing_or_has_no_streams_to_protect_allows_everything() -> None:
    assert Pacer(512).prefill_tokens(8) == 512
    assert learned(0.010, 0.001).prefill_tokens(0) == 512


def test_prefill_takes_at_most_as_long_as_the_decoding_beside_it() -> None:
    assert learned(0.100, 0.001).prefill_tokens(8) == 100
    assert learned(0.100, 0.0001).prefill_tokens(8) == 512


def test_however_dear_prefill_is_some_of_it_goes_on() -> None:
    assert learned(0.001, 1.0).prefill_tokens(8) == 16
    assert learned(0.001, 1.0, most=4).prefill_tokens(8) == 4


def test_a_mixed_step_teaches_what_its_prefill_cost_beyond_decoding() -> None:
    pacer = Pacer(512, stretch=2.0)
    pacer.learn(8, 0, 0.100)
    pacer.learn(8, 50, 0.150)
    assert pacer.prefill_tokens(8) == pytest.approx(100, abs=1)
    pacer.learn(8, 50, 0.050)  # quicker than decoding alone: this says nothing of prefill
    assert pacer.prefill_tokens(8) == pytest.approx(100, abs=1)


def test_one_slow_step_is_forgotten() -> None:
    pacer = learned(0.100, 0.001)
    pacer.learn(8, 0, 2.0)
    assert pacer.prefill_tokens(8) > 400
    for _ in range(30):
        pacer.learn(8, 0, 0.100)
    assert pacer.prefill_tokens(8) == pytest.approx(100, abs=5)


@given(
    st.integers(1, 4096),
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 512), st.floats(0.0, 10.0)), max_size=20),
    st.integers(0, 64),
)
def test_what_is_allowed_is_at_least_one_token_and_at_most_the_budget(
    most: int, steps: list[tuple[int, int, float]], decoding: int
) -> None:
    pacer = Pacer(most, stretch=2.0)
    for streams, prefilled, seconds in steps:
        pacer.learn(streams, prefilled, seconds)
    assert 1 <= pacer.prefill_tokens(decoding) <= most
