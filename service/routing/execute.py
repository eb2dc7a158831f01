"""Takes a request through its route: one coroutine for each kind of node.

What it means to ask a leaf is the `Work`'s business: a generation begins there, a classification is made there. What a
request did on its way is told to its Run. Nothing here waits longer than its share of the request's time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, assert_never

from prompt_store.errors import InvalidInputs
from prompt_store.experiments.allocations import initial
from prompt_store.experiments.records import NumberedAllocation
from prompt_store.prompts.registry import TaskSnapshot
from prompt_store.prompts.version import Vote
from prompt_store.routing.routes import (
    Arm,
    CascadeRoute,
    DirectRoute,
    EnsembleRoute,
    FallbackRoute,
    Route,
    ShadowRoute,
    SplitRoute,
    leaves,
)
from service.catalog import Catalog
from service.engines.collecting import all_or_none
from service.engines.deadlines import left_s
from service.engines.errors import EngineError, InvalidRequest, RequestError
from service.experiments.assignment import Assigned, assign
from service.routing.errors import WrongTaskKind
from service.routing.plan import Target
from service.routing.run import Failure, Run, Step, Turn, within

# Of all failures those that no other leaf would answer differently: the caller must change the request. Inputs are not
# among them: the version of another leaf may be of a revision of the task that has these.
_FOR_THE_CALLER = (InvalidRequest, WrongTaskKind)


@dataclass(frozen=True, slots=True)
class Exposed:
    """What a run is to an experiment, by the `allocation` of a number; `version` is what the arm's first leaf names."""

    experiment: str
    allocation: int
    assigned: Assigned
    version: str
    forced: bool


class Asked(Protocol):
    """What a leaf answered, or begins to: who it was, and the step in which it did."""

    @property
    def target(self) -> Target: ...

    @property
    def step(self) -> Step: ...


T = TypeVar("T", bound=Asked)


class Work(Protocol[T]):
    """What is wanted of each leaf, and how answers are held against each other."""

    async def ask(self, run: Run, target: Target, step: Step, turn: Turn) -> T:
        """The leaf's answer in its turn, as far as it must be there before the caller is told anything; or Failure."""
        ...

    async def hold(self, answer: T) -> T:
        """The same, whole. Raises Failure where it breaks off."""
        ...

    def measured(self) -> Work[T]:
        """The same work, so that its answers have a confidence where a backend can tell one."""
        ...

    def voting(self) -> Work[T]:
        """The same work as members of an ensemble do it. Raises UnsupportedFeature for what is not put to the vote."""
        ...

    def confidence(self, measure: str, answer: T) -> float | None:
        """Of an answer that was held."""
        ...

    def no_confidence(self, measure: str, answer: T) -> str:
        """Why an answer has none."""
        ...

    def vote(self, answers: Sequence[T], vote: Vote) -> T:
        """The one that these, which were held, come to together."""
        ...


