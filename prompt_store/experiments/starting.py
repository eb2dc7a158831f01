"""Starting an experiment: everything about it is checked, then its split replaces the route or is bound to it.

The versions that its arms name are pinned to their numbers, so that an alias that moves changes no arm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import ValidationError
from sqlalchemy import Connection, select

from prompt_store.access import Principal
from prompt_store.changes import record
from prompt_store.errors import (
    Conflict,
    InvalidExperiment,
    InvalidName,
    InvalidOutcome,
    InvalidRoute,
    Place,
    RouteProblem,
    UnknownTask,
    nearest_name,
)
from prompt_store.experiments.allocating import allocate, weights_of
from prompt_store.experiments.experiment import Experiment, ExperimentArm, Judge
from prompt_store.experiments.keeping import RUNNING, ended_in_words, insert_record
from prompt_store.ledger.metrics import MetricRule, find_metric
from prompt_store.names import parse_selector
from prompt_store.prompts.revisions import current_revision
from prompt_store.prompts.snapshot import TaskSnapshot, read_task_snapshot
from prompt_store.prompts.task import Task
from prompt_store.prompts.unreadable import Unreadable, readable
from prompt_store.prompts.version import PromptVersion
from prompt_store.routing.backends import BackendDescription, read_backends
from prompt_store.routing.checks import check_route
from prompt_store.routing.revisions import read_route, write_route
from prompt_store.routing.rewriting import splits, with_leaves, without_split
from prompt_store.routing.routes import Arm, DirectRoute, Route, SplitRoute, TaskRoute, leaves
from prompt_store.tables import experiments


@dataclass(frozen=True, slots=True)
class StartPlan:
    """What starting an experiment does to the task's route, of which `before` is the revision in force, 0 for none.

    `versions` are the labels that each arm's leaves are pinned to; `warnings` are of what will not last.
    """

    before: int
    route: TaskRoute
    versions: Mapping[str, Sequence[str]]
    weights: Mapping[str, float]
    warnings: tuple[str, ...]


def plan(
    connection: Connection, experiment: Experiment, at: datetime, *, known: Sequence[BackendDescription] | None
) -> StartPlan:
    """Checks all of an experiment, for the store's backends where `known` is None.

    Raises UnknownTask, Conflict, InvalidExperiment with every problem, SchemaMismatch.
    """
    task = read_task_snapshot(connection, experiment.task)
    _check_free(connection, experiment)
    in_force = read_route(connection, experiment.task)
    before = in_force.route if in_force is not None else TaskRoute()
    checks = _Checks(connection, experiment, task, readable(task.revision).task)
    checks.check_metrics()
    route = checks.route(before)
    warnings: tuple[str, ...] = ()
    if route is not None:
        try:
            backends = read_backends(connection) if known is None else known
            warnings = check_route(task, route, backends, at.date())
        except InvalidRoute as error:
            bound = not experiment.arms
            checks.problems += [
                RouteProblem(problem.place[1:] if bound else _place(problem.place), problem.message)
                for problem in error.problems
            ]
    if route is None or checks.problems:
        raise InvalidExperiment.of(checks.problems)
    pinned = route.model_copy(update={"route": _pinned(route.route, experiment, task)})
    split = next(found for _, found in splits(pinned.route) if found.experiment == experiment.name)
    versions = {arm.name: [leaf.version for _, leaf in leaves(arm.route)] for arm in split.arms}
    number = in_force.number if in_force is not None else 0
    return StartPlan(number, pinned, versions, weights_of(split), warnings)


def start(
    connection: Connection,
    experiment: Experiment,
    principal: Principal,
    at: datetime,
    *,
    reason: str,
    known: Sequence[BackendDescription] | None,
) -> None:
    """Writes the experiment, its route and its allocation. Raises as `plan`."""
    planned = plan(connection, experiment, at, known=known)
    said = f"experiment {experiment.name!r} started" + (f": {reason}" if reason else "")
    write_route(connection, experiment.task, planned.route, principal, at, reason=said)
    # A split that is bound may be in force since before there were allocations.
    allocated = allocate(connection, experiment.task, experiment.name, planned.weights, principal, at)
    insert_record(connection, experiment, planned.versions, planned.before, principal, at)
    record(
        connection,
        "experiment",
        action="experiment.start",
        task=experiment.task,
        subject=experiment.name,
        principal=principal,
        at=at,
        reason=reason,
        details={
            "experiment": experiment.document(),
            "versions": planned.versions,
            "weights": planned.weights,
            "allocation": allocated.number,
            "warnings": list(planned.warnings),
        },
    )


@dataclass(slots=True)
class _Checks:
    """What is wrong with one experiment, at the places of its document."""

    connection: Connection
    experiment: Experiment
    snapshot: TaskSnapshot
    task: Task
    problems: list[RouteProblem] = field(default_factory=list)

    def check_metrics(self) -> None:
        self._metric(("metric",), self.experiment.metric)
        for index, guardrail in enumerate(self.experiment.guardrails):
            self._metric(("guardrails", index, "metric"), guardrail.metric)
        for index, name in enumerate(self.experiment.metrics):
            self._metric(("metrics", index), name)
        if self.experiment.judge is not None:
            self._check_judge(self.experiment.judge)

    def route(self, before: TaskRoute) -> TaskRoute | None:
        """The route with the experiment's split, None where there can be none."""
        split = self._own_split(before.route) if self.experiment.arms else self._bound_split(before.route)
        if split is None:
            return None
        for index, arm in enumerate(split.arms):
            for _, inner in splits(arm.route):
                self._refuse(
                    ("arms", index) if self.experiment.arms else (),
                    f"arm {arm.name!r} contains the split {inner.experiment!r}, and a request belongs to one arm; give "
                    "the arm a route without a split",
                )
        if not self.experiment.arms:
            return before
        try:
            return TaskRoute(route=split, deadline_s=before.deadline_s, daily_cost_ceiling=before.daily_cost_ceiling)
        except ValidationError:
            self._refuse(
                ("arms",),
                f"a split of {len(split.arms)} arms over the task's route has too many leaves or is nested too deeply; "
                "use fewer arms, or give them routes of their own",
            )
            return None

    def _own_split(self, before: Route) -> SplitRoute | None:
        arms: list[Arm] = []
        for index, arm in enumerate(self.experiment.arms):
            route = self._arm_route(("arms", index), arm, before)
            if route is not None:
                arms.append(Arm(name=arm.name, weight=arm.weight, route=route))
        if len(arms) < len(self.experiment.arms):
            return None
        return SplitRoute(experiment=self.experiment.name, arms=tuple(arms))

    def _arm_route(self, place: Place, arm: ExperimentArm, before: Route) -> Route | None:
        if arm.route is not None:
            return arm.route
        if arm.version is None:
            return before
        fault = _fault(self.snapshot, arm.version)
        if fault is not None:
            self._refuse((*place, "version"), fault)
            return None
        alias = self.experiment.alias
        named = [leaf.version for _, leaf in leaves(before)]
        if alias not in named:
            self._refuse(
                (*place, "version"),
                f"no leaf of the task's route names the alias {alias!r}, in whose place {arm.version!r} would answer "
                f"(they name {', '.join(sorted(set(named)))}); set `alias` to one of them, or give the arm a route",
            )
            return None
        version = arm.version
        return with_leaves(before, lambda leaf: version if leaf.version == alias else leaf.version)

    def _bound_split(self, before: Route) -> SplitRoute | None:
        name = self.experiment.name
        found = [(place, split) for place, split in splits(before) if split.experiment == name]
        if not found:
            there = [split.experiment for _, split in splits(before)]
            nearest = nearest_name(name, there)
            hint = f"did you mean {nearest!r}? Otherwise give" if nearest is not None else "give"
            self._refuse(
                ("arms",),
                f"the route of task {self.task.name!r} has no split {name!r} to be on; {hint} the experiment arms, or "
                "apply a route with a split of that name first",
            )
            return None
        if len(found) > 1:
            self._refuse(("name",), f"the route has {len(found)} splits {name!r}; give each a name of its own")
            return None
        ((place, split),) = found
        self._check_place(before, place)
        names = [arm.name for arm in split.arms]
        if self.experiment.control not in names:
            nearest = nearest_name(self.experiment.control, names)
            hint = f"did you mean {nearest!r}?" if nearest is not None else f"it has {', '.join(names)}"
            self._refuse(("control",), f"the split {name!r} has no arm {self.experiment.control!r}; {hint}")
        if (fault := self.experiment.floor_fault(len(names))) is not None:
            self._refuse(("thompson", "floor"), fault)
        return split

    def _check_place(self, before: Route, place: Place) -> None:
        """A split answers for what its units see only outside of other splits and of what is only recorded."""
        name = self.experiment.name
        around = [(way, split) for way, split in splits(before) if place[: len(way)] == way and way != place]
        for _, outer in around:
            self._refuse(
                ("name",),
                f"the split {name!r} lies in an arm of the split {outer.experiment!r}, and a request belongs to one "
                "arm; apply a route in which it does not",
            )
        if "shadow" in place:
            self._refuse(
                ("name",),
                f"the split {name!r} lies in a shadow, whose answers nobody sees; put it where answers come from",
            )

    def _metric(self, place: Place, name: str) -> MetricRule | None:
        try:
            rule = find_metric(self.task, name)
        except InvalidOutcome as error:
            self._refuse(place, str(error))
            return None
        if rule.type == "text":
            self._refuse(place, f"the values of {name!r} are text, of which there is no mean; name another metric")
            return None
        return rule

    def _check_judge(self, judge: Judge) -> None:
        rule = self._metric(("judge", "metric"), judge.metric)
        if rule is not None and rule.automatic:
            self._refuse(
                ("judge", "metric"),
                f"{judge.metric!r} is measured by the service itself; add a metric to the task for what the judge says",
            )
        try:
            judging = current_revision(self.connection, judge.task).task
        except UnknownTask as error:
            self._refuse(("judge", "task"), str(error))
            return
        wanted = {*self.task.inputs, "answer"}
        if "answer" in self.task.inputs:
            self._refuse(
                ("judge",),
                f"task {self.task.name!r} has an input called answer itself, so no judge can be told the two apart; "
                "rename that input",
            )
        elif set(judging.inputs) != wanted:
            self._refuse(
                ("judge", "task"),
                f"task {judge.task!r} has the inputs {', '.join(sorted(judging.inputs))} and would be asked with "
                f"{', '.join(sorted(wanted))}; give it those",
            )
        if judge.version is not None:
            fault = _fault(read_task_snapshot(self.connection, judge.task), judge.version)
            if fault is not None:
                self._refuse(("judge", "version"), fault)
        self._check_scores(judge, judging)

    def _check_scores(self, judge: Judge, judging: Task) -> None:
        if judging.kind != "classify":
            return
        for label in judge.scores:
            if label not in judging.labels:
                nearest = nearest_name(label, judging.labels)
                hint = f"did you mean {nearest!r}?" if nearest is not None else f"it has {', '.join(judging.labels)}"
                self._refuse(("judge", "scores", label), f"task {judge.task!r} has no label {label!r}; {hint}")
        without = [label for label in judging.labels if label not in judge.scores and not _is_number(label)]
        if without:
            self._refuse(
                ("judge", "scores"),
                f"the labels {', '.join(map(repr, without))} of task {judge.task!r} are no numbers and have no score; "
                "give each one",
            )

    def _refuse(self, place: Place, message: str) -> None:
        self.problems.append(RouteProblem(place, message))


