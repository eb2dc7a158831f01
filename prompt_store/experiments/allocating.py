"""Allocations as the store keeps them: numbered by task and split, the newest in force."""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, tuple_

from prompt_store.access import Principal
from prompt_store.canonical import canonical_json
from prompt_store.experiments.allocations import SPAN, Allocation, initial, reallocate
from prompt_store.experiments.records import NumberedAllocation
from prompt_store.prompts.unreadable import Unreadable, readable
from prompt_store.routing.rewriting import splits
from prompt_store.routing.routes import Route, SplitRoute
from prompt_store.tables import allocations


def read_allocations(
    connection: Connection, tasks: Collection[str] | None = None
) -> defaultdict[str, dict[str, NumberedAllocation | Unreadable]]:
    """The newest of every split by task and the split's name, or those of the splits of `tasks`."""
    key = allocations.c.task, allocations.c.experiment
    newest = select(*key, func.max(allocations.c.number)).group_by(*key)
    if tasks is not None:
        newest = newest.where(allocations.c.task.in_(tasks))
    found: defaultdict[str, dict[str, NumberedAllocation | Unreadable]] = defaultdict(dict)
    for row in connection.execute(select(allocations).where(tuple_(*key, allocations.c.number).in_(newest))):
        try:
            found[row.task][row.experiment] = NumberedAllocation(row.number, to_allocation(row))
        except ValueError as error:
            where = f"allocation {row.number} of split {row.experiment!r} of task {row.task!r}"
            found[row.task][row.experiment] = Unreadable(f"{where} is damaged: {error}; restore a backup")
    return found


def newest_allocation(connection: Connection, task: str, split: str) -> NumberedAllocation | None:
    """None where the split has none. Raises SchemaMismatch where it is damaged."""
    found = read_allocations(connection, [task])[task].get(split)
    return readable(found) if found is not None else None


def allocate(
    connection: Connection, task: str, split: str, weights: Mapping[str, float], principal: Principal, at: datetime
) -> NumberedAllocation:
    """The allocation of a split with these weights: the newest where it has them already, else the next one.

    The caller records the change. Raises SchemaMismatch where the newest is damaged.
    """
    newest = newest_allocation(connection, task, split)
    allocation = initial(weights) if newest is None else reallocate(newest.allocation, weights)
    if newest is not None and allocation == newest.allocation:
        return newest
    number = 1 if newest is None else newest.number + 1
    connection.execute(
        insert(allocations).values(
            task=task,
            experiment=split,
            number=number,
            weights=canonical_json(dict(allocation.weights)).decode(),
            parts=canonical_json(allocation.parts).decode(),
            at=at,
            principal=principal.name,
        )
    )
    return NumberedAllocation(number, allocation)


def allocations_in_force(
    route: Route, stored: Mapping[str, NumberedAllocation | Unreadable], running: Collection[str]
) -> dict[str, NumberedAllocation]:
    """One for each split of a route by its name, given the newest stored ones and the experiments that run.

    Where an experiment runs, its stored weights rule over the route's. Else, where the split has other weights or arms
    than those stored, as an older release may have applied it, the allocation follows the split and has the number 0.
    Raises SchemaMismatch where one of the route's splits has a damaged allocation.
    """
    found: dict[str, NumberedAllocation] = {}
    for _, split in splits(route):
        weights = weights_of(split)
        if split.experiment not in stored:
            found[split.experiment] = NumberedAllocation(0, initial(weights))
            continue
        newest = readable(stored[split.experiment])
        ruling = split.experiment in running and newest.allocation.weights.keys() == weights.keys()
        allocation = newest.allocation if ruling else reallocate(newest.allocation, weights)
        found[split.experiment] = newest if allocation == newest.allocation else NumberedAllocation(0, allocation)
    return found


def weights_of(split: SplitRoute) -> dict[str, float]:
    """By arm, in the order of the route."""
    return {arm.name: arm.weight for arm in split.arms}


def to_allocation(row: Row[Any]) -> Allocation:
    """Raises ValueError, saying what is wrong, for columns that are damaged."""
    try:
        found = Allocation(dict(json.loads(row.weights)), tuple((end, arm) for end, arm in json.loads(row.parts)))
        ends = [0, *(end for end, _ in found.parts)]
        whole = ends[-1] == SPAN and all(start < end for start, end in pairwise(ends))
        known = {arm for _, arm in found.parts} <= found.weights.keys()
    except (ValueError, TypeError) as error:
        raise ValueError("its weights or parts cannot be read") from error
    if not (whole and known):
        raise ValueError("its parts do not give every unit one of its arms")
    return found
