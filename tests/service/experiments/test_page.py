"""The report as a page: whole by itself, safe, and told in words wherever something is drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from prompt_store.experiments.records import ExperimentEvent
from service.experiments.figures import Figures, ServedFigures
from service.experiments.page import page_of
from service.experiments.plots import Series, over_time
from tests.service.experiments.figured import (
    HOUR_MS,
    STARTED,
    STARTED_MS,
    UNBOUNDED,
    Interval,
    experiment,
    figures,
    guardrail,
    metric,
    ratio,
    record,
)

VOID = {"meta", "br", "line", "rect", "circle", "polygon", "polyline", "link", "img", "input", "hr"}
START = ExperimentEvent(1, "experiment.start", "support asked for it", {"weights": {"control": 0.5}}, STARTED, "anna")


class Page(HTMLParser):
    """A page's elements in order, its text, and whether every element that was opened was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == tag]


def page(shown: Figures, events: Sequence[ExperimentEvent] = (START,), **changes: Any) -> Page:
    found = Page(page_of(shown, record(**changes), events))
    assert found.open == []
    return found


def usual() -> Figures:
    better = metric({"candidate": (0.041, 0.012, 0.070)}, units=6172)
    return figures(better, guardrail({"candidate": (12.0, -8.0, 31.0)}, {"candidate": "held"}))


def test_the_sentence_comes_before_every_figure() -> None:
    text = " ".join(page(usual()).text)
    assert text.index("Promote candidate: helpful is 4.1 points higher") < text.index("12,344")
    assert "since 2 November 2026, 09:00 UTC, by anna" in text


def test_every_plot_is_named_and_told_and_every_table_has_a_caption() -> None:
    found = page(usual())
    plots = found.named("svg")
    assert len(plots) == 5
    named = [attributes["id"] for tag, attributes in found.elements if "id" in attributes]
    assert len(named) == len(set(named))
    for plot in plots:
        assert plot["role"] == "img"
        title, description = str(plot["aria-labelledby"]).split()
        assert {title, description} <= set(named)
    assert len(found.named("table")) == len(found.named("caption")) == 4
    assert "Now: candidate +4.1 points (1.2 to 7.0)" in " ".join(found.text)


def test_while_units_are_missing_no_arm_is_called_the_best() -> None:
    assert "candidate is best" in page(usual()).text
    broken = ratio({"control": 6172, "candidate": 5000}, {"control": 5586.0, "candidate": 5586.0}, 1e-9)
    assert not [text for text in page(replace(usual(), sample_ratio=broken)).text if text.endswith("is best")]


def test_what_answered_is_named_as_its_arm_names_it() -> None:
    served = (
        ServedFigures("control", "a" * 64, "local", 3, 2, 0.5, "v1"),
        ServedFigures("candidate", "b" * 64, "local", 3, 2, 0.5),
    )
    text = page(replace(usual(), served=served)).text
    assert text[text.index("Of the arm's") :].count("v1") == 1
    assert "b" * 12 in text


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing() -> None:
    text = page_of(usual(), record(), [START])
    assert "://" not in text
    found = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in found.elements}
    assert not [attributes for _, attributes in found.elements if {"src", "href", "style", "onload"} & set(attributes)]


def test_whatever_people_named_is_escaped() -> None:
    nasty = '<script>alert("x")</script>'
    arms = ["control", nasty]
    hostile = experiment(arms, description=nasty, metric=nasty)
    decision = metric({nasty: (0.041, 0.012, 0.070)}, name=nasty)
    guarded = guardrail({nasty: (1.0, -2.0, 3.0)}, {nasty: "held"})
    served = (ServedFigures(nasty, "a" * 64, nasty, 3, 2, 0.5),)
    event = ExperimentEvent(2, "experiment.reweight", nasty, {"why": nasty}, STARTED, nasty)
    found = page(figures(decision, guarded, served=served), [event], of=hostile, started_by=nasty)
    assert found.named("script") == []
    assert "".join(found.text).count(nasty) > 10
    assert nasty not in page_of(figures(decision, served=served), record(hostile), [event])


def test_little_data_is_drawn_without_bounds_and_none_without_plots() -> None:
    few = page(figures(metric({"candidate": (0.1, *UNBOUNDED)}, units=12), moments=1))
    assert "nan" not in "".join(str(value) for _, attributes in few.elements for value in attributes.values())
    assert few.named("polygon") == []
    nothing = figures(
        metric({"candidate": None}, units=0),
        moments=0,
        served=(),
        sample_ratio=ratio({"control": 0, "candidate": 0}, {"control": 0.0, "candidate": 0.0}),
    )
    text = " ".join(page(nothing, []).text)
    assert text.count("No unit has a value yet") == 2
    assert "As served" not in text


def test_a_mismatch_and_the_end_of_an_experiment_are_seen() -> None:
    uneven = ratio({"control": 4800, "candidate": 5200}, {"control": 5000, "candidate": 5000}, 1e-6)
    text = " ".join(page(figures(metric({"candidate": (0.1, 0.0, 0.2)}), sample_ratio=uneven)).text)
    assert "Do not read this yet" in text
    assert "Mismatch: p < 0.0001" in text
    assert "4,800 of 5,000" in text
    ended = page(usual(), state="promoted", winner="candidate", ended_at=STARTED + timedelta(days=3), ended_by="boris")
    assert "ended 5 November 2026, 09:00 UTC" in " ".join(ended.text)


def test_labels_of_lines_that_end_together_do_not_cover_each_other() -> None:
    arms = {f"arm-{place}": (0.02 + place / 1000, -0.02, 0.06) for place in range(6)}
    found = page(figures(metric(arms, units=500)))
    labels = [
        float(str(attributes["y"]))
        for attributes in found.named("text")
        if str(attributes["class"]).startswith("name") and attributes["text-anchor"] == "start"
    ]
    lifts, means = sorted(labels[:6]), sorted(labels[6:])
    assert len(means) == 7
    for levels in (lifts, means):
        assert all(lower - upper >= 14.9 for upper, lower in pairwise(levels))
        assert levels[0] >= 0.0
        assert levels[-1] <= 250.0


@pytest.mark.parametrize(
    ("hours", "labels"),
    [
        (3, ["09:00", "10:00", "11:00", "12:00"]),
        (30, ["12:00", "18:00", "3 Nov", "06:00", "12:00"]),
        (24 * 20, ["3 Nov", "7 Nov", "11 Nov", "15 Nov", "19 Nov"]),
    ],
)
def test_times_are_marked_where_they_are_round(hours: int, labels: list[str]) -> None:
    end_ms = STARTED_MS + hours * HOUR_MS
    series = [Series("a", 1, [(at_ms, Interval(0.1, 0.0, 0.2), "") for at_ms in (STARTED_MS, end_ms)])]
    drawn = str(over_time("plot", "title", "description", series, STARTED_MS, end_ms))
    assert re.findall(r'text-anchor="middle">([^<]*)<', drawn) == labels
    assert re.findall(r'text-anchor="end">([^<]*)<', drawn) == ["0.00", "0.05", "0.10", "0.15", "0.20"]
