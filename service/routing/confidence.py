"""How sure an answer is of itself, by the measure that a route names. Pure.

A cascade keeps its first answer where the confidence reaches a calibrated threshold. None means that it cannot be
known, and such an answer is never kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prompt_store.routing.routes import check_measure
from service.engines.collecting import Answer

_QUANTILE = "quantile_logprob"


def needs_logprobs(measure: str) -> bool:
    """Whether a generated answer must bring its tokens' log-probabilities for this measure."""
    return measure == "mean_logprob" or measure.startswith(_QUANTILE)


def confidence(measure: str, answer: Answer) -> float | None:
    """The confidence of a generated answer; None without log-probabilities, of a refusal, or of a margin.

    Over the natural log-probabilities l_1..l_T of the answer's own tokens:
    `mean_logprob` is (l_1 + ... + l_T) / T, which does not fall with the answer's length as their sum does;
    `quantile_logprob:Q` is their Q-quantile: with the l sorted and h = Q (T - 1), it is l[floor h] plus the fraction of
    h times the step to the next. A low Q looks at the least certain tokens, which a mean over many certain ones hides.
    Source: Gupta et al. 2024, arXiv 2404.10136 (Chow-Average and Chow-Quantile).
    `agreement` is the share of an ensemble's members that gave this answer. A margin is between labels: see
    `label_confidence`. Raises ValueError for what is no measure.
    """
    check_measure(measure)
    if answer.refusal:
        return None
    if measure == "agreement":
        return answer.agreement
    logprobs = [token.logprob for token in answer.logprobs]
    if not logprobs or not needs_logprobs(measure):
        return None
    if measure == "mean_logprob":
        return _known(math.fsum(logprobs) / len(logprobs))
    return _known(_quantile(sorted(logprobs), float(measure.partition(":")[2])))


def label_confidence(measure: str, probabilities: Sequence[float], agreement: float | None = None) -> float | None:
    """The confidence of a chosen label, from the labels' probabilities, the highest first.

    `margin` is the highest minus the second: Ramírez et al. 2024, arXiv 2405.02134, who take it between the two most
    probable tokens. `mean_logprob` is the natural logarithm of the highest: Chow's rule, the label being one event;
    Jitkrittum et al. 2023, arXiv 2307.02764, say when that suffices and when not. `agreement` as in `confidence`.
    None for a quantile, because a label has no tokens here, and where a backend told its choice alone: give no
    probabilities then. Raises ValueError for what is no measure.
    """
    check_measure(measure)
    if measure == "agreement":
        return agreement
    if len(probabilities) < 2:
        return None
    if measure == "margin":
        return _known(probabilities[0] - probabilities[1])
    if measure == "mean_logprob" and probabilities[0] > 0.0:
        return _known(math.log(probabilities[0]))
    return None


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _known(value: float) -> float | None:
    """A provider may send what is no number, or minus infinity; nothing can be said of such an answer."""
    return value if math.isfinite(value) else None
