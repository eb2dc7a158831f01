"""What an answer cost, by a backend's table of prices. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from service.engines.base import Usage
from service.routing.model_names import stands_for

_OTHERWISE = "default"
_TOKENS_PRICED = 1_000_000


class Price(Protocol):
    """What a million tokens cost, in the currency of whoever wrote the table. Without a price of their own, cached
    tokens of the prompt cost as much as others."""

    @property
    def input(self) -> float: ...

    @property
    def cached_input(self) -> float | None: ...

    @property
    def output(self) -> float: ...


def cost(prices: Mapping[str, Price], model: str, usage: Usage) -> float:
    """The cost of `usage` at the price of `model`: by the longest entry that stands for it, else by `default`, else 0.

    A fine-tuned id is never charged as its base: `ft:gpt-4o-mini-2024-07-18` has a price of its own.
    """
    price = find_price(prices, model)
    if price is None:
        return 0.0
    cached = min(usage.cached_prompt_tokens, usage.prompt_tokens)
    cached_input = price.input if price.cached_input is None else price.cached_input
    whole = (
        (usage.prompt_tokens - cached) * price.input + cached * cached_input + usage.completion_tokens * price.output
    )
    return whole / _TOKENS_PRICED


def find_price(prices: Mapping[str, Price], model: str) -> Price | None:
    """The price that `cost` goes by, None where there is none."""
    if model in prices:
        return prices[model]
    entry = max((entry for entry in prices if stands_for(entry, model)), key=len, default=_OTHERWISE)
    return prices.get(entry)
