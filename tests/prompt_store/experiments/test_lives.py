"""Whole lives of experiments: how they start, change and end."""

import math
from typing import Any

import pytest

from prompt_store.access import Principal
from prompt_store.errors import Conflict, InvalidExperiment, UnknownExperiment
from prompt_store.experiments.experiment import Experiment
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.snapshot import TaskSnapshot
from prompt_store.routing.routes import TaskRoute, parse_task_route
from tests.prompt_store.building import ANNA, BORIS, publish
from tests.prompt_store.consistency import assert_consistent
from tests.prompt_store.experiments.stage import TASK, apply, bound, experiment, fallback, leaf, route, split


def snapshot(registry: Registry) -> TaskSnapshot:
    return registry.snapshot().tasks[TASK]


def pointed_at(registry: Registry, alias: str = "production") -> str:
    return f"v{registry.alias(TASK, alias).number}"


def test_an_experiment_starts_with_its_split_pinned_to_numbers(stage: Registry) -> None:
    record = stage.start_experiment(experiment(), ANNA, reason="try it")
    assert (record.state, record.revision, record.started_by) == ("running", 1, "anna")
    assert record.weights == {"old": 0.5, "new": 0.5}
    assert record.versions == {"old": ("v1",), "new": ("v2",)}
    assert stage.route(TASK).route == route(split(old=leaf("v1"), new=leaf("v2")))
    (revision,) = stage.route_history(TASK)
    assert revision.reason == "experiment 'tone' started: try it"
    seen = snapshot(stage)
    assert seen.experiments == {"tone": experiment()}
    assert seen.allocations["tone"].number == 1
    assert seen.allocations["tone"].allocation.weights == {"old": 0.5, "new": 0.5}
    (started,) = stage.experiment_history("tone")
    assert (started.action, started.reason, started.principal) == ("experiment.start", "try it", "anna")
    assert started.details["versions"] == {"old": ["v1"], "new": ["v2"]}
    assert started.details["experiment"] == experiment().document()
    assert stage.experiments() == stage.experiments(TASK) == [stage.experiment("tone")] == [record]


