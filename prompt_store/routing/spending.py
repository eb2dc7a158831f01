"""What each day's answers cost, by task and backend: sums that many replicas add to. No change is logged for them."""

import math
from collections import defaultdict
from collections.abc import Iterable
from datetime import date

from sqlalchemy import Connection, select

from prompt_store.database import insert_into
from prompt_store.errors import InvalidArtifact
from prompt_store.tables import spending

Spent = tuple[date, str, str, float]
"""Day, task, backend, and an amount in the currency of the settings' prices."""


def add(connection: Connection, spent: Iterable[Spent]) -> None:
    """Adds to what the days have already. Raises InvalidArtifact for an amount that is none."""
    sums: defaultdict[tuple[date, str, str], list[float]] = defaultdict(list)
    for day, task, backend, amount in spent:
        if not 0.0 <= amount < math.inf:
            raise InvalidArtifact(f"backend {backend!r} cannot have cost {amount!r}; give an amount of 0 or more")
        sums[day, task, backend].append(amount)
    rows = [
        {"day": day, "task": task, "backend": backend, "amount": math.fsum(amounts)}
        for (day, task, backend), amounts in sorted(sums.items())
    ]
    if not rows:
        return
    addition = insert_into(connection, spending)
    connection.execute(
        addition.on_conflict_do_update(
            index_elements=list(spending.primary_key),
            set_={"amount": spending.c.amount + addition.excluded.amount},
        ),
        rows,
    )


def read(connection: Connection, day: date) -> dict[tuple[str, str], float]:
    """What that day cost so far, by task and backend."""
    rows = connection.execute(select(spending).where(spending.c.day == day))
    return {(row.task, row.backend): row.amount for row in rows}
