"""Plots as inline SVG: lines with their sequences over time, observed against expected shares, lifts against margins.

Each is drawn once, at the size it is meant for; colours are the page's, by classes: `arm-0` is the control. What is
drawn is named in a title and told in a description, for those who cannot see it. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from markupsafe import Markup

from service.experiments.figures import GuardrailState, Interval
from service.experiments.wording import decimals_for, is_bounded

WIDTH = 520
_HEIGHT, _EMPTY_HEIGHT = 250, 90
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 112, 14, 30
_ROW = 26
_LABEL_GAP = 15
_LONGEST_NAME = 12
ARM_COLOURS = 8

_MINUTE_MS, _HOUR_MS, _DAY_MS = 60_000, 3_600_000, 86_400_000
_TIME_STEPS_MS = [
    *(minutes * _MINUTE_MS for minutes in (1, 2, 5, 10, 15, 30)),
    *(hours * _HOUR_MS for hours in (1, 2, 3, 6, 12)),
    *(days * _DAY_MS for days in (1, 2, 4, 7, 14, 28, 56, 112, 364)),
]


@dataclass(frozen=True, slots=True)
class Series:
    """One arm's line: a point is when, what, and what its tooltip says."""

    name: str
    colour: int
    points: Sequence[tuple[int, Interval, str]]


@dataclass(frozen=True, slots=True)
class Span:
    """One arm's lift against a margin, which is on the side that `worse` names; `said` stands beside it."""

    name: str
    colour: int
    lift: Interval | None
    state: GuardrailState
    said: str


@dataclass(slots=True)
class _Drawing:
    """An SVG that grows by elements."""

    name: str
    title: str
    description: str
    height: float
    width: float = WIDTH
    parts: list[Markup] = field(default_factory=list)

    def add(self, element: str, text: str | None = None, **attributes: str | float) -> None:
        self.parts.append(_element(element, text, attributes))

    @contextmanager
    def clipped(self, left: float, top: float, right: float, bottom: float) -> Iterator[None]:
        """Draws nothing of what is outside."""
        name = f"{self.name}-inside"
        inside = _element("rect", None, {"x": left, "y": top, "width": right - left, "height": bottom - top})
        self.parts.append(Markup('<clipPath id="{}">{}</clipPath><g clip-path="url(#{})">').format(name, inside, name))
        yield
        self.parts.append(Markup("</g>"))

    def svg(self) -> Markup:
        return Markup(
            '<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{name}-title {name}-desc">'
            '<title id="{name}-title">{}</title><desc id="{name}-desc">{}</desc>{}</svg>'
        ).format(
            _number(self.width), _number(self.height), self.title, self.description, Markup("").join(self.parts),
            name=self.name,
        )  # fmt: skip


