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
    and_,
    case,
    cast,
    func,
    literal,
    or_,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import distinct_on

from prompt_store.ledger.automatic import AUTOMATIC, CANCELLED
from prompt_store.ledger.entries import HOLDOUT
from prompt_store.ledger.sums import AllocationCount, ExperimentSums, ServedCount, UnitSums
from prompt_store.tables import allocations, answers, exposures, outcomes

_INTERVALS = 60
_VERSION_DIGITS = 16

Missing = Literal["ignore", "zero"]


def experiment_sums(
    connection: Connection, name: str, task: str, metrics: Sequence[str], *, missing: Missing, started_ms: int
) -> ExperimentSums:
    """All sums of an experiment on a task. `served` has means of the first of `metrics`.

    With `missing="zero"` a unit without a reported value has 0; automatic metrics are known of every answer, so a unit
    without one had no answer, and is left out in any case.
    """
    if connection.dialect.name == "postgresql":
        # Sorts of some 100 MB, and statements whose compilation would take longer than they do.
        connection.execute(text("SET LOCAL work_mem = '256MB'"))
        connection.execute(text("SET LOCAL jit = off"))
    exposed, crossed, first_ms, last_ms = _overview(connection, name)
    forced, held_out = _apart(connection, name)
    sums, counts = _sums(connection, name, task, metrics, missing, started_ms, (first_ms, last_ms))
    return ExperimentSums(
        metrics=sums,
        allocations=_allocations(connection, task, name, counts),
        served=_served(connection, name, metrics[0]),
        exposures=exposed,
        crossed=crossed,
        forced=forced,
        held_out=held_out,
    )


def _drawn(name: str) -> ColumnElement[bool]:
    return and_(exposures.c.experiment == name, ~exposures.c.forced, exposures.c.arm != HOLDOUT)


