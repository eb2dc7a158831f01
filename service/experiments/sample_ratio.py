"""Whether units came to the arms as often as the logged probabilities say: a sample-ratio mismatch means a fault."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prompt_store.ledger.sums import AllocationCount
from service.experiments.figures import SampleRatio

_CONCENTRATION = 1000.0
"""Pseudo-units of the Dirichlet prior: of two equal arms' shares its deviation is 1.6 points, as real faults are."""

_TILTS = tuple(sign * 2.0 ** (-power / 2.0) for power in range(17) for sign in (1.0, -1.0))
"""By how much an arm's log-odds may be off: from 1/256, that is 0.1 points of an equal share, to 1."""

_LARGEST = 700.0  # a float holds e to this


def sample_ratio(counts: Sequence[AllocationCount], *, alpha: float = 0.001) -> SampleRatio:
    """The sequential multinomial test against the probabilities of each allocation.

    The e-value is the mean of two, each a martingale of mean 1 in whatever order units arrive as long as the logged
    probabilities hold; an allocation may follow from all that came before it, as Thompson sampling's do. The first is
    the product over allocations of Dirichlet-multinomial Bayes factors (`_dirichlet`): any mismatch, each allocation by
    itself. The second has one arm whose odds are off by the same factor in all allocations (`_tilted`): an arm that
    loses units is found though Thompson sampling makes a short allocation an hour.
    By Ville's inequality e reaches 1 / alpha at any time with probability alpha at most, so `mismatch` is valid at
    every look. p is 1 / e now; the least p so far would be as valid, but none is kept, so a mismatch may pass again.
    Source: Lindon and Malek 2022, Anytime-valid inference for multinomial count data, arXiv:2011.03567, for the first
    under one allocation; the product, the second and the mean are ours, and martingales for the same reason.
    """
    expected: dict[str, float] = {}
    observed: dict[str, int] = {}
    for count in counts:
        units = sum(count.units.values())
        whole = math.fsum(count.weights.values())
        for arm in (*count.weights, *(other for other in count.units if other not in count.weights)):
            expected[arm] = expected.get(arm, 0.0) + units * count.weights.get(arm, 0.0) / whole
            observed[arm] = observed.get(arm, 0) + count.units.get(arm, 0)
    logarithm = _log_mean([math.fsum(_dirichlet(count) for count in counts), _tilted(counts, tuple(expected))])
    e_value = math.exp(min(logarithm, _LARGEST))
    p_value = min(1.0, 1.0 / e_value) if e_value else 1.0
    return SampleRatio(e_value, p_value, alpha, p_value < alpha, expected, observed)


def _dirichlet(count: AllocationCount) -> float:
    """The logarithm of one allocation's Bayes factor, of shares drawn from Dirichlet(c p) against shares p.

    lgamma(c) - lgamma(c + n) + sum over arms of lgamma(c p_i + n_i) - lgamma(c p_i) - n_i log p_i.
    """
    whole = math.fsum(count.weights.values())
    logarithm = math.lgamma(_CONCENTRATION) - math.lgamma(_CONCENTRATION + sum(count.units.values()))
    for arm, units in count.units.items():
        share = count.weights.get(arm, 0.0) / whole
        if share > 0.0:
            prior = _CONCENTRATION * share
            logarithm += math.lgamma(prior + units) - math.lgamma(prior) - units * math.log(share)
        elif units:
            return math.inf  # an arm that can have none
    return logarithm


def _tilted(counts: Sequence[AllocationCount], arms: Sequence[str]) -> float:
    """The logarithm of the mean, over arms and tilts t, of the likelihood ratio of that arm's odds being exp(t) off.

    Of an allocation where the arm has the share p and n_i of n units: n_i t - n log(1 - p + p exp(t)).
    """
    sizes = [(sum(count.units.values()), math.fsum(count.weights.values())) for count in counts]
    ratios = []
    for arm in arms:
        told = [
            (count.units.get(arm, 0), units, count.weights.get(arm, 0.0) / whole)
            for count, (units, whole) in zip(counts, sizes, strict=True)
        ]
        for tilt in _TILTS:
            odds = math.expm1(tilt)
            ratios.append(math.fsum(own * tilt - units * math.log1p(share * odds) for own, units, share in told))
    return _log_mean(ratios)


def _log_mean(logarithms: Sequence[float]) -> float:
    """The logarithm of the mean of what these are logarithms of; 0 of none."""
    if not logarithms:
        return 0.0
    greatest = max(logarithms)
    if math.isinf(greatest):
        return greatest
    return greatest + math.log(math.fsum(math.exp(each - greatest) for each in logarithms) / len(logarithms))
