"""What becomes of splits when a route is applied or weights change: allocations follow, experiments stay whole."""

import math
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, select

from prompt_store.access import Principal
from prompt_store.errors import Conflict, InvalidExperiment, nearest_name
from prompt_store.experiments.allocating import allocate, newest_allocation, weights_of
from prompt_store.experiments.keeping import RUNNING, ended_in_words, pinned_versions, running_row, write_change
from prompt_store.routing.rewriting import splits
from prompt_store.routing.routes import Route, SplitRoute, leaves
from prompt_store.tables import experiments


def check_splits(connection: Connection, task: str, before: Route | None, route: Route) -> None:
    """Holds a route that is to replace `before` (None where that cannot be read) against the task's experiments.

    Raises Conflict where one that runs would lose its split or have other arms, and where one that has ended would have
    its name used again. A split that an experiment has lost already is nothing to keep.
    """
    had, has = _by_name(before), _by_name(route)
    query = select(experiments).where(experiments.c.task == task).order_by(experiments.c.name)
    for row in connection.execute(query):
        split = has.get(row.name)
        if row.state != RUNNING:
            if split is not None:
                raise Conflict(
                    f"the split {row.name!r} has the name of an experiment that {ended_in_words(row)}, and what is "
                    "seen under a name is counted together; give the split another name, or go back to a route "
                    "without it",
                    current=row.name,
                )
        elif _breaks(row, before, had.get(row.name), split):
            fact = "changes arms of" if split is not None else "takes away"
            raise Conflict(
                f"experiment {row.name!r} runs on task {task!r}, and this route {fact} its split; end it first with "
                f"`softcue experiments stop {row.name}`, or leave the split {row.name!r} as the route in force has it",
                current=row.name,
            )


def allocate_splits(
    connection: Connection,
    task: str,
    before: Route | None,
    route: Route,
    principal: Principal,
    at: datetime,
    reason: str,
) -> None:
    """Gives every split of an applied route an allocation with its weights.

    Where an experiment runs, its own weights stay, until a route names others than the one before did: that is a
    reweight.
    """
    had = _by_name(before)
    running = {
        row.name: row
        for row in connection.execute(
            select(experiments).where(experiments.c.task == task, experiments.c.state == RUNNING)
        )
    }
    for name, split in _by_name(route).items():
        row = running.get(name)
        if row is None:
            allocate(connection, task, name, weights_of(split), principal, at)
        elif name not in had or weights_of(had[name]) != weights_of(split):
            _write_weights(connection, row, weights_of(split), principal, at, reason, {"by": "route"})


def reweight(
    connection: Connection,
    name: str,
    weights: Mapping[str, float],
    principal: Principal,
    at: datetime,
    *,
    reason: str,
    details: Mapping[str, Any],
    expected: int | None,
) -> None:
    """Gives the arms of a running experiment other shares; the weights that they have already write nothing.

    Raises UnknownExperiment, Conflict, InvalidExperiment.
    """
    row = running_row(connection, name, expected)
    _check_weights(name, weights, pinned_versions(row))
    _write_weights(connection, row, weights, principal, at, reason, details)


def _write_weights(
    connection: Connection,
    row: Row[Any],
    weights: Mapping[str, float],
    principal: Principal,
    at: datetime,
    reason: str,
    details: Mapping[str, Any],
) -> None:
    newest = newest_allocation(connection, row.task, row.name)
    allocated = allocate(connection, row.task, row.name, weights, principal, at)
    if newest is not None and allocated.number == newest.number:
        return
    before = dict(newest.allocation.weights) if newest is not None else None
    facts = {"before": before, "weights": dict(weights), "allocation": allocated.number}
    write_change(connection, row, "reweight", principal, at, reason=reason, details={**details, **facts})


def _check_weights(name: str, weights: Mapping[str, float], arms: Collection[str]) -> None:
    problems: list[str] = []
    for arm in weights.keys() - set(arms):
        nearest = nearest_name(arm, arms)
        hint = f"did you mean {nearest!r}?" if nearest is not None else f"it has {', '.join(arms)}"
        problems.append(f"experiment {name!r} has no arm {arm!r}; {hint}")
    missing = [arm for arm in arms if arm not in weights]
    if missing:
        problems.append(f"no weight was given for {', '.join(map(repr, missing))}; give one for every arm")
    for arm, weight in weights.items():
        if not 0.0 < weight <= 1.0:
            problems.append(f"arm {arm!r} cannot have the weight {weight!r}; give a share above 0, up to 1")
    whole = math.fsum(weights.values())
    if not problems and abs(whole - 1.0) > 1e-6:
        problems.append(f"the weights sum to {whole:.6g}; they must sum to 1")
    if problems:
        raise InvalidExperiment("; ".join(sorted(problems)))


def _by_name(route: Route | None) -> dict[str, SplitRoute]:
    return {split.experiment: split for _, split in splits(route)} if route is not None else {}


def _breaks(row: Row[Any], before: Route | None, had: SplitRoute | None, split: SplitRoute | None) -> bool:
    """Whether a running experiment could not go on with `split` in the place of the one that it `had`."""
    if split is None:
        return before is None or had is not None
    labels = {arm.name: tuple(leaf.version for _, leaf in leaves(arm.route)) for arm in split.arms}
    return labels != pinned_versions(row) or (had is not None and _routes(had) != _routes(split))


def _routes(split: SplitRoute) -> dict[str, Route]:
    return {arm.name: arm.route for arm in split.arms}
