"""What an experiment is refused for, with the fact and the remedy."""

from datetime import date
from typing import Any

import pytest

from prompt_store.errors import InvalidExperiment, UnknownTask
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.version import RemoteModelPayload
from tests.prompt_store.building import ANNA, LOCAL, OPENAI, publish, task
from tests.prompt_store.experiments.stage import (
    TASK,
    apply,
    bound,
    experiment,
    fallback,
    leaf,
    refusal,
    split,
)


def arms(**new: Any) -> list[dict[str, Any]]:
    return [{"name": "old", "weight": 0.5}, {"name": "new", "weight": 0.5, **new}]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": arms(version="v9")},
         "arms[1].version: task 'support_intents' has no version 'v9'; did you mean 'v3'?"),
        ({"arms": arms(version="canditate")},
         "arms[1].version: task 'support_intents' has no version 'canditate'; did you mean 'candidate'?"),
        ({"alias": "candidate"},
         "arms[1].version: no leaf of the task's route names the alias 'candidate', in whose place 'v2' would answer "
         "(they name production); set `alias` to one of them, or give the arm a route"),
        ({"arms": arms(route=leaf("v3", "local"))},
         "arms[1].route.backend: backend 'local' does not serve v3, a model at provider 'openai'; use openai"),
        ({"arms": arms(route=fallback(leaf("v1"), leaf("v8")))},
         "arms[1].route.routes[1].version: task 'support_intents' has no version 'v8'; did you mean 'v3'?"),
        ({"arms": arms(route=split("inner"))},
         "arms[1]: arm 'new' contains the split 'inner', and a request belongs to one arm; give the arm a route "
         "without a split"),
        ({"metric": "acuracy"}, "metric: task 'support_intents' has no metric 'acuracy'; did you mean 'accuracy'?"),
        ({"metric": "remark"},
         "metric: the values of 'remark' are text, of which there is no mean; name another metric"),
        ({"guardrails": [{"metric": "demonstration"}]}, "guardrails[0].metric: the values of 'demonstration' are text"),
        ({"guardrails": [{"metric": "latency"}]}, "guardrails[0].metric: task 'support_intents' has no metric"),
        ({"metrics": ["cost", "helpfull"]}, "metrics[1]: task 'support_intents' has no metric 'helpfull'; did"),
        ({"judge": {"task": "jugde", "metric": "helpful"}}, "judge.task: no task 'jugde'; did you mean 'judge'?"),
        ({"judge": {"task": TASK, "metric": "helpful", "scores": {"refund": 1, "delivery": 0}}},
         "judge.task: task 'support_intents' has the inputs message and would be asked with answer, message; give it "
         "those"),
        ({"judge": {"task": "judge", "metric": "cost", "scores": {"good": 1, "bad": 0}}},
         "judge.metric: 'cost' is measured by the service itself; add a metric to the task for what the judge says"),
        ({"judge": {"task": "judge", "metric": "helpful", "scores": {"godo": 1, "bad": 0}}},
         "judge.scores.godo: task 'judge' has no label 'godo'; did you mean 'good'?"),
        ({"judge": {"task": "judge", "metric": "helpful", "scores": {"bad": 0}}},
         "judge.scores: the labels 'good' of task 'judge' are no numbers and have no score; give each one"),
        ({"judge": {"task": "judge", "metric": "helpful", "version": "v1", "scores": {"good": 1, "bad": 0}}},
         "judge.version: task 'judge' has no version 'v1'; list them with `softcue prompts list judge`"),
        ({"arms": None},
         "arms: the route of task 'support_intents' has no split 'tone' to be on; give the experiment arms, or apply a "
         "route with a split of that name first"),
    ],
)  # fmt: skip
def test_what_an_experiment_names_must_be_there_and_fit(stage: Registry, changes: dict[str, Any], says: str) -> None:
    assert says in refusal(stage, experiment(**changes))


def test_every_problem_is_told_at_once_each_at_its_place(stage: Registry) -> None:
    wanted = experiment(
        metric="x", guardrails=[{"metric": "remark"}], arms=arms(version="v7"), judge={"task": "none", "metric": "y"}
    )
    with pytest.raises(InvalidExperiment) as caught:
        stage.start_experiment(wanted, ANNA)
    places = [problem.place for problem in caught.value.problems]
    assert places == [
        ("metric",), ("guardrails", 0, "metric"), ("judge", "metric"), ("judge", "task"), ("arms", 1, "version"),
    ]  # fmt: skip
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)


