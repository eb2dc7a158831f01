"""How probable it is that each arm is the best, and the weights that Thompson sampling takes from that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from service.experiments.figures import Direction

_STEPS = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0)  # standard deviations between which pieces end
_NODES, _NODE_WEIGHTS = (each.tolist() for each in np.polynomial.legendre.leggauss(8))


def probabilities_of_best(means: Mapping[str, NormalDist], direction: Direction) -> dict[str, float]:
    """By arm, the probability that its mean is the greatest (minimise: the least); they sum to 1.

    `means` are independent posteriors: of an estimate m with the variance v under a flat prior it is Normal(m, v).
    P(i is best) = integral of f_i(t) * product over j != i of F_j(t). Two arms: Phi((m1 - m2) / sqrt(v1 + v2)). More:
    Gauss-Legendre quadrature of eight nodes on pieces no longer than two standard deviations of any arm whose density
    is not negligible there; good to 1e-8.
    Source: Scott 2010, A modern Bayesian look at the multi-armed bandit.
    """
    sign = 1.0 if direction == "maximise" else -1.0
    arms = {arm: each * sign for arm, each in means.items()}
    if len(arms) == 2:
        (first, one), (second, other) = arms.items()
        difference = one - other
        return {first: difference.cdf(2.0 * difference.mean), second: difference.cdf(0.0)}
    ends = sorted(each.mean + step * each.stdev for each in arms.values() for step in _STEPS)
    mass = dict.fromkeys(arms, 0.0)
    for start, end in pairwise(ends):
        half = (end - start) / 2.0
        for node, weight in zip(_NODES, _NODE_WEIGHTS, strict=True):
            at = start + half * (1.0 + node)
            below = {arm: each.cdf(at) for arm, each in arms.items()}
            for arm, each in arms.items():
                others = math.prod(chance for other_arm, chance in below.items() if other_arm != arm)
                mass[arm] += half * weight * each.pdf(at) * others
    whole = math.fsum(mass.values())
    return {arm: each / whole for arm, each in mass.items()}


def with_floor(best: Mapping[str, float], floor: float) -> dict[str, float]:
    """Weights in proportion to the probabilities of being best, none under `floor`; they sum to 1.

    Arms that would come under the floor have just that; the others share what is left. An arm that is never the best
    is still asked, so that its estimate can recover and no probability by which analysis divides is tiny.
    Raises ValueError where the floors alone are more than 1.
    Source: Thompson 1933; for floors, Hadad et al. 2021, Confidence intervals for policy evaluation in adaptive
    experiments (doi 10.1073/pnas.2014602118).
    """
    if floor * len(best) > 1.0 + 1e-9:
        raise ValueError(f"a floor of {floor:g} for {len(best)} arms is more than there is; lower it")
    weights: dict[str, float] = {}
    for arm in sorted(best, key=lambda each: best[each]):
        left = 1.0 - math.fsum(weights.values())
        sharing = math.fsum(best[each] for each in best if each not in weights)
        weights[arm] = max(floor, left * best[arm] / sharing) if sharing > 0.0 else left / (len(best) - len(weights))
    greatest = max(weights, key=lambda each: weights[each])
    weights[greatest] = 1.0 - math.fsum(weight for arm, weight in weights.items() if arm != greatest)
    return {arm: weights[arm] for arm in best}
