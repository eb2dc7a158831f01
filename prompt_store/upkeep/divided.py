"""Checking experiments, and the allocations by which splits divide all units."""

from collections.abc import Iterator
from itertools import groupby

from sqlalchemy import select

from prompt_store.errors import SchemaMismatch
from prompt_store.experiments.allocating import to_allocation
from prompt_store.experiments.keeping import pinned_versions, to_experiment
from prompt_store.tables import allocations, experiments, route_revisions
from prompt_store.upkeep.problems import RESTORE, Checked, Problem, Reader, refused_document


def check_experiments(reader: Reader, _: Checked) -> Iterator[Problem]:
    """Every experiment can be read, is of the name and task of its row, and has a route to go back to."""
    routes = {(row.task, row.number) for row in reader.rows(select(route_revisions.c.task, route_revisions.c.number))}
    for row in reader.rows(select(experiments).order_by(experiments.c.name)):
        where = f"experiment {row.name!r}"
        try:
            found = to_experiment(row)
        except SchemaMismatch as error:
            yield refused_document(where, "its document", error.__cause__)
            continue
        if (found.name, found.task) != (row.name, row.task):
            text = f"its document is of {found.name!r} on task {found.task!r}"
            yield Problem("contradictory", where, text, RESTORE)
        try:
            arms = pinned_versions(row)
        except (ValueError, TypeError):
            yield Problem("damaged", where, "the versions of its arms cannot be read", RESTORE)
            continue
        if found.control not in arms:
            yield Problem("contradictory", where, f"no arm of it is its control {found.control!r}", RESTORE)
        if row.route_before and (row.task, row.route_before) not in routes:
            text = f"route {row.route_before} of its task, which was in force before it, is not there"
            yield Problem("missing", where, text, RESTORE)


def check_allocations(reader: Reader, _: Checked) -> Iterator[Problem]:
    """Every allocation gives each unit to one of its arms, and their numbers have no gap."""
    query = select(allocations).order_by(allocations.c.task, allocations.c.experiment, allocations.c.number)
    for (task, split), rows in groupby(reader.rows(query), key=lambda row: (row.task, row.experiment)):
        for number, row in enumerate(rows, 1):
            where = f"allocation {row.number} of split {split!r} of task {task!r}"
            if row.number != number:
                yield Problem("missing", where, f"it follows number {number - 1}", RESTORE)
                break
            try:
                to_allocation(row)
            except ValueError as error:
                yield Problem("damaged", where, str(error), RESTORE)
