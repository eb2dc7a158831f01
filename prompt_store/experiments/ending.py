"""Ending an experiment: its split leaves the route, and where an arm won, the alias moves to what it answered with."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row

from prompt_store.access import Principal
from prompt_store.errors import Conflict, InvalidExperiment, UnknownVersion, nearest_name
from prompt_store.experiments.experiment import Experiment
from prompt_store.experiments.keeping import pinned_versions, running_row, to_experiment, write_change
from prompt_store.prompts.aliases import set_alias
from prompt_store.prompts.lookup import find_digest
from prompt_store.routing.revisions import read_numbered_route, read_route, write_route
from prompt_store.routing.rewriting import splits, with_leaves, without_split
from prompt_store.routing.routes import DirectRoute, Route, leaves

EndState = Literal["stopped", "promoted", "rolled_back"]

_ACTIONS: dict[EndState, str] = {"stopped": "stop", "promoted": "promote", "rolled_back": "roll_back"}
_IN_WORDS: dict[EndState, str] = {"stopped": "stopped", "promoted": "promoted arm {!r}", "rolled_back": "rolled back"}


def end(
    connection: Connection,
    name: str,
    state: EndState,
    principal: Principal,
    at: datetime,
    *,
    winner: str | None,
    reason: str,
    details: Mapping[str, Any],
    expected: int | None,
) -> None:
    """Ends a running experiment, with the arm `winner` where it is promoted.

    A route that lost the split meanwhile, as an older release may have applied it, stays as it is; the history says so.
    Raises UnknownExperiment, Conflict, InvalidExperiment for an unknown arm, SchemaMismatch.
    """
    row = running_row(connection, name, expected)
    experiment = to_experiment(row)
    pins = pinned_versions(row)
    said = f"experiment {name!r} {_IN_WORDS[state].format(winner)}" + (f": {reason}" if reason else "")
    facts = dict(details)
    before = read_numbered_route(connection, row.task, row.route_before)
    if winner is not None:
        if winner not in pins:
            nearest = nearest_name(winner, pins)
            hint = f"did you mean {nearest!r}?" if nearest is not None else f"it has {', '.join(pins)}"
            raise InvalidExperiment(f"experiment {name!r} has no arm {winner!r}; {hint}")
        facts |= {"arm": winner}
        version = _winning_version(experiment, winner, pins, before.route)
        if version is not None:
            facts |= _move_alias(connection, row, experiment, winner, version, said, principal, at)
        instead = _route_of_winner(experiment, winner, pins, before.route)
    else:
        instead = before.route if experiment.arms else _original(experiment, experiment.control, before.route)
    ended = {"state": state, "ended_at": at, "ended_by": principal.name, "reason": reason, "winner": winner}
    in_force = read_route(connection, row.task)
    if in_force is None or not any(split.experiment == name for _, split in splits(in_force.route.route)):
        facts["route"] = "had lost the experiment's split already, and stays as it is"
    else:
        facts["route"] = "without the experiment's split"
    write_change(connection, row, _ACTIONS[state], principal, at, reason=reason, details=facts, columns=ended)
    if in_force is not None:
        route = without_split(in_force.route.route, name, instead)
        restored = in_force.route.model_copy(update={"route": route})
        # Then going back from it goes to what was in force before that, and not to the experiment.
        restores = row.route_before if row.route_before and restored == before else None
        write_route(connection, row.task, restored, principal, at, reason=said, restores=restores)


def _move_alias(
    connection: Connection,
    row: Row[Any],
    experiment: Experiment,
    winner: str,
    version: str,
    reason: str,
    principal: Principal,
    at: datetime,
) -> dict[str, Any]:
    """Points the experiment's alias at the winning version; what the history is to say of it. Raises Conflict."""
    try:
        digest = find_digest(connection, row.task, version)
    except UnknownVersion as error:
        raise Conflict(
            f"arm {winner!r} of experiment {row.name!r} is version {version} of task {row.task!r}, which was deleted "
            f"since; end the experiment with `softcue experiments stop {row.name}`, or publish that version again and "
            "start another one",
            current=str(row.revision),
        ) from error
    set_alias(connection, row.task, experiment.alias, digest, reason=reason, principal=principal, at=at)
    return {"alias": experiment.alias, "version": version}


def _winning_version(
    experiment: Experiment, winner: str, pins: Mapping[str, Sequence[str]], before: Route
) -> str | None:
    """The label that the alias moves to: what the arm has in the alias's place, and in a route of its own the first.

    None where the arm is the task's route and no leaf of that names the alias.
    """
    labels = pins[winner]
    if _has_own_route(experiment, winner):
        return labels[0]
    at_alias = (
        label for label, (_, leaf) in zip(labels, leaves(before), strict=True) if leaf.version == experiment.alias
    )
    return next(at_alias, None)


def _route_of_winner(experiment: Experiment, winner: str, pins: Mapping[str, Sequence[str]], before: Route) -> Route:
    """What takes the place of the split: the route from before, or the winner's own, by the names that it had.

    There the alias stands for the winning version. A leaf that named it for another stays with the number that it was
    pinned to, as that is what was measured.
    """
    if not _has_own_route(experiment, winner):
        return before
    labels = iter(pins[winner])
    winning = pins[winner][0]

    def rename(leaf: DirectRoute) -> str:
        label = next(labels)
        if label == winning:
            return experiment.alias
        return label if leaf.version == experiment.alias else leaf.version

    return with_leaves(_original(experiment, winner, before), rename)


def _has_own_route(experiment: Experiment, arm: str) -> bool:
    return not experiment.arms or any(each.name == arm and each.route is not None for each in experiment.arms)


def _original(experiment: Experiment, arm: str, before: Route) -> Route:
    """The route of an arm with one of its own, as it was before versions were pinned."""
    own = next((each.route for each in experiment.arms if each.name == arm), None)
    if own is not None:
        return own
    split = next(found for _, found in splits(before) if found.experiment == experiment.name)
    return next(each.route for each in split.arms if each.name == arm)