def test_the_alias_may_move_while_an_experiment_runs_and_changes_no_arm(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    before = stage.route(TASK)
    stage.move_alias(TASK, "production", "v3", reason="", principal=ANNA)
    assert stage.route(TASK) == before
    stage.stop_experiment("tone", ANNA)
    assert pointed_at(stage) == "v3"


def test_reweighted_and_promoted_the_winner_answers_under_the_alias(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    first = snapshot(stage).allocations["tone"]
    record = stage.reweight_experiment("tone", {"old": 0.25, "new": 0.75}, BORIS, details={"best": {"new": 0.9}})
    assert (record.revision, record.weights) == (2, {"old": 0.25, "new": 0.75})
    second = snapshot(stage).allocations["tone"]
    assert (second.number, second.allocation.weights) == (2, record.weights)
    # Only a quarter of all units moved, and all of them to the arm that grew.
    assert [end for end, _ in first.allocation.parts] == [2**31, 2**32]
    assert [end for end, _ in second.allocation.parts] == [2**30, 2**32]
    record = stage.promote_arm("tone", "new", BORIS, reason="better", details={"lift": 0.1}, expected=2)
    assert (record.state, record.winner, record.revision) == ("promoted", "new", 3)
    assert (record.ended_by, record.reason) == ("boris", "better")
    assert record.ended_at is not None
    assert stage.route(TASK) == TaskRoute()
    assert pointed_at(stage) == "v2"
    move = stage.alias_history(TASK, "production")[-1]
    assert (move.reason, move.principal) == ("experiment 'tone' promoted arm 'new': better", "boris")
    assert snapshot(stage).experiments == snapshot(stage).allocations == {}
    promoted, reweighted, _ = stage.experiment_history("tone")
    assert promoted.details == {
        "arm": "new", "alias": "production", "version": "v2", "lift": 0.1, "route": "without the experiment's split",
    }  # fmt: skip
    assert reweighted.details["weights"] == {"old": 0.25, "new": 0.75}
    assert reweighted.details["before"] == {"old": 0.5, "new": 0.5}
    assert reweighted.details["best"] == {"new": 0.9}
    assert stage.experiment("tone").weights == {"old": 0.25, "new": 0.75}
    assert_consistent(stage.database.location)


@pytest.mark.parametrize(
    ("method", "state", "action"),
    [
        ("stop_experiment", "stopped", "experiment.stop"),
        ("roll_back_experiment", "rolled_back", "experiment.roll_back"),
    ],
)
def test_ended_without_a_winner_the_route_is_that_from_before(
    stage: Registry, method: str, state: str, action: str
) -> None:
    before = apply(stage, {"route": fallback(leaf("production"), leaf("v3")), "deadline_s": 4.0})
    stage.start_experiment(experiment(), ANNA)
    record = getattr(stage, method)("tone", ANNA, reason="enough", details={"bound": math.inf})
    assert (record.state, record.winner, record.reason) == (state, None, "enough")
    assert stage.route(TASK) == before
    assert pointed_at(stage) == "v1"
    event = stage.experiment_history("tone")[0]
    assert (event.action, event.details["bound"]) == (action, None)


def test_going_back_from_a_stopped_experiment_skips_its_split(stage: Registry) -> None:
    apply(stage, leaf("v1"))
    apply(stage, leaf("v2"))
    stage.start_experiment(experiment(arms=[arm("old"), arm("new", route=leaf("v3"))]), ANNA)
    stage.stop_experiment("tone", ANNA)
    assert stage.rollback_route(TASK, ANNA).revision.route == parse_task_route(leaf("v1"))


def arm(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "weight": 0.5, **changes}


def test_of_a_compound_route_only_the_leaves_of_the_alias_are_replaced(stage: Registry) -> None:
    before = apply(stage, fallback(leaf("production", "local"), leaf("candidate"), leaf("v3")))
    record = stage.start_experiment(experiment(), ANNA)
    assert record.versions == {"old": ("v1", "v2", "v3"), "new": ("v2", "v2", "v3")}
    old = fallback(leaf("v1", "local"), leaf("v2"), leaf("v3"))
    new = fallback(leaf("v2", "local"), leaf("v2"), leaf("v3"))
    assert stage.route(TASK).route == route(split(old=old, new=new))
    stage.promote_arm("tone", "new", ANNA)
    assert stage.route(TASK) == before
    assert pointed_at(stage) == "v2"


def test_a_promoted_control_takes_the_alias_back_to_what_it_was_measured_with(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    stage.move_alias(TASK, "production", "v3", reason="", principal=ANNA)
    stage.promote_arm("tone", "old", ANNA)
    assert pointed_at(stage) == "v1"


def test_a_promoted_route_stays_with_the_alias_in_the_place_of_its_version(stage: Registry) -> None:
    own = fallback(leaf("candidate"), leaf("production"), leaf("v3"))
    stage.start_experiment(experiment(arms=[arm("old"), arm("new", route=own)]), ANNA)
    stage.promote_arm("tone", "new", ANNA)
    assert pointed_at(stage) == "v2"
    # The second leaf named the alias when that was v1, which is what was measured.
    assert stage.route(TASK).route == route(fallback(leaf("production"), leaf("v1"), leaf("v3")))


def test_an_experiment_of_another_alias_moves_that(stage: Registry) -> None:
    apply(stage, leaf("candidate"))
    stage.start_experiment(experiment(alias="candidate", arms=[arm("old"), arm("new", version="v1")]), ANNA)
    stage.promote_arm("tone", "new", ANNA)
    assert (pointed_at(stage, "candidate"), pointed_at(stage)) == ("v1", "v1")


def test_a_bound_experiment_takes_the_split_of_its_name_and_keeps_its_units(stage: Registry) -> None:
    apply(stage, {"route": fallback(split(share=0.25), leaf("v3")), "deadline_s": 5.0})
    before = snapshot(stage).allocations["tone"]
    record = stage.start_experiment(bound(), ANNA)
    assert record.weights == {"old": 0.25, "new": 0.75}
    assert record.versions == {"old": ("v1",), "new": ("v2",)}
    pinned = fallback(split(old=leaf("v1"), new=leaf("v2"), share=0.25), leaf("v3"))
    assert stage.route(TASK).route == route(pinned)
    assert snapshot(stage).allocations["tone"] == before
    stage.stop_experiment("tone", ANNA)
    assert stage.route(TASK) == parse_task_route({"route": fallback(leaf("production"), leaf("v3")), "deadline_s": 5.0})


def test_the_winner_of_a_bound_experiment_takes_the_place_of_the_split(stage: Registry) -> None:
    apply(stage, fallback(split(), leaf("v3")))
    stage.start_experiment(bound(), ANNA)
    stage.promote_arm("tone", "new", ANNA)
    assert stage.route(TASK).route == route(fallback(leaf("production"), leaf("v3")))
    assert pointed_at(stage) == "v2"


def test_what_else_of_the_route_was_changed_meanwhile_stays(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    running = stage.route(TASK).route
    stage.apply_route(TASK, TaskRoute(route=running, deadline_s=3.0), ANNA)
    stage.stop_experiment("tone", ANNA)
    assert stage.route(TASK) == TaskRoute(deadline_s=3.0)


def test_weights_that_it_has_already_write_nothing(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    before = stage.snapshot().sequence
    record = stage.reweight_experiment("tone", {"new": 0.5, "old": 0.5}, ANNA)
    assert (record.revision, stage.snapshot().sequence) == (1, before)


def test_a_recommendation_is_written_down_and_changes_nothing_else(stage: Registry) -> None:
    started = stage.start_experiment(experiment(), ANNA)
    record = stage.recommend("tone", "promote", ANNA, reason="it would win", details={"arm": "new"}, expected=1)
    assert record.revision == 2
    assert (record.state, record.weights) == (started.state, started.weights)
    event = stage.experiment_history("tone")[0]
    assert (event.action, event.reason) == ("experiment.recommend", "it would win")
    assert event.details == {"action": "promote", "arm": "new"}


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"old": 0.5}, "no weight was given for 'new'; give one for every arm"),
        ({"old": 0.5, "new": 0.4, "nwe": 0.1}, "no arm 'nwe'; did you mean 'new'?"),
        ({"old": 0.5, "new": 0.6}, "the weights sum to 1.1; they must sum to 1"),
        ({"old": 1.0, "new": 0.0}, "arm 'new' cannot have the weight 0.0; give a share above 0"),
        ({"old": 0.5, "new": math.nan}, "arm 'new' cannot have the weight nan"),
    ],
)
def test_weights_must_be_of_every_arm_and_sum_to_one(stage: Registry, weights: dict[str, float], says: str) -> None:
    stage.start_experiment(experiment(), ANNA)
    with pytest.raises(InvalidExperiment) as caught:
        stage.reweight_experiment("tone", weights, ANNA)
    assert says in str(caught.value)
    assert stage.experiment("tone").revision == 1


def decisions(registry: Registry, expected: int | None, principal: Principal = ANNA) -> list[Any]:
    return [
        lambda: registry.stop_experiment("tone", principal, expected=expected),
        lambda: registry.roll_back_experiment("tone", principal, expected=expected),
        lambda: registry.promote_arm("tone", "new", principal, expected=expected),
        lambda: registry.reweight_experiment("tone", {"old": 0.1, "new": 0.9}, principal, expected=expected),
        lambda: registry.recommend("tone", "stop", principal, expected=expected),
    ]


def test_every_decision_expects_a_revision_and_says_which_there_is(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    for decide in decisions(stage, 7):
        with pytest.raises(Conflict, match="is at revision 1, and 7 was expected; look at what changed") as caught:
            decide()
        assert caught.value.current == "1"
    assert len(stage.experiment_history("tone")) == 1


def test_nothing_of_an_ended_experiment_changes_and_it_says_who_ended_it(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    stage.stop_experiment("tone", BORIS)
    for decide in decisions(stage, None):
        with pytest.raises(Conflict, match=r"was stopped by boris at .* UTC, so nothing about it changes any more"):
            decide()


def test_an_unknown_experiment_names_the_nearest(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    for ask in (stage.experiment, stage.experiment_history, lambda name: stage.stop_experiment(name, ANNA)):
        with pytest.raises(UnknownExperiment, match="no experiment 'tome'; did you mean 'tone'"):
            ask("tome")


def test_an_unknown_winner_names_the_nearest_and_ends_nothing(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    with pytest.raises(InvalidExperiment, match="experiment 'tone' has no arm 'neu'; did you mean 'new'"):
        stage.promote_arm("tone", "neu", ANNA)
    assert stage.experiment("tone").state == "running"


def test_those_that_started_last_are_listed_first(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    stage.stop_experiment("tone", ANNA)
    stage.start_experiment(experiment(name="warmth"), ANNA)
    assert [record.experiment.name for record in stage.experiments(TASK)] == ["warmth", "tone"]
    assert stage.experiments("judge") == []


def test_a_version_is_kept_while_an_experiment_needs_it_or_goes_back_to_it(stage: Registry) -> None:
    publish(stage, 4)
    apply(stage, leaf("v4"))
    stage.start_experiment(experiment(arms=[arm("old", route=leaf("v1")), arm("new", route=leaf("v3"))]), ANNA)
    for version, user in (("v3", "the route in force"), ("v4", "the route that experiment 'tone' goes back to")):
        with pytest.raises(Conflict, match=user):
            stage.delete_version(TASK, version, reason="", principal=ANNA)
    stage.stop_experiment("tone", ANNA)
    stage.delete_version(TASK, "v3", reason="", principal=ANNA)


def test_an_alias_that_an_experiment_goes_back_to_is_not_removed(stage: Registry) -> None:
    apply(stage, fallback(leaf("candidate"), leaf("v3")))
    stage.start_experiment(experiment(alias="candidate", arms=[arm("old"), arm("new", version="v1")]), ANNA)
    with pytest.raises(Conflict, match="named by the route that experiment 'tone' goes back to; end it first"):
        stage.remove_alias(TASK, "candidate", reason="", principal=ANNA)


def test_the_document_is_kept_as_it_was_given(stage: Registry) -> None:
    given: Experiment = experiment(holdout=0.1, targeting={"plan": ["pro"]}, thompson={"floor": 0.1})
    assert stage.start_experiment(given, ANNA).experiment == given
