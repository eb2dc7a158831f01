"""Many simulated experiments at once, and their sums after any unit, as the docstring of `sums.py` has them.

Arrays are [runs, units], in the order in which units come. Which looks could be alarms is found by formulas over
arrays, and whether one is, is said by `estimates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prompt_store.ledger.sums import UnitSums
from service.experiments.figures import Interval
from service.experiments.statistics import BURN_IN_UNITS, estimates

Array = NDArray[Any]
Sums = dict[str, Array]

ARMS = ("control", "first", "second")
RUNS = 2000


def most(alpha: float) -> int:
    """False positives that no more than one honest test in a thousand exceeds (normal bound of the binomial)."""
    return int(RUNS * alpha + NormalDist().inv_cdf(0.999) * (RUNS * alpha * (1 - alpha)) ** 0.5)


@dataclass(frozen=True)
class Units:
    """Units' arms (places in ARMS), weights, values and covariates; a value or covariate of NaN is none."""

    arm: Array
    w: Array
    y: Array
    x: Array | None = None


def running(units: Units, place: int, step: int = 1) -> Sums:
    """The fields of UnitSums for one arm after each `step` units: [runs, looks] each. A name spells its product."""
    own = units.arm == place
    x = np.full(units.y.shape, np.nan) if units.x is None else units.x
    valued = own & ~np.isnan(units.y)
    covariate = valued & ~np.isnan(x)
    factors = {"w": units.w, "y": np.nan_to_num(units.y), "x": np.nan_to_num(x)}
    counted = {"units": own, "valued": valued, "k": covariate}
    sums = {}
    for name in (field.name for field in fields(UnitSums) if field.name not in ("arm", "since_ms")):
        terms = counted.get(name)
        if terms is None:
            over = own if name.startswith("u") else covariate if set(name) & set("kx") else valued
            terms = over.astype(float)
            for letter in name.strip("uk"):
                terms = terms * factors[letter]
        sums[name] = np.cumsum(terms, axis=-1)[..., step - 1 :: step]
    return sums


def sums_at(sums: Sums, place: int, run: int, look: int) -> UnitSums:
    """One arm's sums of one run after one look."""
    return UnitSums(arm=ARMS[place], since_ms=0, **{name: values[run, look].item() for name, values in sums.items()})


def whole(units: Units, *, arms: int = 2, run: int = 0) -> dict[str, UnitSums]:
    """The sums of each arm over all units of one run."""
    arrays = (units.arm, units.w, units.y, units.x)
    alone = Units(*(None if each is None else each[run : run + 1] for each in arrays))
    return {ARMS[place]: sums_at(running(alone, place), place, 0, -1) for place in range(arms)}


def alarms(
    units: Units, *, alpha: float, arms: int = 2, step: int = 1, adjust: bool = False, truth: float = 0.0
) -> list[Interval | None]:
    """By run, a lift's interval at some look that is without `truth`; None where there is none at any look.

    `estimates` is asked where a lift is the furthest beyond its boundary, by the formulas here.
    """
    sums = [running(units, place, step) for place in range(arms)]
    found: list[Interval | None] = [None] * len(units.arm)
    with np.errstate(divide="ignore", invalid="ignore"):
        control, *others = _means(sums, adjust=adjust)
        enough = np.all([each["w"] ** 2 >= BURN_IN_UNITS * each["ww"] for each in sums], axis=0)
        for place, (mean, variance) in enumerate(others, start=1):
            time = 4 / (sums[0]["ww"] / sums[0]["w"] ** 2 + sums[place]["ww"] / sums[place]["w"] ** 2)
            boundary = _boundary(time, alpha / (arms - 1))
            excess = np.abs(mean - control[0] - truth) / np.sqrt(variance + control[1]) / boundary
            looks = np.argmax(np.where(enough & np.isfinite(excess), excess, 0.0), axis=1)
            for run, look in enumerate(looks):
                now = {ARMS[each]: sums_at(sums[each], each, run, look) for each in range(arms)}
                lift = estimates(now, "control", direction="maximise", alpha=alpha)[place].lift
                if lift is not None and not lift.low <= truth <= lift.high:
                    found[run] = lift
    return found


def _boundary(time: Array, alpha: float) -> Array:
    """Equations 14 and 161 of arXiv:2103.06476, in standard errors."""
    rho_squared = (-2 * np.log(alpha) + np.log(-2 * np.log(alpha) + 1)) / 5000
    scaled = time * rho_squared
    return np.sqrt(2 * (scaled + 1) / scaled * np.log(np.sqrt(scaled + 1) / alpha))


def _means(sums: Sequence[Sums], *, adjust: bool) -> list[tuple[Array, Array]]:
    """Each arm's mean and its variance at all looks, without what is added for values of 0 and 1."""
    theta: Array | float = 0.0
    centre: Array | float = 0.0
    if adjust:
        centre = sum(each["wx"] for each in sums) / sum(each["kw"] for each in sums)
        moments = [_moments(each, centre) for each in sums]
        theta = sum(yz for _, yz, _, _, _ in moments) / sum(zz for _, _, zz, _, _ in moments)
    found = []
    for each in sums:
        yy, yz, zz, y, z = _moments(each, centre)
        n = each["w"] ** 2 / each["ww"]
        found.append((y - theta * z, (yy - 2 * theta * yz + theta**2 * zz) * n / (n - 1)))
    return found


def _moments(sums: Sums, centre: Array | float) -> tuple[Array, ...]:
    """The variances and the covariance of the means of y and z, and these means."""
    y, z = sums["wy"] / sums["w"], (sums["wx"] - centre * sums["kw"]) / sums["w"]
    wwz = sums["wwx"] - centre * sums["kww"]
    yy = sums["wwyy"] - 2 * y * sums["wwy"] + y * y * sums["ww"]
    yz = sums["wwxy"] - centre * sums["kwwy"] - y * wwz - z * sums["wwy"] + y * z * sums["ww"]
    zz = sums["wwxx"] - 2 * centre * sums["wwx"] + centre**2 * sums["kww"] - 2 * z * wwz + z * z * sums["ww"]
    return yy / sums["w"] ** 2, yz / sums["w"] ** 2, zz / sums["w"] ** 2, y, z
