"""What applying routes means for splits and running experiments, and what services see of it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from threading import Barrier

import pytest
from sqlalchemy import insert, text, update

from prompt_store.access import Principal
from prompt_store.errors import Conflict, InvalidRoute
from prompt_store.experiments.allocations import initial, reallocate
from prompt_store.experiments.records import NumberedAllocation
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.snapshot import TaskSnapshot
from prompt_store.prompts.unreadable import Unreadable
from prompt_store.routing.routes import TaskRoute, parse_task_route
from prompt_store.tables import allocations, experiments, route_revisions
from prompt_store.upkeep.verifying import verify
from tests.prompt_store import processes
from tests.prompt_store.building import ANNA, task
from tests.prompt_store.experiments.stage import TASK, apply, bound, experiment, fallback, leaf, split
from tests.prompt_store.processes import finished

PINNED = split(old=leaf("v1"), new=leaf("v2"))


def snapshot(registry: Registry) -> TaskSnapshot:
    return registry.snapshot().tasks[TASK]


def numbers(registry: Registry) -> dict[str, int]:
    return {name: found.number for name, found in snapshot(registry).allocations.items()}


def test_every_split_of_an_applied_route_is_allocated_also_nested_ones(stage: Registry) -> None:
    apply(stage, fallback(split("outer", old=split("inner", share=0.25)), leaf("v3")))
    seen = snapshot(stage).allocations
    assert seen.keys() == {"outer", "inner"}
    assert seen["outer"] == NumberedAllocation(1, initial({"old": 0.5, "new": 0.5}))
    assert seen["inner"] == NumberedAllocation(1, initial({"old": 0.25, "new": 0.75}))


def test_other_weights_move_as_few_units_as_they_must_and_the_same_write_nothing(stage: Registry) -> None:
    apply(stage, split("plain"))
    first = snapshot(stage).allocations["plain"].allocation
    apply(stage, {"route": split("plain"), "deadline_s": 2.0})
    assert numbers(stage) == {"plain": 1}
    apply(stage, split("plain", share=0.75))
    second = snapshot(stage).allocations["plain"]
    assert second == NumberedAllocation(2, reallocate(first, {"old": 0.75, "new": 0.25}))
    stage.rollback_route(TASK, ANNA)
    assert numbers(stage) == {"plain": 3}


def test_splits_of_one_name_must_divide_alike(stage: Registry) -> None:
    apply(stage, fallback(split("plain"), split("plain")))
    with pytest.raises(InvalidRoute, match="another split of the route is called 'plain' too and has other arms or"):
        apply(stage, fallback(split("plain"), split("plain", share=0.1)))


@pytest.mark.parametrize(
    ("route", "fact"),
    [
        (leaf("production"), "takes away"),
        (split(old=leaf("v1"), new=leaf("v3")), "changes arms of"),
        (split(), "changes arms of"),
        ({**PINNED, "arms": [{**arm, "name": f"{arm['name']}er"} for arm in PINNED["arms"]]}, "changes arms of"),
    ],
)
def test_a_route_that_breaks_a_running_experiment_is_refused(
    stage: Registry, route: dict[str, object], fact: str
) -> None:
    stage.start_experiment(experiment(), ANNA)
    wanted = parse_task_route(route)
    attempts: list[Callable[[], object]] = [
        lambda: stage.apply_route(TASK, wanted, ANNA),
        lambda: stage.apply_routes({TASK: wanted}, ANNA),
        lambda: stage.check_routes({TASK: wanted}),
    ]
    for attempt in attempts:
        with pytest.raises(Conflict) as caught:
            attempt()
        assert f"experiment 'tone' runs on task 'support_intents', and this route {fact} its split" in str(caught.value)
        assert "end it first with `softcue experiments stop tone`" in str(caught.value)
    assert stage.route(TASK) == parse_task_route(PINNED)


def test_a_rollback_does_not_take_a_running_experiment_away(stage: Registry) -> None:
    apply(stage, leaf("v1"))
    apply(stage, leaf("production"))
    stage.start_experiment(experiment(), ANNA)
    with pytest.raises(Conflict, match="takes away its split; end it first"):
        stage.rollback_route(TASK, ANNA)


def test_the_name_of_an_ended_experiment_is_not_used_for_a_split_again(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    stage.stop_experiment("tone", ANNA)
    with pytest.raises(Conflict, match=r"has the name of an experiment that was stopped by anna at .*another name"):
        stage.rollback_route(TASK, ANNA)
    assert stage.check_routes({TASK: parse_task_route(split("other"))})


def test_other_weights_in_a_route_reweight_the_running_experiment(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    apply(stage, split(old=leaf("v1"), new=leaf("v2"), share=0.25), reason="more of the new")
    record = stage.experiment("tone")
    assert (record.revision, record.weights) == (2, {"old": 0.25, "new": 0.75})
    event = stage.experiment_history("tone")[0]
    assert (event.action, event.reason) == ("experiment.reweight", "more of the new")
    assert event.details["by"] == "route"
    assert numbers(stage) == {"tone": 2}


def test_the_weights_of_a_running_experiment_rule_over_those_of_the_route(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    stage.reweight_experiment("tone", {"old": 0.125, "new": 0.875}, ANNA)
    # The route is applied again for its deadline, with the weights that it had.
    apply(stage, {"route": PINNED, "deadline_s": 2.0})
    seen = snapshot(stage).allocations["tone"]
    assert (seen.number, seen.allocation.weights) == (2, {"old": 0.125, "new": 0.875})
    assert stage.experiment("tone").revision == 2


def test_a_snapshot_follows_what_becomes_of_experiments(stage: Registry) -> None:
    stage.apply_task(task("other"), ANNA)
    before = stage.snapshot()
    stage.start_experiment(experiment(), ANNA)
    started = stage.snapshot(before)
    assert started.tasks[TASK].experiments.keys() == {"tone"}
    assert started.tasks["other"] is before.tasks["other"]
    stage.reweight_experiment("tone", {"old": 0.1, "new": 0.9}, ANNA)
    reweighted = stage.snapshot(started)
    assert reweighted.tasks[TASK].allocations["tone"].number == 2
    stage.stop_experiment("tone", ANNA)
    assert stage.snapshot(reweighted).tasks[TASK].experiments == {}
    assert stage.snapshot(reweighted) == stage.snapshot()


def written_by_an_older_release(registry: Registry, route: dict[str, object]) -> None:
    """A route beside which nothing else was written."""
    with registry.database.write() as connection:
        document = parse_task_route(route).model_dump_json(exclude_none=True)
        number = len(registry.route_history(TASK)) + 1
        row = {"task": TASK, "number": number, "document": '{"kind": "direct"}', "whole": document, "principal": "old"}
        connection.execute(insert(route_revisions).values(**row, created_at=registry._now()))


def test_splits_that_an_older_release_applied_are_followed_without_a_number(stage: Registry) -> None:
    written_by_an_older_release(stage, split("plain"))
    assert snapshot(stage).allocations["plain"] == NumberedAllocation(0, initial({"old": 0.5, "new": 0.5}))
    apply(stage, split("other"))
    stored = snapshot(stage).allocations["other"].allocation
    written_by_an_older_release(stage, split("other", share=0.75))
    expected = NumberedAllocation(0, reallocate(stored, {"old": 0.75, "new": 0.25}))
    assert snapshot(stage).allocations["other"] == expected


def test_a_split_from_before_allocations_gets_one_when_an_experiment_is_bound_to_it(stage: Registry) -> None:
    written_by_an_older_release(stage, PINNED)
    stage.start_experiment(bound(), ANNA)
    assert numbers(stage) == {"tone": 1}
    assert len(stage.route_history(TASK)) == 1


def test_an_experiment_that_lost_its_split_to_an_older_release_ends_all_the_same_and_says_so(stage: Registry) -> None:
    stage.start_experiment(experiment(), ANNA)
    written_by_an_older_release(stage, leaf("v3"))
    assert snapshot(stage).allocations == {}
    apply(stage, leaf("v1"))  # nothing is left to protect
    stage.promote_arm("tone", "new", ANNA)
    assert stage.route(TASK) == parse_task_route(leaf("v1"))
    assert stage.alias(TASK, "production").number == 2
    said = stage.experiment_history("tone")[0].details["route"]
    assert said == "had lost the experiment's split already, and stays as it is"


def test_a_winner_whose_version_was_deleted_meanwhile_is_not_promoted(stage: Registry) -> None:
    stage.remove_alias(TASK, "candidate", reason="", principal=ANNA)
    stage.start_experiment(experiment(), ANNA)
    written_by_an_older_release(stage, leaf("v3"))
    stage.delete_version(TASK, "v2", reason="", principal=ANNA)
    with pytest.raises(Conflict) as caught:
        stage.promote_arm("tone", "new", ANNA)
    assert "arm 'new' of experiment 'tone' is version v2 of task 'support_intents', which was deleted since" in str(
        caught.value
    )
    assert "end the experiment with `softcue experiments stop tone`" in str(caught.value)
    assert stage.stop_experiment("tone", ANNA).state == "stopped"


def test_a_running_experiment_that_cannot_be_read_is_left_out_and_its_traffic_is_split_as_before(
    stage: Registry,
) -> None:
    stage.start_experiment(experiment(), ANNA)
    stage.reweight_experiment("tone", {"old": 0.25, "new": 0.75}, ANNA)
    before = snapshot(stage)
    with stage.database.write() as connection:
        connection.execute(update(experiments).values(document='{"name": "tone", "of_a_later_release": 1}'))
    seen = snapshot(stage)
    assert seen.experiments == {}
    assert seen.allocations == before.allocations
    with pytest.raises(Conflict, match="takes away its split"):
        apply(stage, leaf("v1"))


def test_a_route_whose_allocation_is_damaged_is_refused_alone(stage: Registry) -> None:
    stage.apply_task(task("other"), ANNA)
    apply(stage, split("plain"))
    with stage.database.write() as connection:
        connection.execute(update(allocations).values(parts="[[7, 8]]"))
    seen = stage.snapshot().tasks
    assert seen[TASK].route == Unreadable(
        "allocation 1 of split 'plain' of task 'support_intents' is damaged: its parts do not give every unit one of "
        "its arms; restore a backup"
    )
    assert seen["other"].route == TaskRoute()


@pytest.mark.parametrize("workers", [8])
def test_of_many_that_decide_at_once_exactly_one_wins(stage: Registry, workers: int) -> None:
    stage.start_experiment(experiment(), ANNA)
    together = Barrier(workers)

    def decide(number: int) -> bool:
        principal = Principal(f"p{number}")
        together.wait()
        with suppress(Conflict):
            match number % 4:
                case 0:
                    stage.stop_experiment("tone", principal, expected=1)
                case 1:
                    stage.promote_arm("tone", "new", principal, expected=1)
                case 2:
                    stage.roll_back_experiment("tone", principal, expected=1)
                case 3:
                    stage.reweight_experiment("tone", {"old": 0.1, "new": 0.9}, principal, expected=1)
            return True
        return False

    with ThreadPoolExecutor(workers) as pool:
        won = list(pool.map(decide, range(workers)))
    assert sum(won) == 1
    record = stage.experiment("tone")
    decided, _ = stage.experiment_history("tone")
    assert record.revision == 2
    assert decided.principal == f"p{won.index(True)}"
    assert (record.state == "running") == (decided.action == "experiment.reweight")


def test_of_many_processes_that_start_one_at_once_exactly_one_does(
    stage: Registry, children: ForkServerContext
) -> None:
    start = children.Barrier(4)
    answers, answer = children.Pipe(duplex=False)
    document = experiment().document()
    starters = [
        children.Process(target=processes.start_at_once, args=(stage.database.location, start, document, answer))
        for _ in range(4)
    ]
    for starter in starters:
        starter.start()
    finished(starters)
    assert sorted(answers.recv() for _ in starters) == [False, False, False, True]
    assert len(stage.route_history(TASK)) == 1


def problems(registry: Registry) -> list[str]:
    return [str(problem) for problem in verify(registry.database)]


def test_verify_finds_a_store_with_experiments_whole(stage: Registry) -> None:
    apply(stage, leaf("production"))
    stage.start_experiment(experiment(), ANNA)
    stage.reweight_experiment("tone", {"old": 0.1, "new": 0.9}, ANNA)
    assert problems(stage) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("UPDATE experiments SET document = '{}'", "experiment 'tone': its document cannot be read; restore a backup"),
        ("""UPDATE experiments SET document = replace(document, '"tone"', '"tome"')""",
         "experiment 'tone': its document is of 'tome' on task 'support_intents'"),
        ("UPDATE experiments SET versions = '[1]'", "experiment 'tone': the versions of its arms cannot be read"),
        ("UPDATE experiments SET versions = '[]'", "experiment 'tone': no arm of it is its control 'old'"),
        ("UPDATE experiments SET route_before = 9", "experiment 'tone': route 9 of its task, which was in force"),
        ("UPDATE allocations SET parts = '[[7,\"old\"]]' WHERE number = 2",
         "allocation 2 of split 'tone' of task 'support_intents': its parts do not give every unit one of its arms"),
        ("UPDATE allocations SET weights = '{' WHERE number = 2", "its weights or parts cannot be read"),
        ("UPDATE allocations SET parts = '[]' WHERE number = 2", "its parts do not give every unit one of its arms"),
        ("DELETE FROM allocations WHERE number = 1", "allocation 2 of split 'tone' of task 'support_intents': it"),
    ],
)  # fmt: skip
def test_verify_names_what_is_wrong_with_experiments_and_allocations(stage: Registry, damage: str, says: str) -> None:
    apply(stage, leaf("production"))
    stage.start_experiment(experiment(), ANNA)
    stage.reweight_experiment("tone", {"old": 0.1, "new": 0.9}, ANNA)
    with stage.database.write() as connection:
        connection.execute(text(damage))
    (problem,) = problems(stage)
    assert says in problem
