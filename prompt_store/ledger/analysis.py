"""An experiment's sums, added up by the database: everything that a report needs in five statements.

A unit is looked up once and met with the means of all its values; nothing is joined by request. Clocks of replicas only
order a unit's exposures under one allocation, where it has one arm, and place it on the axis of time.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Float,
    Integer,
    RowMapping,
    Table,
    case,
    cast,
    func,
    literal,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.dialects.postgresql import distinct_on

from prompt_store.ledger.automatic import AUTOMATIC, CANCELLED
from prompt_store.ledger.entries import HOLDOUT
from prompt_store.ledger.sums import AllocationCount, ExperimentSums, ServedCount, UnitSums
from prompt_store.tables import allocations, answers, exposures, outcomes

_INTERVALS = 60
_VERSION_DIGITS = 16
_PRODUCTS = ("valued", "y", "yy", "k", "ky", "x", "xx", "xy")

# Sorts of some 100 MB; statements whose compilation would take longer than they do; a whole index, read in its order;
# and joins of as many rows as there are units, which PostgreSQL takes for a few hundred.
_SETTINGS = "work_mem = '256MB'", "jit = off", "random_page_cost = 1.1", "enable_nestloop = off"

Missing = Literal["ignore", "zero"]


def experiment_sums(
    connection: Connection, name: str, task: str, metrics: Sequence[str], *, missing: Missing, started_ms: int
) -> ExperimentSums:
    """All sums of an experiment on a task. `served` has means of the first of `metrics`.

    With `missing="zero"` a unit without a reported value has 0; automatic metrics are known of every answer, so a unit
    without one had no answer, and is left out in any case.
    """
    if connection.dialect.name == "postgresql":
        for setting in _SETTINGS:
            connection.execute(text(f"SET LOCAL {setting}"))
    rows = _sums(connection, name, task, metrics, missing, started_ms)
    forced, held_out = _apart(connection, name)
    counts: defaultdict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        counts[row["allocation"]][row["arm"]] += row["units"]
    return ExperimentSums(
        metrics={metric: _weighted(rows, place) for place, metric in enumerate(metrics)},
        allocations=_allocations(connection, task, name, counts),
        served=_served(connection, name, metrics[0]),
        exposures=int(rows[0]["exposures"]) if rows else 0,
        crossed=int(rows[0]["crossed"]) if rows else 0,
        forced=forced,
        held_out=held_out,
    )


def _apart(connection: Connection, name: str) -> tuple[int, int]:
    """Forced exposures, and units that were held out."""
    row = connection.execute(
        select(
            func.coalesce(func.sum(cast(exposures.c.forced, Integer)), 0),
            func.count(case((~exposures.c.forced, exposures.c.unit_hash)).distinct()),
        ).where(exposures.c.experiment == name, or_(exposures.c.forced, exposures.c.arm == HOLDOUT))
    ).one()
    return int(row[0]), int(row[1])


def _sums(
    connection: Connection, name: str, task: str, metrics: Sequence[str], missing: Missing, started_ms: int
) -> Sequence[RowMapping]:
    """A row for each arm, allocation, probability and interval of time of units' first exposures.

    A metric's sums are named by its place. Every row has the number of all exposures, and of units in several arms.
    """
    seen = _seen(name)
    units = _units(connection, seen)
    joined: Any = units
    values: dict[str, tuple[ColumnElement[Any], ColumnElement[Any]]] = {}
    for table, listed in (
        (outcomes, [metric for metric in metrics if metric not in AUTOMATIC]),
        (answers, [metric for metric in metrics if metric in AUTOMATIC]),
    ):
        if not listed:
            continue
        within, before = _means(table, name, task, listed, started_ms)
        joined = joined.outerjoin(within, within.c.unit_hash == units.c.unit_hash)
        joined = joined.outerjoin(before, before.c.unit_hash == units.c.unit_hash)
        for metric in listed:
            y: ColumnElement[Any] = within.c[metric]
            if missing == "zero" and metric not in AUTOMATIC:
                y = func.coalesce(y, 0.0)
            values[metric] = y, before.c[metric]
    ends = select(func.min(units.c.at_ms).label("first_ms"), func.max(units.c.at_ms).label("last_ms")).cte("ends")
    first_ms, last_ms = (select(end).scalar_subquery() for end in ends.c)
    length_ms = (last_ms - first_ms + _INTERVALS) // _INTERVALS
    since_ms = (first_ms + (units.c.at_ms - first_ms) // length_ms * length_ms).label("since_ms")
    crossed = select(func.count(seen.c.unit_hash.distinct())).where(
        seen.c.unit_hash == units.c.unit_hash, seen.c.arm != units.c.arm
    )
    by = units.c.arm, units.c.allocation, units.c.probability, since_ms
    query = select(
        *by,
        select(func.sum(seen.c.exposures)).scalar_subquery().label("exposures"),
        crossed.correlate(None).scalar_subquery().label("crossed"),
        func.count().label("units"),
        *(
            total.label(f"{product}{place}")
            for place, metric in enumerate(metrics)
            for product, total in zip(_PRODUCTS, _products(*values[metric]), strict=True)
        ),
    )
    return connection.execute(query.select_from(joined).group_by(*by)).mappings().all()


def _products(y: ColumnElement[Any], x: ColumnElement[Any]) -> tuple[ColumnElement[Any], ...]:
    """The sums over units of _PRODUCTS. A product with a value that is not there is NULL, and no part of its sum."""
    x = case((y.is_not(None), x))
    both = case((x.is_not(None), y))
    return (
        *(func.count(y), func.sum(y), func.sum(y * y)),
        *(func.count(x), func.sum(both), func.sum(x), func.sum(x * x), func.sum(x * y)),
    )


def _weighted(rows: Sequence[RowMapping], place: int) -> list[UnitSums]:
    """One metric's, of all allocations together."""
    added: defaultdict[tuple[int, str], defaultdict[str, float]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        w = 1.0 / row["probability"]
        ww, units = w * w, row["units"]
        valued, y, yy, k, ky, x, xx, xy = (row[f"{product}{place}"] or 0 for product in _PRODUCTS)
        products = {
            "units": units, "uw": units * w, "uww": units * ww,
            "valued": valued, "w": valued * w, "wy": w * y, "ww": valued * ww, "wwy": ww * y, "wwyy": ww * yy,
            "k": k, "kw": k * w, "kww": k * ww, "kwwy": ww * ky, "wx": w * x, "wwx": ww * x, "wwxx": ww * xx,
            "wwxy": ww * xy,
        }  # fmt: skip
        into = added[row["since_ms"], row["arm"]]
        for name, product in products.items():
            into[name] += product
    return [UnitSums(arm, since_ms, **added[since_ms, arm]) for since_ms, arm in sorted(added)]  # type: ignore[arg-type]


def _seen(name: str) -> CTE:
    """What units were exposed to, and since when: a row for each unit under each allocation, where it has one arm.

    All that is asked of exposures is asked of this: it alone goes through them.
    """
    who = exposures.c.unit_hash, exposures.c.allocation, exposures.c.arm, exposures.c.probability
    counts = func.count().label("exposures"), func.min(exposures.c.at_ms).label("at_ms")
    drawn = exposures.c.experiment == name, ~exposures.c.forced, exposures.c.arm != HOLDOUT
    return select(*who, *counts).where(*drawn).group_by(*who).cte("seen")


def _units(connection: Connection, seen: CTE) -> CTE:
    """A row for each unit: its first exposure."""
    order = seen.c.allocation, seen.c.at_ms, seen.c.arm, seen.c.probability
    wanted = seen.c.unit_hash, seen.c.arm, seen.c.allocation, seen.c.at_ms, seen.c.probability
    if connection.dialect.name == "postgresql":
        query = select(*wanted).ext(distinct_on(seen.c.unit_hash))
        return query.order_by(seen.c.unit_hash, *order).cte("units")
    rank = func.row_number().over(partition_by=seen.c.unit_hash, order_by=order).label("rank")
    ranked = select(*wanted, rank).subquery()
    return select(*(ranked.c[column.name] for column in wanted)).where(ranked.c.rank == 1).cte("units")


def _means(table: Table, name: str, task: str, metrics: Sequence[str], started_ms: int) -> tuple[CTE, CTE]:
    """A row for each unit with its mean of each metric: within the experiment, and on the task before it."""
    values: dict[str, ColumnElement[Any]]
    wanted: ColumnElement[bool] = true()
    if table is outcomes:
        values = {metric: case((outcomes.c.metric == metric, outcomes.c.value)) for metric in metrics}
        moment, wanted = outcomes.c.generated_ms, outcomes.c.metric.in_(metrics)
    else:
        values = {metric: AUTOMATIC[metric].value for metric in metrics}
        moment = answers.c.at_ms
    # Quicker than avg, which PostgreSQL has keep a sum of squares too.
    columns = [(func.sum(value) / cast(func.count(value), Float)).label(metric) for metric, value in values.items()]
    query = select(table.c.unit_hash, *columns).where(wanted).group_by(table.c.unit_hash)
    return (
        query.where(table.c.experiment == name).cte(f"{table.name}_within"),
        query.where(table.c.task == task, table.c.experiment != name, moment < started_ms).cte(f"{table.name}_before"),
    )


def _allocations(
    connection: Connection, task: str, name: str, counts: dict[int, dict[str, int]]
) -> list[AllocationCount]:
    """Of allocations that the store has; those of number 0, made up where another release changed a split, are not."""
    rows = connection.execute(
        select(allocations.c.number, allocations.c.weights)
        .where(allocations.c.task == task, allocations.c.experiment == name)
        .order_by(allocations.c.number)
    )
    return [
        AllocationCount(row.number, weights, {arm: counts[row.number].get(arm, 0) for arm in weights})
        for row in rows
        if row.number in counts and (weights := json.loads(row.weights))
    ]


def _served(connection: Connection, name: str, metric: str) -> list[ServedCount]:
    """What answered for each arm. A reported metric's mean is a version's, told where one backend answered by it."""
    who = answers.c.arm, answers.c.version, answers.c.backend
    value = AUTOMATIC[metric].value if metric in AUTOMATIC else cast(literal(None), Float)
    units = (
        select(*who, func.count().label("n"), func.sum(value).label("total"), func.count(value).label("known"))
        .where(answers.c.experiment == name, answers.c.outcome != CANCELLED, answers.c.arm != HOLDOUT)
        .group_by(*who, answers.c.unit_hash)
        .subquery()
    )
    by = units.c.arm, units.c.version, units.c.backend
    rows = connection.execute(
        select(*by, func.sum(units.c.n), func.count(), func.sum(units.c.total), func.sum(units.c.known))
        .group_by(*by)
        .order_by(*by)
    ).all()
    means: dict[tuple[str, str], float] = {}
    if metric not in AUTOMATIC:
        reported = select(outcomes.c.arm, outcomes.c.version, func.avg(outcomes.c.value)).where(
            outcomes.c.experiment == name, outcomes.c.metric == metric, outcomes.c.value.is_not(None)
        )
        for arm, version, mean in connection.execute(reported.group_by(outcomes.c.arm, outcomes.c.version)):
            means[arm, version] = mean
    served = []
    for arm, version, backend, generations, seen, total, known in rows:
        mean = float(total) / int(known) if known else None
        alone = sum(row[:2] == (arm, version) for row in rows) == 1
        if metric not in AUTOMATIC and alone:
            mean = means.get((arm, version[:_VERSION_DIGITS]))
        served.append(ServedCount(arm, version, backend, int(generations), int(seen), mean))
    return served