def _overview(connection: Connection, name: str) -> tuple[int, int, int, int]:
    """Exposures, units that saw several arms, and when the first and the last unit was first exposed."""
    units = (
        select(
            func.count().label("exposures"),
            case((func.min(exposures.c.arm) != func.max(exposures.c.arm), 1), else_=0).label("crossed"),
            func.min(exposures.c.at_ms).label("since"),
        )
        .where(_drawn(name))
        .group_by(exposures.c.unit_hash)
        .subquery()
    )
    row = connection.execute(
        select(
            func.coalesce(func.sum(units.c.exposures), 0),
            func.coalesce(func.sum(units.c.crossed), 0),
            func.coalesce(func.min(units.c.since), 0),
            func.coalesce(func.max(units.c.since), 0),
        )
    ).one()
    return int(row[0]), int(row[1]), int(row[2]), int(row[3])


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
    connection: Connection,
    name: str,
    task: str,
    metrics: Sequence[str],
    missing: Missing,
    started_ms: int,
    span_ms: tuple[int, int],
) -> tuple[dict[str, list[UnitSums]], dict[int, dict[str, int]]]:
    """By metric, and how many units each arm has by the allocation of their first exposure."""
    units = _units(connection, name)
    reported = [metric for metric in metrics if metric not in AUTOMATIC]
    automatic = [metric for metric in metrics if metric in AUTOMATIC]
    joined: Any = units
    values: dict[str, tuple[ColumnElement[Any], ColumnElement[Any]]] = {}
    for named, means in (
        (reported, _reported(name, task, reported, started_ms)),
        (automatic, _automatic(name, task, automatic, started_ms)),
    ):
        if named:
            joined = joined.outerjoin(means, means.c.unit_hash == units.c.unit_hash)
            for place, metric in enumerate(named):
                y: ColumnElement[Any] = means.c[f"y{place}"]
                if missing == "zero" and named is reported:
                    y = func.coalesce(y, 0.0)
                values[metric] = y, means.c[f"x{place}"]
    first_ms, last_ms = span_ms
    length_ms = max(1, -(-(last_ms + 1 - first_ms) // _INTERVALS))
    interval = (units.c.at_ms - first_ms) // length_ms
    w = units.c.w
    columns = [func.count().label("units"), func.sum(w).label("uw"), func.sum(w * w).label("uww")]
    products = {metric: _products(w, *pair) for metric, pair in values.items()}
    columns += [
        column.label(f"{place}_{product}")
        for place, metric in enumerate(metrics)
        for product, column in products[metric].items()
    ]
    grouped = select(units.c.arm, units.c.allocation, interval.label("interval"), *columns)
    rows = connection.execute(
        grouped.select_from(joined).group_by(units.c.arm, units.c.allocation, interval)
    ).mappings()
    sums: dict[str, dict[tuple[str, int], dict[str, float]]] = {metric: {} for metric in metrics}
    counts: defaultdict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        counts[row["allocation"]][row["arm"]] += row["units"]
        key = row["arm"], first_ms + int(row["interval"]) * length_ms
        for place, metric in enumerate(metrics):
            into = sums[metric].setdefault(key, defaultdict(float))
            for product in ("units", "uw", "uww"):
                into[product] += row[product]
            for product in products[metric]:
                into[product] += row[f"{place}_{product}"] or 0.0
    return {metric: _listed(by_key) for metric, by_key in sums.items()}, dict(counts)


def _listed(by_key: dict[tuple[str, int], dict[str, float]]) -> list[UnitSums]:
    whole = ("units", "valued", "k")
    return [
        UnitSums(arm, since_ms, **{name: int(value) if name in whole else value for name, value in found.items()})  # type: ignore[arg-type]
        for (arm, since_ms), found in sorted(by_key.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


def _units(connection: Connection, name: str) -> CTE:
    """A row for each unit: its first exposure."""
    order = exposures.c.allocation, exposures.c.at_ms, exposures.c.request
    w = (literal(1.0) / exposures.c.probability).label("w")
    wanted = exposures.c.unit_hash, exposures.c.arm, exposures.c.allocation, exposures.c.at_ms, w
    if connection.dialect.name == "postgresql":
        query = select(*wanted).ext(distinct_on(exposures.c.unit_hash)).where(_drawn(name))
        return query.order_by(exposures.c.unit_hash, *order).cte("units")
    rank = func.row_number().over(partition_by=exposures.c.unit_hash, order_by=order).label("rank")
    ranked = select(*wanted, rank).where(_drawn(name)).subquery()
    return select(*(ranked.c[column.name] for column in wanted)).where(ranked.c.rank == 1).cte("units")


def _reported(name: str, task: str, metrics: Sequence[str], started_ms: int) -> CTE:
    """A row for each unit with its mean of each metric: y0, y1, ... within the experiment, x0, x1, ... before it."""
    within = outcomes.c.experiment == name
    before = and_(outcomes.c.task == task, ~within, outcomes.c.generated_ms < started_ms)
    columns = []
    for place, metric in enumerate(metrics):
        of_metric = outcomes.c.metric == metric
        columns.append(func.avg(case((and_(within, of_metric), outcomes.c.value))).label(f"y{place}"))
        columns.append(func.avg(case((and_(before, of_metric), outcomes.c.value))).label(f"x{place}"))
    query = select(outcomes.c.unit_hash, *columns).where(outcomes.c.metric.in_(metrics), or_(within, before))
    return query.group_by(outcomes.c.unit_hash).cte("reported")


def _automatic(name: str, task: str, metrics: Sequence[str], started_ms: int) -> CTE:
    """The same of automatic metrics."""
    within = answers.c.experiment == name
    before = and_(answers.c.task == task, ~within, answers.c.at_ms < started_ms)
    columns = []
    for place, metric in enumerate(metrics):
        value = AUTOMATIC[metric].value
        columns.append(func.avg(case((within, value))).label(f"y{place}"))
        columns.append(func.avg(case((before, value))).label(f"x{place}"))
    query = select(answers.c.unit_hash, *columns).where(or_(within, before))
    return query.group_by(answers.c.unit_hash).cte("automatic")


def _products(w: ColumnElement[Any], y: ColumnElement[Any], x: ColumnElement[Any]) -> dict[str, ColumnElement[Any]]:
    """The sums of UnitSums by name. A product with a value that is not there is NULL, and no part of its sum."""
    valued, both = y.is_not(None), and_(y.is_not(None), x.is_not(None))
    x = case((valued, x))
    return {
        "valued": func.count(y),
        "w": func.sum(case((valued, w))),
        "wy": func.sum(w * y),
        "ww": func.sum(case((valued, w * w))),
        "wwy": func.sum(w * w * y),
        "wwyy": func.sum(w * w * y * y),
        "k": func.count(x),
        "kw": func.sum(case((both, w))),
        "kww": func.sum(case((both, w * w))),
        "kwwy": func.sum(case((both, w * w * y))),
        "wx": func.sum(w * x),
        "wwx": func.sum(w * w * x),
        "wwxx": func.sum(w * w * x * x),
        "wwxy": func.sum(w * w * x * y),
    }


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
