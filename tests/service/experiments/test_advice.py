"""What an experiment's sentence says in each of its states."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from service.experiments.advice import advice_of, caveats_of, sentence_of
from tests.service.experiments.figured import (
    STARTED,
    UNBOUNDED,
    experiment,
    figures,
    guardrail,
    metric,
    ratio,
    record,
)

BETTER = (0.041, 0.012, 0.070)


def test_a_better_arm_with_held_guardrails_is_to_be_promoted() -> None:
    found = figures(
        metric({"candidate": BETTER}, units=6172), guardrail({"candidate": (1.0, -9.0, 11.0)}, {"candidate": "held"})
    )
    advice = advice_of(found, record())
    assert advice.verdict == "promote"
    assert advice.sentence == (
        "Promote candidate: helpful is 4.1 points higher with candidate than with control (95% confidence sequence "
        "1.2 to 7.0 higher) after 12,344 units, and latency_ms stays within a margin of 50 ms."
    )


def test_of_better_arms_the_best_that_keeps_its_guardrails_is_named() -> None:
    arms = {"first": (0.05, 0.01, 0.09), "second": (0.06, 0.02, 0.10), "third": (0.2, 0.1, 0.3)}
    times = guardrail(dict.fromkeys(arms, (1.0, -9.0, 11.0)), {"first": "held", "second": "held", "third": "violated"})
    assert sentence_of(figures(metric(arms), times), record()).startswith("Promote second: ")


def test_an_arm_that_may_be_promoted_is_named_though_another_that_may_not_yet_looks_better() -> None:
    arms = {"first": (0.09, 0.01, 0.17), "second": (0.05, 0.03, 0.07)}
    for state in ("open", "held"):
        times = guardrail(dict.fromkeys(arms, (1.0, -9.0, 11.0)), {"first": state, "second": "held"})
        assert sentence_of(figures(metric(arms), times), record()).startswith("Promote second: ")


def test_an_open_guardrail_or_too_few_units_hold_a_promotion_back() -> None:
    unsettled = figures(
        metric({"candidate": BETTER}), guardrail({"candidate": (20.0, -40.0, 80.0)}, {"candidate": "open"})
    )
    advice = advice_of(unsettled, record())
    assert advice.verdict == "continue"
    assert advice.sentence.endswith("but it is not settled yet that latency_ms stays within a margin of 50 ms.")
    patient = record(experiment(rules={"minimum_units": 5000}))
    said = sentence_of(figures(metric({"candidate": BETTER})), patient)
    assert said.endswith("but an arm has 1,000 units of the 5,000 that it should have.")


def test_a_breach_by_every_arm_stops_though_the_metric_is_better() -> None:
    slow = guardrail({"candidate": (130.0, 100.0, 160.0)}, {"candidate": "violated"})
    advice = advice_of(figures(metric({"candidate": BETTER}), slow), record())
    assert (advice.verdict, advice.sentence) == (
        "stop",
        "Stop: candidate makes latency_ms worse than a margin of 50 ms allows, so no arm may be promoted.",
    )


def test_a_mismatch_is_told_before_anything_else() -> None:
    uneven = ratio({"control": 4800, "candidate": 5200}, {"control": 5000, "candidate": 5000}, 1e-6)
    advice = advice_of(figures(metric({"candidate": BETTER}), sample_ratio=uneven), record())
    assert (advice.verdict, advice.sentence) == (
        "unreadable",
        "Do not read this yet: units came to arms as 48.0 to 52.0 where 50 to 50 was drawn (p < 0.0001); find the "
        "cause first.",
    )


@pytest.mark.parametrize(
    ("lift", "rules", "beginning"),
    [
        ((-0.05, -0.09, -0.01), {}, "Stop: no arm can be better than control; helpful is 5.0 points lower with"),
        (
            (0.0, -0.006, 0.008),
            {"futile_below": 0.01},
            "Stop: no arm can be better than control by 1 point; helpful is",
        ),
        ((0.01, -0.02, 0.04), {"futile_below": 0.01}, "Keep going: helpful is 1.0 points higher with candidate"),
    ],
)
def test_what_cannot_be_better_or_not_by_enough_is_stopped(
    lift: tuple[float, float, float], rules: dict[str, Any], beginning: str
) -> None:
    said = sentence_of(figures(metric({"candidate": lift})), record(experiment(rules=rules)))
    assert said.startswith(beginning)


def test_an_arm_of_which_nothing_is_known_yet_keeps_an_experiment_going() -> None:
    worse = {"first": (-0.05, -0.09, -0.01), "second": (0.1, *UNBOUNDED)}
    said = sentence_of(figures(metric(worse)), record())
    assert said.startswith("Keep going: ")
    assert said.endswith("but too little is known of second.")
    assert "too little is known of helpful after 2,000 units; every arm needs 100 with a value" in sentence_of(
        figures(metric({"candidate": (0.1, *UNBOUNDED)})), record()
    )
    assert sentence_of(figures(metric({"candidate": None}, units=0), moments=0), record()) == (
        "Keep going: no unit has come to an arm yet."
    )


def test_a_guardrail_without_a_margin_is_said_to_be_no_more_than_it_is() -> None:
    def said(state: str) -> str:
        times = guardrail({"candidate": (1.0, -9.0, 11.0)}, {"candidate": state}, margin=0.0)
        return sentence_of(figures(metric({"candidate": BETTER}), times), record())

    assert said("held").endswith(", and latency_ms is not seen to be worse.")
    assert said("open").endswith("but too little is known of latency_ms.")
    assert said("violated").startswith("Stop: candidate makes latency_ms worse, so no arm")


def test_each_breach_is_said_of_the_arm_that_makes_it() -> None:
    arms = {"first": BETTER, "second": (-0.05, -0.09, -0.01)}
    none = dict.fromkeys(arms, (1.0, -9.0, 11.0))
    times = guardrail(none, {"first": "violated", "second": "held"})
    costs = guardrail(none, {"first": "held", "second": "violated"}, name="cost", margin=0.0)
    assert sentence_of(figures(metric(arms), times, costs), record()) == (
        "Stop: first makes latency_ms worse than a margin of 50 ms allows and second makes cost worse, so no arm may "
        "be promoted."
    )
    assert sentence_of(figures(metric(arms), times), record()).startswith(
        "Stop: first makes latency_ms worse than a margin of 50 ms allows, and no other arm can be better than control;"
    )


def test_what_is_rounded_to_nothing_is_about_the_same() -> None:
    said = sentence_of(figures(metric({"candidate": (0.0001, -0.05, 0.05)})), record())
    assert "helpful is about the same with candidate as with control (95% confidence sequence 5.0 lower" in said


def test_nothing_is_stopped_or_promoted_on_what_may_mislead_without_a_word() -> None:
    patient = record(experiment(rules={"minimum_units": 5000}))
    worse = advice_of(figures(metric({"candidate": (-0.05, -0.09, -0.01)})), patient)
    assert worse.verdict == "continue"
    assert worse.sentence.endswith("but an arm has 1,000 units of the 5,000 that it should have.")
    missing = sentence_of(figures(metric({"candidate": BETTER}), missing_differs=True), record())
    assert missing.endswith("but first find out why arms differ in missing values.")


def test_a_sequence_across_zero_is_said_by_its_sides() -> None:
    said = sentence_of(figures(metric({"candidate": (0.012, -0.02, 0.044)})), record())
    assert (
        "1.2 points higher with candidate than with control (95% confidence sequence 2.0 lower to 4.4 higher)" in said
    )


def test_less_is_better_where_the_metric_is_minimised() -> None:
    times = {"name": "latency_ms", "base": 800.0, "direction": "minimise", "boolean": False}
    quick = sentence_of(figures(metric({"candidate": (-35.0, -60.0, -10.0)}, **times)), record())
    assert quick.startswith(
        "Promote candidate: latency_ms is 35 ms lower, which is better, with candidate than with control (95% "
        "confidence sequence 10 to 60 lower)"
    )
    slow = sentence_of(figures(metric({"candidate": (35.0, 10.0, 60.0)}, **times)), record())
    assert slow.startswith("Stop: no arm can be better than control; latency_ms is 35 ms higher, which is worse, with")


@pytest.mark.parametrize(
    ("state", "winner", "beginning"),
    [
        (
            "promoted",
            "candidate",
            "candidate was promoted on 7 November 2026 by boris: it is better. After 2,000 units",
        ),
        (
            "stopped",
            None,
            "Stopped on 7 November 2026 by boris: it is better. After 2,000 units, helpful was 4.1 points",
        ),
        ("rolled_back", None, "Rolled back to control on 7 November 2026 by boris: it is better. After"),
    ],
)
def test_an_ended_experiment_says_how(state: str, winner: str | None, beginning: str) -> None:
    ended = record(
        state=state, winner=winner, ended_at=STARTED + timedelta(days=5), ended_by="boris", reason="it is better."
    )
    uneven = ratio({"control": 4800, "candidate": 5200}, {"control": 5000, "candidate": 5000}, 1e-6)
    advice = advice_of(figures(metric({"candidate": BETTER}), sample_ratio=uneven), ended)
    assert advice.verdict == "ended"
    assert advice.sentence.startswith(beginning)


def test_an_experiment_that_ended_early_says_that_nothing_is_known() -> None:
    ended = record(state="stopped", ended_at=STARTED, ended_by="boris", reason="...")
    few = figures(metric({"candidate": (-0.1, *UNBOUNDED)}, units=14))
    assert sentence_of(few, ended) == (
        "Stopped on 2 November 2026 by boris. 28 units were too few to say anything of helpful."
    )


def test_a_mismatch_is_told_of_an_experiment_that_has_ended_too() -> None:
    uneven = ratio({"control": 4800, "candidate": 5200}, {"control": 5000, "candidate": 5000}, 1e-6)
    shown = figures(metric({"candidate": BETTER}), sample_ratio=uneven)
    assert caveats_of(shown) == ()  # the sentence says it
    (caveat,) = caveats_of(replace(shown, state="stopped"))
    assert caveat.startswith("No figure can be believed: units came to arms as 48.0 to 52.0")


def test_what_may_mislead_is_told_and_nothing_else() -> None:
    assert caveats_of(figures(metric({"candidate": BETTER}))) == ()
    found = caveats_of(
        figures(metric({"candidate": BETTER}), missing_differs=True, mixed=True, crossed=1, forced=2, held_out=3)
    )
    assert [caveat.split(" ")[0] for caveat in found] == ["Arms", "An", "1", "2", "3"]
    assert found[2].startswith("1 unit saw more than one arm")
    assert found[4] == "3 units were held out and saw no arm."