class Executor:
    """Walks routes. `expose` is told what a run is to a running experiment before any engine is asked.

    `draw` gives numbers in [0, 1) for samples.
    """

    def __init__(
        self, catalog: Catalog, expose: Callable[[Run, Exposed], object], draw: Callable[[], float] = random.random
    ) -> None:
        self._catalog = catalog
        self._expose = expose
        self._draw = draw

    async def begin(self, run: Run, work: Work[T]) -> T:
        """The answer of the run's plan, as far as `Work.ask` waits for it. Raises Failure."""
        left_s(run.ends_at)
        if run.plan.target is not None:
            return await self._ask(run, run.plan.target, work, "route", Turn(run.ends_at))
        return await self.follow(run, run.plan.route, work, "route", Turn(run.ends_at))

    async def follow(self, run: Run, route: Route, work: Work[T], place: str, turn: Turn) -> T:
        """The answer of a route that stands at `place`."""
        match route:
            case DirectRoute():
                return await self._direct(run, route, work, place, turn)
            case SplitRoute():
                arm = self._arm(run, route)
                return await self.follow(run, arm.route, work, f"{place}.arms[{arm.name}]", turn)
            case FallbackRoute():
                return await self._fallback(run, route, work, place, turn)
            case CascadeRoute():
                return await self._cascade(run, route, work, place, turn)
            case ShadowRoute():
                answer = await self.follow(run, route.primary, work, f"{place}.primary", turn)
                if self._draw() < route.sample:
                    run.shadows.append((route.shadow, f"{place}.shadow"))
                return answer
            case EnsembleRoute():
                return await self._ensemble(run, route, work, place, turn)
            case _:
                assert_never(route)

    def _arm(self, run: Run, split: SplitRoute) -> Arm:
        """The arm whose route answers; the run is told which it counts for."""
        task = run.plan.task
        assert task is not None
        arms = {arm.name: arm for arm in split.arms}
        placed = task.allocations.get(split.experiment)
        if placed is None or placed.allocation.weights.keys() != arms.keys():
            placed = NumberedAllocation(0, initial({arm.name: arm.weight for arm in split.arms}))
        experiment = task.experiments.get(split.experiment)
        if experiment is not None and experiment.control not in arms:
            experiment = None  # the split was changed by code that knows no experiments
        forced = run.caller.arm in arms
        if forced:
            counts = experiment is not None
            assigned = Assigned(run.caller.arm, run.caller.arm, placed.allocation.weights[run.caller.arm], counts)
        else:
            assigned = assign(split.experiment, placed.allocation, run.unit, experiment, run.caller.attributes)
        if not run.experiment:  # a split within an experiment's arm says nothing of the experiment
            run.arm = assigned.arm
        if assigned.exposed and run.counted:
            if not forced:
                run.experiment = split.experiment
            version = self._first_version(task, arms[assigned.served].route)
            self._expose(run, Exposed(split.experiment, placed.number, assigned, version, forced))
        return arms[assigned.served]

    def _first_version(self, task: TaskSnapshot, route: Route) -> str:
        """The digest of the version that a route's first leaf names; empty where it names none that there is."""
        leaf = route if isinstance(route, DirectRoute) else next(leaves(route))[1]
        try:
            return self._catalog.version(task, leaf.version).digest
        except Failure:  # which whoever is answered by it is told
            return ""

    async def _direct(self, run: Run, route: DirectRoute, work: Work[T], place: str, turn: Turn) -> T:
        assert run.plan.task is not None
        try:
            target = self._catalog.target(run.plan.task, route)
        except Failure as error:
            run.begin(place, None).fail(error)
            raise
        return await self._ask(run, target, work, place, turn)

    async def _ask(self, run: Run, target: Target, work: Work[T], place: str, turn: Turn) -> T:
        step = run.begin(place, target)
        try:
            left_s(turn.until)
            return await work.ask(run, target, step, turn)
        except BaseException as error:
            step.fail(error)
            raise

    async def _fallback(self, run: Run, route: FallbackRoute, work: Work[T], place: str, turn: Turn) -> T:
        """The first that answers. Where none does, the failure that says most."""
        failures: list[Exception] = []
        for index, each in enumerate(route.routes):
            try:
                left = len(route.routes) - index
                share = Turn(_share(turn.until, left), turn.another_follows or left > 1)
                return await self.follow(run, each, work, f"{place}.routes[{index}]", share)
            except _FOR_THE_CALLER:
                raise
            except Failure as error:
                failures.append(error)
        raise _most_telling(failures)

    async def _cascade(self, run: Run, route: CascadeRoute, work: Work[T], place: str, turn: Turn) -> T:
        """The first's answer where it is sure enough, else the second's; the first's too where the second fails."""
        run.held_back = True
        measured = work.measured()
        try:
            half = Turn(_share(turn.until, 2), another_follows=True)
            begun = await self.follow(run, route.first, measured, f"{place}.first", half)
            first = await _whole(measured, begun, half.until)
        except _FOR_THE_CALLER:
            raise
        except Failure as failure:
            try:
                return await self.follow(run, route.second, work, f"{place}.second", turn)
            except Failure as error:
                raise _most_telling([failure, error]) from None
        confidence = first.step.confidence = measured.confidence(route.measure, first)
        reason = _not_accepted(run, route.measure, measured, first, confidence)
        if not reason:
            return first
        first.step.pass_over(reason)
        try:
            return await self.follow(run, route.second, work, f"{place}.second", turn)
        except _FOR_THE_CALLER:
            raise
        except Failure:
            first.step.take_back(f"{reason}; it is answered all the same because the second failed")
            return first

    async def _ensemble(self, run: Run, route: EnsembleRoute, work: Work[T], place: str, turn: Turn) -> T:
        """What the members come to together. One that fails fails all, and what others answered is passed over."""
        voting = work.voting()
        run.held_back = True
        members = f"{place}.members["

        async def ask(index: int, member: Route) -> T:
            begun = await self.follow(run, member, voting, f"{members}{index}]", turn)
            return await _whole(voting, begun, turn.until)

        try:
            answers = await all_or_none(ask(index, member) for index, member in enumerate(route.members))
        except BaseException:
            for step in run.steps:
                if step.outcome == "answered" and step.place.startswith(members):
                    step.pass_over("another member of its ensemble failed")
            raise
        return voting.vote(answers, route.vote)


async def _whole(work: Work[T], answer: T, until: float | None) -> T:
    """An answer that has begun, once it is there whole; its step says so where it is not by then."""
    try:
        return await within(until, work.hold(answer))
    except BaseException as error:
        answer.step.fail(error)
        raise


def _most_telling(failures: Sequence[Exception]) -> Exception:
    """Of why each route failed, what serves the caller most; the last of equals.

    A backend's failure, which may be over when the request is sent again, goes before what this service refuses, and
    that before what one leaf does not take of the request.
    """

    def rank(error: Exception) -> int:
        if isinstance(error, RequestError | InvalidInputs):
            return 0
        return 2 if isinstance(error, EngineError) else 1

    return max(reversed(failures), key=rank)


def _not_accepted(run: Run, measure: str, work: Work[T], first: T, confidence: float | None) -> str:
    """Why a cascade's first answer is not the one to give; empty where it is."""
    target = first.target
    calibrations = run.plan.task.calibrations if run.plan.task is not None else {}
    calibration = calibrations.get((target.version.digest, measure)) if target.version is not None else None
    if calibration is None:
        return f"{target.label} has no calibration for {measure}"
    if confidence is None:
        return work.no_confidence(measure, first)
    if confidence < calibration.threshold:
        return f"{measure} {confidence:.4g} is under the threshold {calibration.threshold:.4g}"
    return ""


def _share(until: float | None, attempts: int) -> float | None:
    """Until when the first of so many attempts may take. Raises DeadlineExceeded where no time is left."""
    seconds = left_s(until)
    return None if seconds is None else time.monotonic() + seconds / attempts
