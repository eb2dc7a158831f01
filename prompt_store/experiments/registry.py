"""The registry's half that experiments use: starting, looking at, changing and ending them.

Each method is one transaction. Every method may raise StoreUnavailable, and those that take a name UnknownExperiment.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_store.access import Principal
from prompt_store.experiments import ending, keeping, splits, starting
from prompt_store.experiments.experiment import Experiment
from prompt_store.experiments.records import ExperimentEvent, ExperimentRecord
from prompt_store.experiments.starting import StartPlan
from prompt_store.names import check_text, check_texts
from prompt_store.prompts.revisions import require_task
from prompt_store.routing.backends import BackendDescription
from prompt_store.routing.registry import RoutingRegistry


class ExperimentRegistry(RoutingRegistry):
    """What changes an experiment takes `expected`, the revision that it must be at; None expects nothing.

    Conflict says so where it is at another, or has ended. `details` are the numbers that a decision rests on, as JSON
    values for its history.
    """

    def start_experiment(
        self,
        experiment: Experiment,
        principal: Principal,
        *,
        reason: str = "",
        backends: Sequence[BackendDescription] | None = None,
    ) -> ExperimentRecord:
        """Starts it once everything about it was checked, against the store's backends by default.

        Raises UnknownTask, InvalidExperiment with every problem, Conflict for a name that was used before and where
        another one runs on the task.
        """
        check_text("reason", reason)
        with self.database.write() as connection:
            starting.start(connection, experiment, principal, self._now(), reason=reason, known=backends)
            return keeping.read_record(connection, experiment.name)

    def check_experiment(
        self, experiment: Experiment, *, backends: Sequence[BackendDescription] | None = None
    ) -> StartPlan:
        """What starting it would do, which is checked and not done. Raises as `start_experiment`."""
        with self.database.read() as connection:
            return starting.plan(connection, experiment, self._now(), known=backends)

    def stop_experiment(
        self,
        name: str,
        principal: Principal,
        *,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        expected: int | None = None,
    ) -> ExperimentRecord:
        """Ends it without a winner: the route is as it was before, or that of the control in the place of the split."""
        return self._end(name, "stopped", None, principal, reason, details, expected)

    def roll_back_experiment(
        self,
        name: str,
        principal: Principal,
        *,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        expected: int | None = None,
    ) -> ExperimentRecord:
        """As `stop_experiment`, because an arm does harm."""
        return self._end(name, "rolled_back", None, principal, reason, details, expected)

    def promote_arm(
        self,
        name: str,
        arm: str,
        principal: Principal,
        *,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        expected: int | None = None,
    ) -> ExperimentRecord:
        """Ends it with a winner: the alias moves to that arm's version, and everybody is answered by the arm.

        Raises InvalidExperiment for an unknown arm, Conflict where its version was deleted.
        """
        return self._end(name, "promoted", arm, principal, reason, details, expected)

    def reweight_experiment(
        self,
        name: str,
        weights: Mapping[str, float],
        principal: Principal,
        *,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        expected: int | None = None,
    ) -> ExperimentRecord:
        """Gives its arms other shares, moving as few units as that takes.

        Raises InvalidExperiment unless every arm has a weight above 0 and they sum to 1.
        """
        check_text("reason", reason)
        facts = _checked(details)
        with self.database.write() as connection:
            at = self._now()
            splits.reweight(connection, name, weights, principal, at, reason=reason, details=facts, expected=expected)
            return keeping.read_record(connection, name)

    def recommend(
        self,
        name: str,
        action: str,
        principal: Principal,
        *,
        reason: str = "",
        details: Mapping[str, Any] | None = None,
        expected: int | None = None,
    ) -> ExperimentRecord:
        """Writes down what a rule would have done, and does nothing else; also this is a new revision."""
        check_text("reason", reason)
        facts = {**_checked(details), "action": action}
        with self.database.write() as connection:
            row = keeping.running_row(connection, name, expected)
            keeping.write_change(connection, row, "recommend", principal, self._now(), reason=reason, details=facts)
            return keeping.read_record(connection, name)

    def experiments(self, task: str | None = None) -> list[ExperimentRecord]:
        """All, or those of one task; those that started last first. Raises UnknownTask, SchemaMismatch."""
        with self.database.read() as connection:
            if task is not None:
                require_task(connection, task)
            return keeping.read_records(connection, task)

    def running_experiments(self) -> list[str]:
        """The names of those that run, also where their document cannot be read."""
        with self.database.read() as connection:
            return keeping.running_names(connection)

    def experiment(self, name: str) -> ExperimentRecord:
        """Raises SchemaMismatch."""
        with self.database.read() as connection:
            return keeping.read_record(connection, name)

    def experiment_history(self, name: str) -> list[ExperimentEvent]:
        """Newest first."""
        with self.database.read() as connection:
            return keeping.read_history(connection, name)

    def _end(
        self,
        name: str,
        state: ending.EndState,
        winner: str | None,
        principal: Principal,
        reason: str,
        details: Mapping[str, Any] | None,
        expected: int | None,
    ) -> ExperimentRecord:
        check_text("reason", reason)
        facts = _checked(details)
        with self.database.write() as connection:
            at = self._now()
            ending.end(
                connection, name, state, principal, at, winner=winner, reason=reason, details=facts, expected=expected
            )
            return keeping.read_record(connection, name)


def _checked(details: Mapping[str, Any] | None) -> dict[str, Any]:
    facts = dict(details or {})
    check_texts("details", facts)
    finite: dict[str, Any] = _finite(facts)
    return finite


def _finite(value: Any) -> Any:
    """The value with None for infinite numbers, as bounds are while little is known: JSON has none."""
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
    return value
