"""What arms' sums say: means, lifts against the control, whether something is worse. Pure, and valid at any look.

An interval is the present member of a confidence sequence: with probability 1 - alpha, in the limit of many units, all
of them hold at once, however often and for whatever reason one looks. `best` has the probabilities of being best.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from prompt_store.ledger.sums import UnitSums
from service.experiments.best import probabilities_of_best
from service.experiments.figures import ArmEstimate, Direction, GuardrailState, Interval

BURN_IN_UNITS = 100
"""Effective units of an arm under which nothing is said: confidence sequences here hold in the limit only, and with
fewer units a mean of skewed outcomes is not yet near enough to normal."""

TUNED_UNITS = 5000
"""How many units, in two arms of equal probability, intervals are narrowest for; at others they hold just as well."""

COVARIATE_UNITS = 100
"""Effective units with a covariate that every arm needs before it is used. Its centre and coefficient are estimated
from them, and what that adds to the variance, about 1 / units of it, is left out of the formula."""

_PSEUDO_UNITS = 2.0


@dataclass(frozen=True, slots=True)
class _Mean:
    """An estimated mean, its variance (infinite where too little is known), and its place in the sequence."""

    value: float
    variance: float
    time: float


def added(sums: Iterable[UnitSums]) -> dict[str, UnitSums]:
    """The sums of each arm over all its intervals of time, from the earliest; arms in the order they first come."""
    by_arm: dict[str, list[UnitSums]] = {}
    for each in sums:
        by_arm.setdefault(each.arm, []).append(each)
    return {arm: _added(parts) for arm, parts in by_arm.items()}


def _added(parts: list[UnitSums]) -> UnitSums:
    totals: dict[str, Any] = {}
    for field in dataclasses.fields(UnitSums):
        values = [getattr(part, field.name) for part in parts]
        if field.name not in ("arm", "since_ms"):
            totals[field.name] = math.fsum(values) if field.type == "float" else sum(values)
    return UnitSums(arm=parts[0].arm, since_ms=min(part.since_ms for part in parts), **totals)


def estimates(
    arms: Mapping[str, UnitSums],
    control: str,
    *,
    direction: Direction,
    alpha: float,
    boolean: bool = False,
    chances: bool = True,
) -> tuple[ArmEstimate, ...]:
    """One metric of every arm, the control first. `arms` has an entry for each arm, those without units included.

    The mean of a `boolean` metric is between 0 and 1, its lifts between -1 and 1, so what is beyond is cut off their
    sequences: it never held the truth. Sequences without bounds stay so, as too little is known for any. Without
    `chances` nothing is said of which arm is best, which takes the most time where there are more than two.

    A mean is self-normalised by inverse propensity, sum(w y) / sum(w); each mean's interval is at `alpha`. A lift is
    the difference of two means with the sum of their variances, at alpha / (arms - 1), so that all lifts hold together
    (Bonferroni). Where a covariate is used, lifts and `best` are of adjusted means; `mean` never is.
    Source: Hájek 1971; Waudby-Smith et al., arXiv:2103.06476 (`half_width`); Deng et al. 2013 (`_adjusted`).
    """
    known = {arm: sums for arm, sums in arms.items() if sums.valued}
    binary = boolean or all(math.isclose(sums.wwyy, sums.wwy, rel_tol=1e-9) for sums in known.values())
    plain = {arm: _plain(sums, binary) for arm, sums in known.items()}
    adjusted = _adjusted(known, plain, binary)
    compared = adjusted or plain
    best: Mapping[str, float] = {}
    if chances and len(known) == len(arms) > 1 and all(math.isfinite(mean.variance) for mean in compared.values()):
        posteriors = {arm: NormalDist(mean.value, math.sqrt(mean.variance)) for arm, mean in compared.items()}
        best = probabilities_of_best(posteriors, direction)
    level = alpha / max(1, len(arms) - 1)
    least, most = (0.0, 1.0) if boolean else (-math.inf, math.inf)

    def estimate(arm: str) -> ArmEstimate:
        lift = None
        if arm != control and arm in compared and control in compared:
            lift = _interval(_less(compared[arm], compared[control]), level, -most, most)
        return ArmEstimate(
            arm=arm,
            units=arms[arm].units,
            valued=arms[arm].valued,
            mean=_interval(plain[arm], alpha, least, most) if arm in plain else None,
            lift=lift,
            best=best.get(arm),
            adjusted=adjusted is not None and arm in adjusted,
        )

    return tuple(estimate(arm) for arm in sorted(arms, key=lambda each: each != control))


def half_width(variance: float, time: float, alpha: float) -> float:
    """Half the width of an asymptotic confidence sequence: Robbins' boundary of a Gaussian mixture.

    sqrt(variance) * sqrt((1 + 1 / u) * (log(1 + u) - 2 log(alpha))) with u = time * rho^2, and rho such that it is
    narrowest at TUNED_UNITS. `time` is a number of units. In theory one over the variance grows as it does, as is so
    while weights stay as they are; that bounds hold where weights change is known by simulation.
    Source: Waudby-Smith et al., arXiv:2103.06476; equations 9 and 161 (rho) of its version 7.
    """
    evidence = -2.0 * math.log(alpha)
    scaled = time * (evidence + math.log1p(evidence)) / TUNED_UNITS
    return math.sqrt(variance) * math.sqrt((1.0 + 1.0 / scaled) * (math.log1p(scaled) + evidence))


def missing_differs(arms: Mapping[str, UnitSums], control: str, alpha: float) -> bool:
    """Whether some arm's share of units with a value surely differs from the control's, at any look.

    The share is the mean of what is 1 of a unit with a value and 0 of others, so it is estimated like any metric, by
    weights over all units.
    """
    shares = {
        arm: UnitSums(
            arm=arm,
            since_ms=each.since_ms,
            units=each.units,
            uw=each.uw,
            uww=each.uww,
            valued=each.units,
            w=each.uw,
            wy=each.w,
            ww=each.uww,
            wwy=each.ww,
            wwyy=each.ww,
        )
        for arm, each in arms.items()
    }
    found = estimates(shares, control, direction="maximise", alpha=alpha, boolean=True, chances=False)
    return any(each.lift is not None and (each.lift.low > 0.0 or each.lift.high < 0.0) for each in found)


def guardrail_state(
    estimate: ArmEstimate, control_estimate: ArmEstimate, direction: Direction, margin: float, relative: bool
) -> GuardrailState:
    """Whether an arm is worse than the control by more than `margin`, or by that share of the control's mean.

    `violated` once all that is possible is worse than allowed. `held` once all is allowed; without a margin, which no
    interval around zero could ever fit, while nothing worse is shown. Otherwise `open`, as it is before anything is
    known. A relative margin is that of the least, or for `violated` the most, that the control's mean may be.
    """
    lift, mean = estimate.lift, control_estimate.mean
    if lift is None or mean is None or math.isinf(lift.high - lift.low):
        return "open"
    least_worse, most_worse = (lift.low, lift.high) if direction == "minimise" else (-lift.high, -lift.low)
    least_margin = most_margin = margin
    if relative:
        smallest = 0.0 if mean.low <= 0.0 <= mean.high else min(abs(mean.low), abs(mean.high))
        least_margin, most_margin = margin * smallest, margin * max(abs(mean.low), abs(mean.high))
    if least_worse > most_margin:
        return "violated"
    if margin == 0.0 or most_worse <= least_margin:
        return "held"
    return "open"


def _plain(sums: UnitSums, binary: bool) -> _Mean:
    """The mean m = sum(w y) / sum(w), its linearised variance, and its time.

    The variance is sum(w^2 (y - m)^2) / sum(w)^2: with equal probabilities that of a mean. The time is the effective
    number of units, sum(w)^2 / sum(w^2): with equal probabilities that of units.
    Source: Särndal et al. 1992, Model assisted survey sampling; Kish 1965, Survey sampling.
    """
    mean = sums.wy / sums.w
    squares = sums.wwyy - 2.0 * mean * sums.wwy + mean * mean * sums.ww
    return _Mean(mean, _variance(sums, squares, binary), sums.w * sums.w / sums.ww)


def _variance(sums: UnitSums, squares: float, binary: bool) -> float:
    """The variance of a mean from `squares`, its sum(w^2 (y - m)^2); infinite where too little is known.

    With n effective units, n / (n - 1) corrects for the estimated mean. Outcomes that were all equal say nothing of
    those to come, unless they are `binary`, true or false: then two units of 0 and two of 1 are added at a unit's mean
    w^2, so that no success in n units leaves about 4 / n possible, and the interval always has a width.
    Source: Agresti and Coull 1998, Approximate is better than exact, for two of each.
    """
    effective = sums.w * sums.w / sums.ww
    if effective < BURN_IN_UNITS:
        return math.inf
    if binary:
        mean = sums.wy / sums.w
        squares = max(0.0, squares) + _PSEUDO_UNITS * (mean**2 + (1.0 - mean) ** 2) * sums.ww / sums.valued
    elif squares <= 1e-12 * sums.wwyy:  # rounding leaves as much of values that are all equal
        return math.inf
    return squares / (sums.w * sums.w) * effective / (effective - 1.0)


def _adjusted(arms: Mapping[str, UnitSums], plain: Mapping[str, _Mean], binary: bool) -> dict[str, _Mean] | None:
    """Means of y - theta z instead of y, where that makes them less uncertain; None where it does not.

    z is x less its mean over all arms' units that have one, and 0 of units without; before the start an arm cannot
    have changed it, so z has the same mean in every arm and lifts stay unbiased whatever theta is. One theta for all
    arms, cov(m, z) / var(z) with both summed over arms as covariances of their means, makes the sum of variances least.
    Source: Deng et al. 2013, Improving the sensitivity of online controlled experiments by utilizing pre-experiment
    data, section 3.2.
    """
    if not arms or any(sums.kw * sums.kw < COVARIATE_UNITS * sums.kww or not sums.kww for sums in arms.values()):
        return None
    centre = math.fsum(sums.wx for sums in arms.values()) / math.fsum(sums.kw for sums in arms.values())
    shifts, covariances, variances = {}, {}, {}
    for arm, sums in arms.items():
        wwz = sums.wwx - centre * sums.kww
        wwzz = sums.wwxx - 2.0 * centre * sums.wwx + centre * centre * sums.kww
        wwzy = sums.wwxy - centre * sums.kwwy
        mean, z = sums.wy / sums.w, (sums.wx - centre * sums.kw) / sums.w
        shifts[arm] = z
        covariances[arm] = wwzy - mean * wwz - z * sums.wwy + mean * z * sums.ww
        variances[arm] = wwzz - 2.0 * z * wwz + z * z * sums.ww
    spread = math.fsum(variances[arm] / sums.w**2 for arm, sums in arms.items())
    if spread <= 1e-12 * math.fsum(sums.wwxx / sums.w**2 for sums in arms.values()):
        return None
    theta = math.fsum(covariances[arm] / sums.w**2 for arm, sums in arms.items()) / spread
    adjusted = {}
    for arm, sums in arms.items():
        mean = sums.wy / sums.w
        squares = sums.wwyy - 2.0 * mean * sums.wwy + mean * mean * sums.ww
        squares += theta * theta * variances[arm] - 2.0 * theta * covariances[arm]
        adjusted[arm] = _Mean(mean - theta * shifts[arm], _variance(sums, squares, binary), plain[arm].time)
    narrower = sum(each.variance for each in adjusted.values()) < sum(each.variance for each in plain.values())
    return adjusted if narrower else None


def _less(mean: _Mean, other: _Mean) -> _Mean:
    """The difference of two means of different units.

    Its variance is the sum of theirs, and no less than if units of both arms varied alike, by what both arms together
    show; with as many units in both these are the same. An arm with few of the units, whether by its weight or by
    Thompson sampling, may by chance have none of the large outcomes that skewed metrics such as costs have, or of the
    failures that are rare. Its mean is then too low and its own variance hides it, so with the sum alone false
    positives exceed alpha.

    Its time is that of two equal arms with as much information, 4 / (1 / n1 + 1 / n2), and so all their units where
    they are equal: never more than their units, so where they are few bounds are wider.
    """
    inverse = 1.0 / mean.time + 1.0 / other.time
    alike = (mean.time**2 * mean.variance + other.time**2 * other.variance) / (mean.time + other.time) * inverse
    return _Mean(mean.value - other.value, max(mean.variance + other.variance, alike), 4.0 / inverse)


def _interval(mean: _Mean, alpha: float, least: float, most: float) -> Interval:
    margin = half_width(mean.variance, mean.time, alpha)
    if math.isinf(margin):
        return Interval(mean.value, -math.inf, math.inf)
    estimate, low, high = (
        min(max(each, least), most) for each in (mean.value, mean.value - margin, mean.value + margin)
    )
    return Interval(estimate, low, high)