def over_time(
    name: str,
    title: str,
    description: str,
    series: Sequence[Series],
    start_ms: int,
    end_ms: int,
    *,
    factor: float = 1.0,
    zero: bool = False,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Markup:
    """Estimates as lines within their sequences as bands; with `zero` a line at none.

    Bands that are wide at first are cut, so that what is known by now can be seen; `limits` are what values can be.
    """
    shown = _shown_range(series, zero, limits)
    if shown is None:
        empty = _Drawing(name, title, description, _EMPTY_HEIGHT)
        empty.add("text", "No unit has a value yet", x=WIDTH / 2, y=_EMPTY_HEIGHT / 2, **_text("note", "middle"))
        return empty.svg()
    drawing = _Drawing(name, title, description, _HEIGHT)
    right, bottom = WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    x = _scale(start_ms, max(end_ms, start_ms + 1), _LEFT, right)
    y = _scale(shown[0], shown[1], bottom, _TOP)
    for value, label in _value_ticks(shown[0] * factor, shown[1] * factor):
        level = y(value / factor)
        drawing.add("line", x1=_LEFT, x2=right, y1=level, y2=level, **{"class": "grid"})
        drawing.add("text", label, x=_LEFT - 8, y=level + 4, **_text("tick", "end"))
    for at_ms, label in _time_ticks(start_ms, end_ms):
        drawing.add("line", x1=x(at_ms), x2=x(at_ms), y1=bottom, y2=bottom + 4, **{"class": "axis"})
        drawing.add("text", label, x=x(at_ms), y=bottom + 19, **_text("tick", "middle"))
    if zero and shown[0] <= 0.0 <= shown[1]:
        drawing.add("line", x1=_LEFT, x2=right, y1=y(0.0), y2=y(0.0), **{"class": "zero"})
    drawing.add("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, **{"class": "axis"})
    with drawing.clipped(_LEFT, _TOP, right + 5, bottom):
        for each in series:
            _draw_band(drawing, each, x, y)
        for each in series:
            _draw_line(drawing, each, x, y)
    ends = [(each, min(max(y(each.points[-1][1].estimate), _TOP), bottom)) for each in series if each.points]
    for (each, _), level in zip(ends, _spread([end for _, end in ends], _TOP, bottom), strict=True):
        drawing.parts.append(_named(each.name, right + 10, level + 4, each.colour))
    return drawing.svg()


def shares(name: str, title: str, description: str, rows: Sequence[tuple[str, int, float, float, str]]) -> Markup:
    """Bars of what was observed with a mark at what was expected.

    A row is an arm, its colour, its observed and its expected share of 1, and what stands beside it.
    """
    left, right = _LEFT + 62, WIDTH - 132
    drawing = _Drawing(name, title, description, _ROW * len(rows) + 12)
    most = max([0.01, *(max(observed, expected) for _, _, observed, expected, _ in rows)])
    x = _scale(0.0, most, left, right)
    for place, (arm, colour, observed, expected, said) in enumerate(rows):
        middle = 6 + _ROW * (place + 0.5)
        drawing.parts.append(_named(arm, left - 10, middle + 4, colour, "end"))
        drawing.add("rect", x=left, y=middle - 7, width=right - left, height=14, rx=2, **{"class": "track"})
        width = max(x(observed) - left, 0.0)
        drawing.add("rect", x=left, y=middle - 7, width=width, height=14, rx=2, **{"class": f"bar arm-{colour}"})
        drawing.add("line", x1=x(expected), x2=x(expected), y1=middle - 10, y2=middle + 10, **{"class": "mark"})
        drawing.add("text", said, x=right + 12, y=middle + 4, **_text("said"))
    return drawing.svg()


def against_margin(
    name: str, title: str, description: str, rows: Sequence[Span], limit: float, *, factor: float = 1.0
) -> Markup:
    """Lifts with their sequences, and the harmful side of `limit`, which is beyond zero on that side.

    `limit` is 0.0 or -0.0 where nothing worse is allowed: its sign says which side that is.
    """
    harm_above = math.copysign(1.0, limit) > 0.0
    left, right = _LEFT + 62, WIDTH - 132
    bottom = 8 + _ROW * len(rows)
    drawing = _Drawing(name, title, description, bottom + 26)
    bounded = [row.lift for row in rows if row.lift is not None and is_bounded(row.lift)]
    values = [0.0, limit, *(bound for lift in bounded for bound in (lift.low, lift.high))]
    values += [row.lift.estimate for row in rows if row.lift is not None]
    spread = (max(values) - min(values)) or 1.0
    low, high = min(values) - 0.08 * spread, max(values) + 0.08 * spread
    x = _scale(low, high, left, right)
    harm_left, harm_right = (x(limit), right) if harm_above else (left, x(limit))
    drawing.add("rect", x=harm_left, y=2, width=harm_right - harm_left, height=bottom - 2, **{"class": "harm"})
    drawing.add("line", x1=x(0.0), x2=x(0.0), y1=2, y2=bottom, **{"class": "zero"})
    drawing.add("line", x1=x(limit), x2=x(limit), y1=2, y2=bottom, **{"class": "limit"})
    for value, label in _value_ticks(low * factor, high * factor, most=5):
        drawing.add("line", x1=x(value / factor), x2=x(value / factor), y1=bottom, y2=bottom + 4, **{"class": "axis"})
        drawing.add("text", label, x=x(value / factor), y=bottom + 18, **_text("tick", "middle"))
    drawing.add("line", x1=left, x2=right, y1=bottom, y2=bottom, **{"class": "axis"})
    for place, row in enumerate(rows):
        middle = 4 + _ROW * (place + 0.5)
        drawing.parts.append(_named(row.name, left - 10, middle + 4, row.colour, "end"))
        if row.lift is not None:
            _draw_span(drawing, row.lift, middle, row.colour, x, left, right)
        drawing.add("text", row.said, x=right + 12, y=middle + 4, **_text(f"said {row.state}"))
    return drawing.svg()


def interval(name: str, title: str, lift: Interval, low: float, high: float, colour: int) -> Markup:
    """A lift in a cell of a table, on a scale that its column shares."""
    drawing = _Drawing(name, title, title, 20, width=150)
    x = _scale(low, high, 4, 146)
    drawing.add("line", x1=x(0.0), x2=x(0.0), y1=1, y2=19, **{"class": "zero"})
    _draw_span(drawing, lift, 10, colour, x, 0, 150)
    return drawing.svg()


def _draw_span(
    drawing: _Drawing,
    lift: Interval,
    middle: float,
    colour: int,
    x: Callable[[float], float],
    left: float,
    right: float,
) -> None:
    bounds = (x(lift.low), x(lift.high)) if is_bounded(lift) else (left, right)
    known = "span" if is_bounded(lift) else "span unknown"
    drawing.add("line", x1=bounds[0], x2=bounds[1], y1=middle, y2=middle, **{"class": f"{known} arm-{colour}"})
    drawing.add("circle", cx=x(lift.estimate), cy=middle, r=4, **{"class": f"dot arm-{colour}"})


def _draw_band(drawing: _Drawing, series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> None:
    bounded = [(at_ms, value) for at_ms, value, _ in series.points if is_bounded(value)]
    if len(bounded) < 2:
        for at_ms, value in bounded:
            kind = {"class": f"span arm-{series.colour}"}
            drawing.add("line", x1=x(at_ms), x2=x(at_ms), y1=y(value.low), y2=y(value.high), **kind)
        return
    upper = [(x(at_ms), y(value.high)) for at_ms, value in bounded]
    lower = [(x(at_ms), y(value.low)) for at_ms, value in reversed(bounded)]
    drawing.add("polygon", points=_points([*upper, *lower]), **{"class": f"band arm-{series.colour}"})


def _draw_line(drawing: _Drawing, series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> None:
    places = [(x(at_ms), y(value.estimate)) for at_ms, value, _ in series.points]
    drawing.add("polyline", points=_points(places), **{"class": f"line arm-{series.colour}"})
    for (across, level), (_, _, said) in zip(places, series.points, strict=True):
        touched = _element("circle", None, {"cx": across, "cy": level, "r": 7, "class": "touch"})
        drawing.parts.append(Markup("<g><title>{}</title>{}</g>").format(said, touched))
    for across, level in places[-1:]:
        drawing.add("circle", cx=across, cy=level, r=3.5, **{"class": f"dot arm-{series.colour}"})


def _shown_range(series: Sequence[Series], zero: bool, limits: tuple[float, float]) -> tuple[float, float] | None:
    """From what is known at the end, with some room for what was thought before; None where there is no point."""
    settled = [value.estimate for each in series for _, value, _ in each.points[len(each.points) // 2 :]]
    if not settled:
        return None
    newest = [each.points[-1][1] for each in series if each.points]
    bounds = [bound for value in newest if is_bounded(value) for bound in (value.low, value.high)]
    core = [*settled, *bounds, *([0.0] if zero else [])]
    everything = [
        bound
        for each in series
        for _, value, _ in each.points
        if is_bounded(value)
        for bound in (value.low, value.high)
    ]
    room = 0.45 * (max(core) - min(core)) or abs(core[0]) * 0.1 or 1.0
    low = max(min([*core, *everything]), min(core) - room)
    high = min(max([*core, *everything]), max(core) + room)
    if high == low:
        low, high = low - room, high + room
    padding = 0.05 * (high - low)
    return max(low - padding, limits[0]), min(high + padding, limits[1])


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _value_ticks(low: float, high: float, most: int = 6) -> list[tuple[float, str]]:
    """Round values with their labels, as many as fit."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    decimals = decimals_for(step, digits=1)
    values = [place * step for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(value, f"{value + 0.0:,.{decimals}f}".replace("-", "−")) for value in values]


def _time_ticks(start_ms: int, end_ms: int, most: int = 5) -> list[tuple[int, str]]:
    """Round times in UTC with their labels: the day, or within days the time."""
    step = next((each for each in _TIME_STEPS_MS if (end_ms - start_ms) / each <= most), _TIME_STEPS_MS[-1])
    first = -(-start_ms // step) * step
    found = []
    for at_ms in range(first, end_ms + 1, step):
        moment = datetime.fromtimestamp(at_ms / 1000, UTC)
        found.append((at_ms, f"{moment:%H:%M}" if at_ms % _DAY_MS else f"{moment:%-d %b}"))
    return found


def _spread(levels: Sequence[float], top: float, bottom: float) -> list[float]:
    """Where labels stand that want to be at these levels: in their order, never one over another."""
    order = sorted(range(len(levels)), key=lambda place: levels[place])
    placed = [0.0] * len(levels)
    free = top
    for place in order:
        placed[place] = max(levels[place], free)
        free = placed[place] + _LABEL_GAP
    ceiling = max(bottom, top + _LABEL_GAP * (len(levels) - 1))
    for place in reversed(order):
        placed[place] = min(placed[place], ceiling)
        ceiling = placed[place] - _LABEL_GAP
    return placed


def _named(name: str, x: float, y: float, colour: int, anchor: str = "start") -> Markup:
    """An arm's name in its colour, cut where it is long, and whole in a tooltip."""
    short = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    attributes = _attributes({"x": x, "y": y, **_text(f"name arm-{colour}", anchor)})
    return Markup("<text{}><title>{}</title>{}</text>").format(attributes, name, short)


def _text(kind: str, anchor: str = "start") -> dict[str, str]:
    return {"class": kind, "text-anchor": anchor}


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{_number(across)},{_number(level)}" for across, level in places)


def _element(element: str, text: str | None, attributes: Mapping[str, str | float]) -> Markup:
    if text is None:
        return Markup("<{}{}/>").format(element, _attributes(attributes))
    return Markup("<{}{}>{}</{}>").format(element, _attributes(attributes), text, element)


def _attributes(attributes: Mapping[str, str | float]) -> Markup:
    return Markup("").join(
        Markup(' {}="{}"').format(name, value if isinstance(value, str) else _number(value))
        for name, value in attributes.items()
    )


def _number(value: float) -> str:
    """A coordinate, to a tenth; far outside of what is shown is outside enough."""
    return f"{min(max(value, -9999.0), 9999.0):.1f}".removesuffix(".0")
