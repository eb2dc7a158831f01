"""Many simulated experiments at once, and their sums after any unit, as the docstring of `sums.py` has them.

Arrays are [runs, units], in the order in which units come. Which looks could be alarms is found by formulas over
arrays, and whether one is, is said by `estimates`, or by what is made of them.
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
from service.experiments.statistics import BURN_IN_UNITS, COVARIATE_UNITS, estimates

Array = NDArray[Any]
Sums = dict[str, Array]

ARMS = ("control", "first", "second", "third")
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
    """The fields of UnitSums for one arm after each `step` units: [runs, looks] each. A name spells its product.

    Without covariates there are none of their fields.
    """
    own = units.arm == place
    valued = own & ~np.isnan(units.y)
    factors = {"w": units.w, "y": np.nan_to_num(units.y)}
    counted = {"units": own, "valued": valued}
    names = [field.name for field in fields(UnitSums) if field.name not in ("arm", "since_ms")]
    if units.x is None:
        names = [name for name in names if not set(name) & set("kx")]
    else:
        counted["k"] = valued & ~np.isnan(units.x)
        factors["x"] = np.nan_to_num(units.x)
    looks = units.arm.shape[-1] // step
    sums = {}
    for name in names:
        terms = counted.get(name)
        if terms is None:
            terms = own if name.startswith("u") else counted["k"] if set(name) & set("kx") else valued
            for letter in name.strip("uk"):
                terms = terms * factors[letter]
        sums[name] = terms[..., : looks * step].reshape(*terms.shape[:-1], looks, step).sum(axis=-1).cumsum(axis=-1)
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
    units: Units, *, alpha: float, arms: int = 2, step: int = 1, truth: float = 0.0, boolean: bool = False
) -> list[Interval | None]:
    """By run, a lift's interval at some look that is without `truth`; None where there is none at any look.

    `estimates` is asked where a lift is the furthest beyond its boundary, by `excesses`.
    """
    sums = [running(units, place, step) for place in range(arms)]
    how: dict[str, Any] = {"alpha": alpha, "boolean": boolean}
    found: list[Interval | None] = [None] * len(units.arm)
    for place, excess in enumerate(np.abs(excesses(sums, truth=truth, **how)), start=1):
        for run, look in enumerate(np.argmax(excess, axis=1)):
            lift = estimates(at(sums, run, look), ARMS[0], direction="maximise", chances=False, **how)[place].lift
            if lift is not None and not lift.low <= truth <= lift.high:
                found[run] = lift
    return found


def at(sums: Sequence[Sums], run: int, look: int) -> dict[str, UnitSums]:
    """The sums of each arm of one run after one look."""
    return {ARMS[place]: sums_at(each, place, run, look) for place, each in enumerate(sums)}


def excesses(sums: Sequence[Sums], *, alpha: float, truth: float = 0.0, boolean: bool = False) -> Array:
    """How far each lift is from `truth`, in half widths of its sequence; 0 where it has no bounds.

    [arms but the control, runs, looks]: what `estimates` says, for many sums at once.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        binary = boolean | np.all([np.isclose(each["wwyy"], each["wwy"], rtol=1e-9, atol=0.0) for each in sums], axis=0)
        control, *others = _means(sums, binary)
        level = alpha / len(others)
        found = []
        for mean in others:
            inverse = 1 / mean.units + 1 / control.units
            spread = mean.units**2 * mean.variance + control.units**2 * control.variance
            alike = spread / (mean.units + control.units) * inverse
            variance = np.maximum(mean.variance + control.variance, alike)
            found.append((mean.value - control.value - truth) / np.sqrt(variance) / _boundary(4 / inverse, level))
    return np.nan_to_num(np.array(found), posinf=0.0, neginf=0.0)


def _boundary(time: Array, alpha: float) -> Array:
    """Equations 9 and 161 of arXiv:2103.06476, version 7, in standard errors."""
    rho_squared = (-2 * np.log(alpha) + np.log(-2 * np.log(alpha) + 1)) / 5000
    scaled = time * rho_squared
    return np.sqrt(2 * (scaled + 1) / scaled * np.log(np.sqrt(scaled + 1) / alpha))


@dataclass(frozen=True)
class _Mean:
    value: Array
    variance: Array
    units: Array


def _means(sums: Sequence[Sums], binary: Array) -> list[_Mean]:
    """Each arm's mean at all looks, adjusted by covariates where there are enough that make lifts narrower."""
    plain = [_mean(each, binary, 0.0, 0.0) for each in sums]
    if "k" not in sums[0]:
        return plain
    centre = sum(each["wx"] for each in sums) / sum(each["kw"] for each in sums)
    moments = [_moments(each, centre) for each in sums]
    theta = sum(yz for _, yz, _, _, _ in moments) / sum(zz for _, _, zz, _, _ in moments)
    adjusted = [_mean(each, binary, theta, centre) for each in sums]
    enough = np.all([each["kw"] ** 2 >= COVARIATE_UNITS * each["kww"] for each in sums], axis=0)
    used = enough & (sum(each.variance for each in adjusted) < sum(each.variance for each in plain))
    return [
        _Mean(np.where(used, ours.value, other.value), np.where(used, ours.variance, other.variance), other.units)
        for ours, other in zip(adjusted, plain, strict=True)
    ]


def _mean(sums: Sums, binary: Array, theta: Array | float, centre: Array | float) -> _Mean:
    yy, yz, zz, y, z = _moments(sums, centre) if "k" in sums else (*_plain_moments(sums), 0.0)
    units = sums["w"] ** 2 / sums["ww"]
    variance = yy - 2 * theta * yz + theta**2 * zz
    added = 2 * (y**2 + (1 - y) ** 2) * sums["ww"] / sums["valued"] / sums["w"] ** 2
    known = (units >= BURN_IN_UNITS) & (binary | (variance * sums["w"] ** 2 > 1e-12 * sums["wwyy"]))
    variance = np.where(known, (variance + np.where(binary, added, 0.0)) * units / (units - 1), np.inf)
    return _Mean(y - theta * z, variance, units)


def _plain_moments(sums: Sums) -> tuple[Array, float, float, Array]:
    y = sums["wy"] / sums["w"]
    return (sums["wwyy"] - 2 * y * sums["wwy"] + y * y * sums["ww"]) / sums["w"] ** 2, 0.0, 0.0, y


def _moments(sums: Sums, centre: Array | float) -> tuple[Array, ...]:
    """The variances and the covariance of the means of y and z, and these means."""
    yy, _, _, y = _plain_moments(sums)
    z = (sums["wx"] - centre * sums["kw"]) / sums["w"]
    wwz = sums["wwx"] - centre * sums["kww"]
    yz = sums["wwxy"] - centre * sums["kwwy"] - y * wwz - z * sums["wwy"] + y * z * sums["ww"]
    zz = sums["wwxx"] - 2 * centre * sums["wwx"] + centre**2 * sums["kww"] - 2 * z * wwz + z * z * sums["ww"]
    return yy, yz / sums["w"] ** 2, zz / sums["w"] ** 2, y, z