def test_an_unknown_task_names_the_nearest(stage: Registry) -> None:
    with pytest.raises(UnknownTask, match="did you mean 'support_intents'"):
        stage.start_experiment(experiment(task="support_intent"), ANNA)


def test_a_second_experiment_on_a_task_is_refused_saying_which_runs_and_how_to_end_it(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    for wanted in (experiment(name="warmth"), bound(name="warmth")):
        said = refusal(stage, wanted)
        assert "experiment 'tone' runs on the route of task 'support_intents'" in said
        assert "end it first with `softcue experiments stop tone`" in said


def test_a_name_is_used_once_in_a_store(stage: Registry) -> None:
    stage.apply_task(task("other"), ANNA)
    stage.start_experiment(experiment(), ANNA)
    assert "there is an experiment 'tone' already, on task 'support_intents'; it runs." in refusal(stage, experiment())
    stage.stop_experiment("tone", ANNA)
    said = refusal(stage, experiment(task="other"))
    assert "it was stopped by anna at" in said
    assert "A name is used once, as it decides which units see which arm; choose another" in said


@pytest.mark.parametrize(
    ("applied", "changes", "says"),
    [
        (split("tome"), {},
         "arms: the route of task 'support_intents' has no split 'tone' to be on; did you mean 'tome'"),
        (split(), {"control": "odl"}, "control: the split 'tone' has no arm 'odl'; did you mean 'old'?"),
        (split("outer", old=split()), {}, "name: the split 'tone' lies in an arm of the split 'outer'"),
        (split(old=split("inner")), {}, "arm 'old' contains the split 'inner', and a request belongs to one arm"),
        (fallback(split(), split()), {}, "name: the route has 2 splits 'tone'; give each a name of its own"),
        ({"kind": "shadow", "primary": leaf("v1"), "shadow": split()}, {},
         "name: the split 'tone' lies in a shadow, whose answers nobody sees; put it where answers come from"),
    ],
)  # fmt: skip
def test_a_split_that_is_bound_must_be_there_and_stand_by_itself(
    stage: Registry, applied: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    apply(stage, applied)
    assert says in refusal(stage, bound(**changes))


def test_the_floor_is_held_against_the_arms_of_a_bound_split(stage: Registry) -> None:
    third = [{"name": "third", "weight": 0.25, "route": leaf("v3")}]
    two = split()["arms"]
    two[0]["weight"] = 0.25
    apply(stage, {"kind": "split", "experiment": "tone", "arms": [*two, *third]})
    assert "thompson.floor: a floor of 0.4 for 3 arms is more than there is" in refusal(
        stage, bound(thompson={"floor": 0.4})
    )


def test_an_owned_experiment_is_not_started_over_a_route_with_a_split(stage: Registry) -> None:
    apply(stage, fallback(split("inner"), leaf("v3")))
    assert "arms[0]: arm 'old' contains the split 'inner'" in refusal(stage, experiment())


def test_too_many_leaves_are_refused_with_the_remedy(stage: Registry) -> None:
    apply(stage, fallback(*[leaf("production")] * 16))
    names = [f"arm{index}" for index in range(5)]
    wanted = experiment(control="arm0", arms=[{"name": name, "weight": 0.2} for name in names])
    assert "a split of 5 arms over the task's route has too many leaves" in refusal(stage, wanted)


def test_without_a_known_backend_nothing_starts_unless_backends_are_given(registry: Registry) -> None:
    publish(registry, 1, alias="production")
    publish(registry, 2)
    assert "no backend is known, so the route cannot be checked" in refusal(registry, experiment())
    record = registry.start_experiment(experiment(), ANNA, backends=[LOCAL, OPENAI])
    assert record.state == "running"


def test_warnings_of_models_that_go_away_are_in_the_history(stage: Registry) -> None:
    gone = RemoteModelPayload(provider="openai", model="ft:gpt:acme::2")
    publish(stage, payload_content=gone, base_fingerprint=None)
    stage.note_shutdown(TASK, "v4", date(2020, 1, 1), ANNA)
    stage.start_experiment(experiment(arms=arms(version="v4")), ANNA)
    (warning,) = stage.experiment_history("tone")[0].details["warnings"]
    assert "was shut down on 2020-01-01" in warning
