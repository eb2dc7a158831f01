"""Numbers as people read them: rounded by how sure they are, in the unit of their metric."""

from __future__ import annotations

import math
from dataclasses import dataclass

from service.experiments.figures import Interval, MetricFigures

UNKNOWN = "–"
_MOST_DECIMALS = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """How a metric's values are said: times `factor`, then `unit`; differences in `difference_unit`."""

    factor: float = 1.0
    unit: str = ""
    difference_unit: str = ""

    def mean(self, interval: Interval | None) -> str:
        """62.4 %, rounded by its sequence."""
        if interval is None:
            return UNKNOWN
        return self._number(interval.estimate, self.decimals(interval)) + self.unit

    def lift(self, interval: Interval | None) -> str:
        """+4.1 points, always with its sign."""
        if interval is None:
            return UNKNOWN
        return self._number(interval.estimate, self.decimals(interval), "+") + self.difference_unit

    def size(self, interval: Interval) -> str:
        """A lift without its sign."""
        return self._number(abs(interval.estimate), self.decimals(interval)) + self.difference_unit

    def is_nothing(self, interval: Interval) -> bool:
        """Whether a lift is rounded away."""
        return not self._number(abs(interval.estimate), self.decimals(interval)).strip("0.,")

    def difference(self, value: float) -> str:
        """A difference that is given, such as a margin, to three digits."""
        number = f"{value * self.factor:.3g}"
        return number + (self.difference_unit.removesuffix("s") if number == "1" else self.difference_unit)

    def bounds(self, interval: Interval | None) -> str:
        """1.2 to 7.0, without the unit; nothing is known beyond infinite bounds."""
        if interval is None or not is_bounded(interval):
            return UNKNOWN
        decimals = self.decimals(interval)
        return f"{self._number(interval.low, decimals)} to {self._number(interval.high, decimals)}"

    def decimals(self, interval: Interval) -> int:
        """So many that the sequence's half width has two digits; without bounds, that the estimate has three."""
        if is_bounded(interval) and interval.high > interval.low:
            return decimals_for((interval.high - interval.low) / 2 * self.factor, digits=2)
        return decimals_for(abs(interval.estimate) * self.factor, digits=3)

    def _number(self, value: float, decimals: int, sign: str = "-") -> str:
        text = f"{value * self.factor:{sign},.{decimals}f}".replace("-", "−")
        rounded_away = not text.strip("+−0.,")
        return text.lstrip("+−") if rounded_away else text


def scale_of(metric: MetricFigures) -> Scale:
    if metric.boolean:
        return Scale(100.0, "%", " points")
    return Scale(1.0, " ms", " ms") if metric.metric.endswith("_ms") else Scale()


def is_bounded(interval: Interval) -> bool:
    return math.isfinite(interval.low) and math.isfinite(interval.high)


def decimals_for(value: float, *, digits: int) -> int:
    """Decimals that show so many digits of a positive value."""
    if not value > 0.0 or not math.isfinite(value):
        return digits - 1
    return min(max(digits - 1 - math.floor(math.log10(value)), 0), _MOST_DECIMALS)


def share(value: float | None, decimals: int = 0) -> str:
    """A share of 1 in percent; what is almost certain is never said to be so."""
    if value is None:
        return UNKNOWN
    text = f"{value:.{decimals}%}"
    if value < 1.0 and text == f"{1:.{decimals}%}":
        return f"> {1 - 10.0 ** -(decimals + 2):.{decimals}%}"
    return f"< {10.0 ** -(decimals + 2):.{decimals}%}" if value > 0.0 and text == f"{0:.{decimals}%}" else text


def duration(seconds: float) -> str:
    """2.5 days, 7.0 hours or 3 minutes."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    minutes = int(seconds / 60)
    return f"{minutes} minute{'' if minutes == 1 else 's'}"


def confidence(alpha: float) -> str:
    """95% of alpha 0.05."""
    return f"{100 * (1 - alpha):.4g}%"


def p_value(value: float) -> str:
    """p < 0.0001 or p = 0.032."""
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.2g}"
