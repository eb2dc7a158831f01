from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engines.base import Usage
from service.routing.model_names import fine_tuned_base, stands_for
from service.routing.prices import cost, find_price

FINE_TUNED = "ft:gpt-4o-mini-2024-07-18:acme::x"


@dataclass(frozen=True)
class Priced:
    input: float
    output: float
    cached_input: float | None = None


MINI = Priced(0.15, 0.6, 0.075)
TUNED = Priced(0.3, 1.2, 0.15)
LARGE = Priced(2.5, 10.0)


def test_each_kind_of_token_has_its_price() -> None:
    usage = Usage(prompt_tokens=1_000_000, completion_tokens=500_000, cached_prompt_tokens=400_000)
    assert cost({"mini": MINI}, "mini", usage) == pytest.approx(0.6 * 0.15 + 0.4 * 0.075 + 0.5 * 0.6)


def test_cached_tokens_without_a_price_of_their_own_cost_as_others() -> None:
    cached, fresh = Usage(1000, 10, cached_prompt_tokens=900), Usage(1000, 10)
    assert cost({"large": LARGE}, "large", cached) == pytest.approx(cost({"large": LARGE}, "large", fresh))


def test_virtual_tokens_cost_nothing() -> None:
    assert cost({"mini": MINI}, "mini", Usage(10, 1, virtual_tokens=999)) == cost({"mini": MINI}, "mini", Usage(10, 1))


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7))
def test_no_usage_that_a_provider_claims_costs_less_than_nothing(prompt: int, completion: int, cached: int) -> None:
    assert cost({"mini": MINI}, "mini", Usage(prompt, completion, cached_prompt_tokens=cached)) >= 0.0


def test_a_fine_tuned_id_is_priced_by_its_own_family_and_never_as_its_base() -> None:
    assert find_price({"ft:gpt-4o-mini-2024-07-18": TUNED, "default": LARGE}, FINE_TUNED) is TUNED
    assert find_price({"ft:gpt-4o-mini": TUNED}, FINE_TUNED) is TUNED
    assert find_price({"gpt-4o-mini-2024-07-18": MINI, "default": LARGE}, FINE_TUNED) is LARGE
    assert find_price({"ft:gpt-4o": LARGE}, FINE_TUNED) is None


def test_the_longest_entry_wins_and_an_exact_one_over_all() -> None:
    prices = {"ft:gpt-4o-mini": LARGE, "ft:gpt-4o-mini-2024-07-18:acme": TUNED, "ft:gpt-4o-mini-2024-07-18": MINI}
    assert find_price(prices, FINE_TUNED) is TUNED
    assert find_price({**prices, FINE_TUNED: LARGE}, FINE_TUNED) is LARGE


def test_a_snapshot_is_priced_as_its_family() -> None:
    assert find_price({"gpt-4o": LARGE, "gpt-4o-mini": MINI}, "gpt-4o-2024-08-06") is LARGE
    assert find_price({"gpt-4o": LARGE, "gpt-4o-mini": MINI}, "gpt-4o-mini-2024-07-18") is MINI
    assert find_price({"gpt-4o": LARGE}, "gpt-4o-mini") is None


def test_a_model_without_a_price_costs_what_default_says_or_nothing() -> None:
    assert cost({"default": LARGE}, "another", Usage(1_000_000, 0)) == pytest.approx(2.5)
    assert cost({"mini": MINI}, "another", Usage(1_000_000, 1_000_000)) == 0.0
    assert cost({}, "another", Usage(1_000_000, 1_000_000)) == 0.0


@pytest.mark.parametrize(
    ("entry", "model", "fits"),
    [
        ("gpt-4", "gpt-4", True),
        ("gpt-4", "gpt-4-0613", True),
        ("gpt-4", "gpt-4-32k", False),
        ("gpt-4", "gpt-4.1", False),
        ("gpt-4", "gpt-4-turbo-2024-04-09", False),
        ("mistral-small", "mistral-small-2506", True),
        ("llama-3", "llama-3-70b", False),
        ("acme/llama", "acme/llama@v2", True),
        ("accounts/acme", "accounts/acme/models/support", True),
        ("", "anything", False),
    ],
)
def test_which_models_an_entry_stands_for(entry: str, model: str, fits: bool) -> None:
    assert stands_for(entry, model) is fits


def test_the_base_inside_a_fine_tuned_id() -> None:
    assert fine_tuned_base(FINE_TUNED) == "gpt-4o-mini-2024-07-18"
    assert fine_tuned_base("ft:gpt-4o-mini-2024-07-18") == "gpt-4o-mini-2024-07-18"
    assert fine_tuned_base("gpt-4o-mini-2024-07-18") is None
    assert fine_tuned_base("ft:") is None
