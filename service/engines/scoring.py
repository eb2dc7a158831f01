"""From the log-probabilities of a task's labels to a probability for each. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from service.engines.base import Scores
from service.engines.errors import UnsupportedFeature

Normalise = Literal["none", "length"]
CONTENT_FREE = "N/A"


def label_log_probabilities(scores: Scores, normalise: Normalise = "none", prior: Scores | None = None) -> list[float]:
    """The natural logarithm of each label's probability among the labels.

    `none` takes a label's log-probability as the model gives it, the end-of-sequence token included, so that a label
    which begins another does not win by being shorter. `length` divides it by its number of tokens: a label of many
    tokens then does not lose for that alone.
    With a `prior`, the scores of a content-free input, each probability is divided by the prior's and what remains is
    scaled to sum to 1: contextual calibration, Zhao et al. 2021, arXiv 2102.09690 (its W = diag(p_cf)^-1, b = 0).
    Raises UnsupportedFeature for `length` where the engine did not count tokens.
    """
    values = _normalised(scores, normalise)
    if prior is not None:
        values = [value - free for value, free in zip(values, _normalised(prior, normalise), strict=True)]
    return log_softmax(values)


def log_softmax(values: Sequence[float]) -> list[float]:
    """Log-probabilities that sum to 1 as probabilities, from values that are off by a constant."""
    highest = max(values)
    if highest == -math.inf:
        return [-math.log(len(values))] * len(values)
    total = highest + math.log(math.fsum(math.exp(value - highest) for value in values))
    return [value - total for value in values]


def _normalised(scores: Scores, normalise: Normalise) -> list[float]:
    if normalise == "none":
        return log_softmax(scores.log_probabilities)
    if not scores.lengths:
        raise UnsupportedFeature(
            "normalise 'length' is not served by this task's backend, which does not count the labels' tokens; "
            "use 'none'",
            parameter="normalise",
        )
    means = [value / length for value, length in zip(scores.log_probabilities, scores.lengths, strict=True)]
    return log_softmax(means)