def _check_free(connection: Connection, experiment: Experiment) -> None:
    """Raises Conflict for a name that was used before, and where another experiment runs on the task."""
    used = connection.execute(select(experiments).where(experiments.c.name == experiment.name)).one_or_none()
    if used is not None:
        state = "runs" if used.state == RUNNING else ended_in_words(used)
        raise Conflict(
            f"there is an experiment {used.name!r} already, on task {used.task!r}; it {state}. A name is used once, as "
            "it decides which units see which arm; choose another",
            current=used.name,
        )
    running = connection.execute(
        select(experiments.c.name).where(experiments.c.task == experiment.task, experiments.c.state == RUNNING)
    ).scalar()
    if running is not None:
        raise Conflict(
            f"experiment {running!r} runs on the route of task {experiment.task!r}, and two on one would answer for "
            f"each other's units; end it first with `softcue experiments stop {running}`",
            current=running,
        )


def _pinned(route: Route, experiment: Experiment, task: TaskSnapshot) -> Route:
    """The route with the experiment's leaves named by number. They have been checked."""

    def number(leaf: DirectRoute) -> str:
        version = task.find(parse_selector(leaf.version))
        assert isinstance(version, PromptVersion), "the route was checked"
        return version.label

    split = next(found for _, found in splits(route) if found.experiment == experiment.name)
    return without_split(route, experiment.name, with_leaves(split, number))


def _fault(task: TaskSnapshot, selector: str) -> str | None:
    """What is wrong with naming a version of a task so."""
    try:
        found = task.find(parse_selector(selector))
    except InvalidName as error:
        return str(error)
    if isinstance(found, Unreadable):
        return found.reason
    if found is not None:
        return None
    nearest = nearest_name(selector, [*task.aliases, *(f"v{number}" for number in task.numbers)])
    hint = f"did you mean {nearest!r}? Otherwise " if nearest is not None else ""
    return f"task {task.name!r} has no version {selector!r}; {hint}list them with `softcue prompts list {task.name}`"


def _place(place: Place) -> Place:
    """The place in an experiment's document of what is wrong with the route that is made for it."""
    in_route = place[2:]
    return in_route if in_route[:1] == ("arms",) else place[1:]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
