"""What a request adds to or takes from single tokens' logits: bias, and penalties by what was said already.

On numpy, and without a view on the vocabulary: a row costs what it holds distinct tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from service.engines.local.messages import Choosing


class Penalties:
    """One row's bias and penalties.

    First `logit_bias` is added. Then the repetition penalty divides the positive logits of tokens that stand in the
    prompt or in the answer and multiplies their negative ones. Last, tokens of the answer lose
    `frequency_penalty` for each time they stand there and `presence_penalty` once.
    Source: vLLM's order and, for the last two, OpenAI's formula; repetition as in Keskar et al. 2019, arXiv:1909.05858.
    """

    def __init__(self, choosing: Choosing, prompt_token_ids: Iterable[int]) -> None:
        self._biased = np.array(list(choosing.logit_bias), np.int64)
        self._bias = np.array(list(choosing.logit_bias.values()), np.float32)
        self._repetition = choosing.repetition_penalty
        self._frequency = choosing.frequency_penalty
        self._presence = choosing.presence_penalty
        # Distinct tokens in the order in which they came, and how often each stands in the answer.
        seen = dict.fromkeys(prompt_token_ids) if self._repetition != 1.0 else {}
        self._places = {token: place for place, token in enumerate(seen)}
        self._tokens = np.zeros(max(64, 2 * len(seen)), np.int64)
        self._tokens[: len(seen)] = list(seen)
        self._counts = np.zeros(len(self._tokens), np.float32)

    @staticmethod
    def needed(choosing: Choosing) -> bool:
        """Whether a request asks for any of this."""
        return (
            bool(choosing.logit_bias)
            or choosing.repetition_penalty != 1.0
            or choosing.frequency_penalty != 0.0
            or choosing.presence_penalty != 0.0
        )

    def take(self, token: int) -> None:
        """Count a token of the answer."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1.0

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Change float32 [V] in place."""
        logits[self._biased] += self._bias
        tokens, counts = self._tokens[: len(self._places)], self._counts[: len(self._places)]
        values = logits[tokens]
        if self._repetition != 1.0:
            values = np.where(values > 0.0, values / self._repetition, values * self._repetition)
        values -= self._frequency * counts + self._presence * (counts > 0.0)
        logits[tokens] = values
