"""What rules decide, of figures and health that are given as values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_store.canonical import canonical_json
from prompt_store.experiments.records import ExperimentEvent, ExperimentRecord
from prompt_store.ledger.sums import MinuteHealth
from service.experiments.decisions import (
    MINUTE_MS,
    Block,
    Promote,
    Resume,
    Reweight,
    RollBack,
    Stop,
    health_since_ms,
    judge,
    rests_on_figures,
    roll_back,
    was_said,
)
from service.experiments.figures import Direction, Figures
from tests.service.experiments.figured import (
    STARTED,
    STARTED_MS,
    UNBOUNDED,
    experiment,
    figures,
    guardrail,
    metric,
    ratio,
    record,
)

NOW_MS = STARTED_MS + 3 * 60 * MINUTE_MS + 17_000
LAST = NOW_MS // MINUTE_MS - 2
BETTER, WORSE, EITHER = (0.04, 0.01, 0.07), (-0.04, -0.07, -0.01), (0.01, -0.02, 0.04)
THREE = ("control", "one", "two")
MISMATCH = ratio({"control": 1000, "candidate": 800}, {"control": 900.0, "candidate": 900.0}, 1e-5)

Lift = tuple[float, float, float]


def ruled(arms: Sequence[str] = ("control", "candidate"), **rules: Any) -> ExperimentRecord:
    return record(experiment(arms, rules=rules))


def sampled(
    arms: Sequence[str] = ("control", "candidate"), floor: float = 0.05, weights: Mapping[str, float] | None = None
) -> ExperimentRecord:
    """An experiment with Thompson sampling every hour, which started three hours ago."""
    of = experiment(arms, thompson={"floor": floor})
    return record(of, weights=weights) if weights is not None else record(of)


def decided(of: ExperimentRecord, known: Figures, *history: ExperimentEvent) -> Any:
    return judge(of, known, history, NOW_MS)


def event(what: str, /, minutes_ago: float = 0.0, **details: Any) -> ExperimentEvent:
    at = datetime.fromtimestamp(NOW_MS / 1000, UTC) - timedelta(minutes=minutes_ago)
    return ExperimentEvent(1, f"experiment.{what}", "", details, at, "service")


def minute(
    arm: str, number: int = LAST, *, requests: int = 100, errors: int = 1, p95: float | None = 300.0
) -> MinuteHealth:
    return MinuteHealth(arm, number, requests, errors, p95)


def five(**candidate: Any) -> list[MinuteHealth]:
    """The last five settled minutes of a control as it should be, and of a candidate."""
    minutes = range(LAST - 4, LAST + 1)
    return [
        each for number in minutes for each in (minute("control", number), minute("candidate", number, **candidate))
    ]


# Promotion


def test_an_arm_whose_lift_is_surely_above_zero_is_promoted_with_what_caused_it() -> None:
    decision = decided(ruled(promote=True), figures(metric({"candidate": BETTER})))
    assert isinstance(decision, Promote)
    assert decision.arm == "candidate"
    assert "4.0 points higher with candidate than with control" in decision.reason
    assert "after 2,000 units" in decision.reason
    (numbers,) = decision.numbers["metrics"].values()
    assert [arm["lift"] for arm in numbers["arms"]] == [None, {"estimate": 0.04, "low": 0.01, "high": 0.07}]
    assert decision.numbers["sample_ratio"]["e_value"] == 1.0
    assert decision.numbers["alpha"] == 0.05


@pytest.mark.parametrize("low", [0.0, -0.001])
def test_a_lift_that_may_be_zero_promotes_nothing(low: float) -> None:
    assert decided(ruled(promote=True), figures(metric({"candidate": (0.04, low, 0.08)}))) is None


def test_nothing_is_promoted_without_the_rule() -> None:
    known = figures(metric({"candidate": BETTER}))
    assert decided(ruled(), known) is None
    assert decided(ruled(futile_below=0.01), known) is None


@pytest.mark.parametrize(("lift", "promoted"), [((-30.0, -50.0, -10.0), True), ((30.0, 10.0, 50.0), False)])
def test_of_a_metric_to_minimise_less_is_better(lift: Lift, promoted: bool) -> None:
    known = figures(metric({"candidate": lift}, direction="minimise", base=800.0, boolean=False))
    assert isinstance(decided(ruled(promote=True), known), Promote) == promoted


@pytest.mark.parametrize(("direction", "sign"), [("maximise", 1.0), ("minimise", -1.0)])
def test_of_several_better_arms_the_one_whose_lift_is_surely_greatest_is_promoted(
    direction: Direction, sign: float
) -> None:
    one, two = (0.09, 0.01, 0.17), (0.05, 0.03, 0.07)
    lifts = {
        arm: (sign * lift[0], min(sign * lift[1], sign * lift[2]), max(sign * lift[1], sign * lift[2]))
        for arm, lift in (("one", one), ("two", two))
    }
    decision = decided(ruled(THREE, promote=True), figures(metric(lifts, direction=direction)))
    assert isinstance(decision, Promote)
    assert decision.arm == "two"
    assert [arm["arm"] for arm in decision.numbers["metrics"]["helpful"]["arms"]] == ["control", "two"]


def test_an_arm_is_promoted_though_nothing_is_known_of_another() -> None:
    decision = decided(ruled(THREE, promote=True), figures(metric({"one": None, "two": BETTER})))
    assert isinstance(decision, Promote)
    assert decision.arm == "two"


@pytest.mark.parametrize("state", ["open", "violated"])
def test_an_arm_with_a_guardrail_that_is_not_held_is_passed_over(state: Any) -> None:
    lifts = {"one": BETTER, "two": (0.03, 0.005, 0.055)}
    limit = guardrail({"one": (0.0, -9.0, 9.0), "two": (0.0, -9.0, 9.0)}, {"one": state, "two": "held"})
    decision = decided(ruled(THREE, promote=True), figures(metric(lifts), limit))
    assert isinstance(decision, Promote)
    assert decision.arm == "two"
    assert decision.numbers["metrics"]["latency_ms"]["states"] == {"one": state, "two": "held"}
    alone = guardrail({"candidate": (0.0, -9.0, 9.0)}, {"candidate": state})
    assert decided(ruled(promote=True), figures(metric({"candidate": BETTER}), alone)) is None


def test_the_rules_wait_for_so_many_units() -> None:
    better, worse = (metric({"candidate": lift}, units=99) for lift in (BETTER, WORSE))
    assert decided(ruled(promote=True), figures(better)) is None
    assert decided(ruled(futile_below=0.01), figures(worse)) is None
    assert isinstance(decided(ruled(promote=True, minimum_units=99), figures(better)), Promote)
    assert isinstance(decided(ruled(futile_below=0.01, minimum_units=99), figures(worse)), Stop)


# Sample ratio


def test_a_sample_ratio_mismatch_blocks_promotion_and_says_so() -> None:
    decision = decided(ruled(promote=True), figures(metric({"candidate": BETTER}), sample_ratio=MISMATCH))
    assert isinstance(decision, Block)
    assert decision.arm == "candidate"
    assert "promotion of candidate blocked by sample-ratio mismatch" in decision.reason
    assert "55.6 to 44.4 where 50 to 50 was drawn" in decision.reason
    assert decision.numbers["sample_ratio"]["mismatch"] is True


def test_a_sample_ratio_mismatch_also_blocks_what_else_rests_on_the_figures() -> None:
    for of, lift in ((ruled(futile_below=0.01), WORSE), (sampled(), BETTER)):
        decision = decided(of, figures(metric({"candidate": lift}), sample_ratio=MISMATCH))
        assert isinstance(decision, Block)
        assert decision.arm is None
        assert "promotion blocked by sample-ratio mismatch" in decision.reason


def test_who_has_no_rule_is_told_of_no_mismatch() -> None:
    of = ruled(roll_back={"error_rate_by": 0.1})
    assert not rests_on_figures(of)
    assert decided(of, figures(metric({"candidate": BETTER}), sample_ratio=MISMATCH)) is None


def test_a_mismatch_is_said_once_and_again_where_it_changes() -> None:
    of, lifts = ruled(promote=True), ({"candidate": EITHER}, {"candidate": BETTER})
    vague, sure = (decided(of, figures(metric(each), sample_ratio=MISMATCH)) for each in lifts)
    said = event("recommend", action="block", **vague.numbers)
    assert not was_said(vague, [])
    assert was_said(vague, [event("reweight"), said])
    assert not was_said(sure, [said])
    assert was_said(sure, [event("recommend", action="block", **sure.numbers), said])


def test_that_a_mismatch_passed_is_said_once() -> None:
    of, known = ruled(promote=True), figures(metric({"candidate": EITHER}))
    block = event("recommend", action="block", arm=None)
    resumed = decided(of, known, block)
    assert isinstance(resumed, Resume)
    assert decided(of, known, event("recommend", action="resume"), block) is None
    assert isinstance(decided(of, figures(metric({"candidate": BETTER})), block), Promote)


# Futility


def test_an_experiment_is_stopped_once_no_arm_can_reach_what_would_matter() -> None:
    decision = decided(ruled(THREE, futile_below=0.02), figures(metric({"one": WORSE, "two": (0.0, -0.019, 0.019)})))
    assert isinstance(decision, Stop)
    assert decision.reason.startswith("no arm can be better than control by 2 points; ")
    assert decision.numbers["futile_below"] == 0.02
    assert [arm["arm"] for arm in decision.numbers["metrics"]["helpful"]["arms"]] == ["control", "one", "two"]


@pytest.mark.parametrize("other", [(0.0, -0.02, 0.02), (0.0, *UNBOUNDED), None])
def test_an_arm_that_may_still_reach_it_keeps_an_experiment_going(other: Lift | None) -> None:
    assert decided(ruled(THREE, futile_below=0.02), figures(metric({"one": WORSE, "two": other}))) is None


@pytest.mark.parametrize(("lift", "stopped"), [((30.0, 10.0, 50.0), True), ((-30.0, -50.0, -10.0), False)])
def test_of_a_metric_to_minimise_it_is_futile_to_wait_for_more(lift: Lift, stopped: bool) -> None:
    known = figures(metric({"candidate": lift}, direction="minimise", base=800.0, boolean=False))
    assert isinstance(decided(ruled(futile_below=5.0), known), Stop) == stopped


def test_an_arm_that_is_surely_better_by_too_little_is_promoted_rather_than_stopped() -> None:
    known = figures(metric({"candidate": (0.01, 0.005, 0.015)}))
    assert isinstance(decided(ruled(promote=True, futile_below=0.02), known), Promote)
    assert isinstance(decided(ruled(futile_below=0.02), known), Stop)


# Thompson sampling


def test_weights_follow_the_probability_of_being_best_with_a_floor() -> None:
    decision = decided(sampled(THREE, floor=0.15), figures(metric({"one": EITHER, "two": EITHER})))
    assert isinstance(decision, Reweight)
    assert decision.weights == pytest.approx({"control": 0.15, "one": 0.425, "two": 0.425})
    assert decision.numbers["best"] == {"control": 0.1, "one": 0.45, "two": 0.45}
    assert decision.numbers["before"] == pytest.approx({"control": 1 / 3, "one": 1 / 3, "two": 1 / 3})
    assert "control 10.0%, one 45.0%, two 45.0%" in decision.reason


@pytest.mark.parametrize(("minutes_ago", "due"), [(59.9, False), (60.0, True)])
def test_weights_change_every_so_many_minutes_since_they_did_last(minutes_ago: float, due: bool) -> None:
    known = figures(metric({"candidate": EITHER}))
    before = event("reweight", 90.0)
    assert isinstance(decided(sampled(), known, event("reweight", minutes_ago), before), Reweight) == due
    recommended = event("recommend", minutes_ago, action="reweight", weights={"control": 0.5, "candidate": 0.5})
    assert isinstance(decided(sampled(), known, recommended, before), Reweight) == due


def test_weights_wait_after_the_start_too() -> None:
    of, known = sampled(), figures(metric({"candidate": EITHER}))
    assert judge(of, known, (), STARTED_MS + 60 * MINUTE_MS - 1) is None
    assert isinstance(judge(of, known, (), STARTED_MS + 60 * MINUTE_MS), Reweight)
    assert of.started_at == STARTED


def test_weights_that_would_hardly_change_stay() -> None:
    known = figures(metric({"candidate": EITHER}))
    assert decided(sampled(weights={"control": 0.109, "candidate": 0.891}), known) is None
    assert isinstance(decided(sampled(weights={"control": 0.111, "candidate": 0.889}), known), Reweight)


def test_weights_stay_while_it_cannot_be_said_which_arm_is_best() -> None:
    assert decided(sampled(THREE), figures(metric({"one": EITHER, "two": None}))) is None


def test_weights_that_were_recommended_are_so_again_once_they_differ() -> None:
    decision = decided(sampled(), figures(metric({"candidate": EITHER})))
    for control, said in ((0.1, True), (0.105, True), (0.2, False)):
        weights = {"control": control, "candidate": 1.0 - control}
        assert was_said(decision, [event("recommend", action="reweight", weights=weights)]) == said


# Recommendations


def test_a_recommendation_is_repeated_only_after_another_one() -> None:
    of = ruled(THREE, promote=True, dry_run=True)
    one, two = (decided(of, figures(metric({arm: BETTER}))) for arm in ("one", "two"))
    said_one, said_two = (event("recommend", action="promote", **each.numbers) for each in (one, two))
    assert was_said(one, [said_one])
    assert not was_said(two, [said_one])
    assert not was_said(one, [said_two, said_one])
    assert not was_said(one, [event("start")])


# Rolling back


@pytest.mark.parametrize(
    ("rule", "candidate", "harm"),
    [
        ({"error_rate_by": 0.05}, {"errors": 7}, True),
        ({"error_rate_by": 0.05}, {"errors": 6}, False),
        ({"p95_latency_by": 0.5}, {"p95": 451.0}, True),
        ({"p95_latency_by": 0.5}, {"p95": 450.0}, False),
        ({"p95_latency_by": 0.5}, {"errors": 100, "p95": None}, False),
        ({"error_rate_by": 0.05}, {"p95": 9000.0}, False),
        ({"error_rate_by": 0.05, "p95_latency_by": 0.5}, {"p95": 451.0}, True),
        ({"error_rate_by": 0.05, "minimum_requests": 100}, {"errors": 50}, True),
        ({"error_rate_by": 0.05, "minimum_requests": 101}, {"errors": 50}, False),
    ],
)
def test_an_arm_that_fails_more_or_is_slower_than_allowed_is_rolled_back(
    rule: dict[str, Any], candidate: dict[str, Any], harm: bool
) -> None:
    decision = roll_back(ruled(roll_back=rule), five(**candidate), NOW_MS)
    assert (decision is not None) == harm


def test_a_roll_back_says_what_caused_it() -> None:
    decision = roll_back(ruled(roll_back={"error_rate_by": 0.05}), five(errors=12, p95=None), NOW_MS)
    assert isinstance(decision, RollBack)
    assert decision.arm == "candidate"
    assert decision.reason == (
        "in each of 5 minutes until 11:59 UTC candidate went beyond what is allowed: of candidate 12.0% failed, of "
        "control 1.0% failed and p95 latency was up to 300 ms"
    )
    assert decision.numbers["rule"] == {"error_rate_by": 0.05, "minutes": 5, "minimum_requests": 20}
    assert decision.numbers["minutes"]["candidate"][-1] == {
        "at_ms": LAST * MINUTE_MS,
        "arm": {"requests": 100, "errors": 12, "error_rate": 0.12, "p95_latency_ms": None},
        "control": {"requests": 100, "errors": 1, "error_rate": 0.01, "p95_latency_ms": 300.0},
    }


def test_an_arm_is_rolled_back_in_spite_of_a_sample_ratio_mismatch_and_of_its_lift() -> None:
    of = ruled(promote=True, roll_back={"error_rate_by": 0.05})
    known = figures(metric({"candidate": BETTER}), sample_ratio=MISMATCH)
    assert isinstance(roll_back(of, five(errors=12), NOW_MS) or decided(of, known), RollBack)


def test_minutes_that_are_bad_in_different_ways_count_together() -> None:
    of = ruled(roll_back={"error_rate_by": 0.05, "p95_latency_by": 0.5, "minutes": 2})
    health = [
        *(minute("control", number) for number in (LAST - 1, LAST)),
        minute("candidate", LAST - 1, errors=50),
        minute("candidate", LAST, p95=900.0),
    ]
    assert isinstance(roll_back(of, health, NOW_MS), RollBack)


def test_the_control_and_the_experiments_without_the_rule_are_never_rolled_back() -> None:
    bad_control = [minute(each.arm, each.minute, errors=90 if each.arm == "control" else 1) for each in five()]
    assert roll_back(ruled(roll_back={"error_rate_by": 0.05}), bad_control, NOW_MS) is None
    assert roll_back(ruled(promote=True), five(errors=90), NOW_MS) is None


def test_the_current_minute_and_the_one_before_are_left_out() -> None:
    of = ruled(roll_back={"error_rate_by": 0.05, "minutes": 1})
    for number, harm in ((LAST + 2, False), (LAST + 1, False), (LAST, True), (LAST - 1, False)):
        health = [minute("control", number), minute("candidate", number, errors=90)]
        assert (roll_back(of, health, NOW_MS) is not None) == harm
    start_ms = NOW_MS // MINUTE_MS * MINUTE_MS
    health = [minute("control"), minute("candidate", errors=90)]
    assert roll_back(of, health, start_ms - 1) is None
    assert roll_back(of, health, start_ms) is not None
    assert roll_back(of, health, start_ms + MINUTE_MS) is None


def test_all_that_the_rule_looks_at_is_read() -> None:
    rule = ruled(roll_back={"error_rate_by": 0.05, "minutes": 5}).experiment.rules.roll_back
    assert rule is not None
    assert health_since_ms(rule, NOW_MS) == (LAST - 4) * MINUTE_MS


def test_one_bad_arm_of_three_rolls_the_whole_experiment_back() -> None:
    of = ruled(THREE, roll_back={"error_rate_by": 0.05, "minutes": 1})
    health = [minute("control"), minute("one"), minute("two", errors=90)]
    decision = roll_back(of, health, NOW_MS)
    assert isinstance(decision, RollBack)
    assert decision.arm == "two"
    both = roll_back(of, [minute("control"), minute("one", errors=50), minute("two", errors=90)], NOW_MS)
    assert isinstance(both, RollBack)
    assert list(both.numbers["minutes"]) == ["one", "two"]
    assert "one and two went beyond" in both.reason


@given(st.integers(0, 4), st.sampled_from(["control", "candidate"]), st.sampled_from(["absent", "thin", "good"]))
def test_one_minute_that_is_good_or_says_nothing_breaks_the_run(place: int, arm: str, how: str) -> None:
    of = ruled(roll_back={"error_rate_by": 0.05})
    health = five(errors=50)
    assert roll_back(of, health, NOW_MS) is not None
    at = next(i for i, each in enumerate(health) if (each.arm, each.minute) == (arm, LAST - place))
    if how == "absent":
        del health[at]
    elif how == "thin":
        health[at] = minute(arm, LAST - place, requests=19, errors=0 if arm == "control" else 19)
    else:
        errors = 46 if arm == "control" else 1
        health[at] = minute(arm, LAST - place, errors=errors)
    assert roll_back(of, health, NOW_MS) is None


# Properties


@st.composite
def lifts(draw: st.DrawFn) -> Lift:
    estimate, below, above = draw(st.floats(-1.0, 1.0)), draw(st.floats(0.0, 1.0)), draw(st.floats(0.0, 1.0))
    if draw(st.booleans()):
        below = above = math.inf
    return (estimate, estimate - below, estimate + above)


def mirrored(lift: Lift) -> Lift:
    return (-lift[0], -lift[2], -lift[1])


@given(lifts(), lifts(), st.booleans(), st.sampled_from([None, 0.01, 0.5]))
def test_what_is_decided_does_not_depend_on_which_way_a_metric_counts(
    one: Lift, two: Lift, promote: bool, futile_below: float | None
) -> None:
    of = ruled(THREE, promote=promote, futile_below=futile_below)
    up = decided(of, figures(metric({"one": one, "two": two}), moments=1))
    turned = {"one": mirrored(one), "two": mirrored(two)}
    down = decided(of, figures(metric(turned, direction="minimise"), moments=1))
    assert type(up) is type(down)
    assert getattr(up, "arm", None) == getattr(down, "arm", None)
    if isinstance(up, Promote):
        assert promote
        assert {"one": one, "two": two}[up.arm][1] == max(one[1], two[1]) > 0.0
    if isinstance(up, Stop):
        assert futile_below is not None
        assert max(one[2], two[2]) < futile_below


@given(lifts(), lifts(), st.sampled_from([0.01, 0.1, 1 / 3]), st.booleans())
def test_the_numbers_of_every_decision_are_json(one: Lift, two: Lift, floor: float, mismatch: bool) -> None:
    sample_ratio = ratio({"control": 9, "one": 5, "two": 5}, {"control": 6.0, "one": 6.5, "two": 6.5}, 1e-5)
    more = {"sample_ratio": sample_ratio} if mismatch else {}
    known = figures(metric({"one": one, "two": two}), moments=1, **more)
    for of in (ruled(THREE, promote=True), ruled(THREE, futile_below=0.5), sampled(THREE, floor)):
        decision = decided(of, known)
        assert isinstance(decision, Block) or not mismatch
        if decision is not None:
            canonical_json(dict(decision.numbers))
        if isinstance(decision, Reweight):
            assert math.fsum(decision.weights.values()) == pytest.approx(1.0)
            assert min(decision.weights.values()) >= floor - 1e-9
            assert decision.weights.keys() == of.weights.keys()
