"""The registry's half that routing uses: routes, backends, calibrations, spending, shadow answers.

Each method is one transaction. Every method may raise StoreUnavailable, and those that take a task UnknownTask.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime

from sqlalchemy import Connection

from prompt_store.access import Principal
from prompt_store.database import Database
from prompt_store.errors import InvalidRoute, RouteProblem, UnknownTask
from prompt_store.names import check_text
from prompt_store.prompts.revisions import require_task
from prompt_store.prompts.snapshot import read_task_snapshot
from prompt_store.routing import backends, calibrations, revisions, shadows, spending
from prompt_store.routing.backends import BackendDescription
from prompt_store.routing.calibrations import Calibration
from prompt_store.routing.checks import check_route
from prompt_store.routing.revisions import AppliedRoute, RouteRevision
from prompt_store.routing.routes import TaskRoute
from prompt_store.routing.shadows import ShadowAnswer, ShadowSummary
from prompt_store.routing.spending import Spent


def utc_now() -> datetime:
    return datetime.now(UTC)


class RoutingRegistry:
    """Threads may share one. `now` gives the time that rows are stamped with."""

    def __init__(self, database: Database, *, now: Callable[[], datetime] = utc_now) -> None:
        self.database = database
        self._now = now

    def register_backends(self, descriptions: Sequence[BackendDescription], principal: Principal) -> None:
        """Makes a service's backends known, in the order of its settings; what is known already is not written."""
        with self.database.read() as connection:
            if backends.are_known(connection, descriptions):
                return
        with self.database.write() as connection:
            backends.register_backends(connection, descriptions, principal, self._now())

    def backends(self) -> list[BackendDescription]:
        """Those that services have made known, in the order of their settings. Raises SchemaMismatch."""
        with self.database.read() as connection:
            return backends.read_backends(connection)

    def calibrate(self, calibration: Calibration, principal: Principal, *, reason: str = "") -> None:
        """Keeps a calibration in place of the version's earlier one for its measure. Raises UnknownVersion."""
        check_text("reason", reason)
        with self.database.write() as connection:
            calibrations.calibrate(connection, calibration, principal, self._now(), reason)

    def calibrations(self, task: str) -> list[Calibration]:
        """By version and measure."""
        with self.database.read() as connection:
            return calibrations.task_calibrations(connection, task)

    def apply_route(
        self,
        task: str,
        route: TaskRoute,
        principal: Principal,
        *,
        expected: int | None = None,
        reason: str = "",
        backends: Sequence[BackendDescription] | None = None,
    ) -> AppliedRoute:
        """Puts a route in force once everything about it was checked, against the store's backends by default.

        Compare-and-set: revision `expected` must be in force, 0 for none. Raises Conflict, InvalidRoute.
        """
        expecting = {task: expected} if expected is not None else {}
        check_text("reason", reason)
        with self.database.write() as connection:
            require_task(connection, task)
            return self._apply(connection, {task: route}, principal, expecting, reason, backends)[task]

    def apply_routes(
        self,
        routes: Mapping[str, TaskRoute],
        principal: Principal,
        *,
        expected: Mapping[str, int] | None = None,
        reason: str = "",
        backends: Sequence[BackendDescription] | None = None,
    ) -> dict[str, AppliedRoute]:
        """As `apply_route` for several tasks: all of them or none. InvalidRoute has the problems of each."""
        check_text("reason", reason)
        with self.database.write() as connection:
            return self._apply(connection, routes, principal, expected or {}, reason, backends)

    def check_routes(
        self,
        routes: Mapping[str, TaskRoute],
        *,
        expected: Mapping[str, int] | None = None,
        backends: Sequence[BackendDescription] | None = None,
    ) -> dict[str, tuple[str, ...]]:
        """What `apply_routes` would warn of, by task, or raise."""
        with self.database.read() as connection:
            warnings = self._check(connection, routes, expected or {}, backends)
            for task, route in routes.items():
                revisions.check_replaceable(connection, task, route)
            return warnings

    def rollback_route(
        self,
        task: str,
        principal: Principal,
        *,
        to: int | None = None,
        expected: int | None = None,
        reason: str = "",
        backends: Sequence[BackendDescription] | None = None,
    ) -> AppliedRoute:
        """Puts revision `to` in force again as a new one; without it what was in force before, and then before that.

        Checked and compared as by `apply_route`. Raises Conflict where there is no such revision.
        """
        check_text("reason", reason)
        with self.database.write() as connection:
            require_task(connection, task)
            revisions.check_expected(connection, task, expected)
            target = revisions.rollback_target(connection, task, to)
            warnings = self._check(connection, {task: target.route}, {}, backends)[task]
            revision, changed = revisions.write_route(
                connection, task, target.route, principal, self._now(), reason=reason, restores=target.number
            )
            return AppliedRoute(revision, warnings, changed)

    def route(self, task: str) -> TaskRoute:
        """The route in force; TaskRoute() where none was applied. Raises SchemaMismatch."""
        revision = self.route_revision(task)
        return revision.route if revision is not None else TaskRoute()

    def route_revision(self, task: str) -> RouteRevision | None:
        """The route in force with its number, None where none was applied. Raises SchemaMismatch."""
        with self.database.read() as connection:
            require_task(connection, task)
            return revisions.read_route(connection, task)

    def route_history(self, task: str) -> list[RouteRevision]:
        """Newest first. Raises SchemaMismatch."""
        with self.database.read() as connection:
            require_task(connection, task)
            return revisions.read_route_history(connection, task)

    def add_spending(self, spent: Iterable[Spent]) -> None:
        """Adds amounts to what the days have; see `spending.add`."""
        with self.database.write() as connection:
            spending.add(connection, spent)

    def spending(self, day: date) -> dict[tuple[str, str], float]:
        """What that day cost so far on all replicas, by task and backend."""
        with self.database.read() as connection:
            return spending.read(connection, day)

    def add_shadow_answers(self, answers: Iterable[ShadowAnswer]) -> None:
        """Keeps those whose id is not there yet."""
        with self.database.write() as connection:
            shadows.add_shadow_answers(connection, answers)

    def shadow_answers(self, task: str, *, limit: int = 50) -> list[ShadowAnswer]:
        """The newest first."""
        with self.database.read() as connection:
            require_task(connection, task)
            return shadows.read_shadow_answers(connection, task, limit)

    def shadow_summary(self, task: str) -> list[ShadowSummary]:
        """One a shadow version and backend, those with most answers first."""
        with self.database.read() as connection:
            require_task(connection, task)
            return shadows.summarise_shadow_answers(connection, task)

    def delete_shadow_answers(self, before: datetime) -> int:
        """Removes those that were recorded earlier; returns how many."""
        with self.database.write() as connection:
            return shadows.delete_shadow_answers(connection, before)

    def _apply(
        self,
        connection: Connection,
        routes: Mapping[str, TaskRoute],
        principal: Principal,
        expected: Mapping[str, int],
        reason: str,
        known: Sequence[BackendDescription] | None,
    ) -> dict[str, AppliedRoute]:
        warnings = self._check(connection, routes, expected, known)
        applied: dict[str, AppliedRoute] = {}
        for task, route in routes.items():
            revision, changed = revisions.write_route(connection, task, route, principal, self._now(), reason=reason)
            applied[task] = AppliedRoute(revision, warnings[task], changed)
        return applied

    def _check(
        self,
        connection: Connection,
        routes: Mapping[str, TaskRoute],
        expected: Mapping[str, int],
        known: Sequence[BackendDescription] | None,
    ) -> dict[str, tuple[str, ...]]:
        """Each route's warnings. Raises Conflict, or InvalidRoute with the problems of all, also unknown tasks."""
        for task, number in expected.items():
            revisions.check_expected(connection, task, number)
        if known is None:
            known = backends.read_backends(connection)
        today = self._now().date()
        warnings: dict[str, tuple[str, ...]] = {}
        problems: list[RouteProblem] = []
        for task, route in routes.items():
            try:
                warnings[task] = check_route(read_task_snapshot(connection, task), route, known, today)
            except InvalidRoute as error:
                problems += error.problems
            except UnknownTask as error:
                problems.append(RouteProblem((task,), str(error)))
        if problems:
            raise InvalidRoute.of(problems)
        return warnings
