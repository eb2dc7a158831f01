"""How the arms of an experiment fared in its last minutes."""

from __future__ import annotations

from sqlalchemy import Connection, Integer, case, cast, func, select

from prompt_store.ledger.automatic import CANCELLED, ERROR
from prompt_store.ledger.sums import MinuteHealth
from prompt_store.tables import answers

_MINUTE_MS = 60_000


def health(connection: Connection, name: str, since_ms: int) -> list[MinuteHealth]:
    """By minute and arm, of requests that ended since then by the clocks of their replicas; cancelled ones apart.

    The percentile is the smallest latency that 95 of 100 answers do not exceed.
    """
    minute = (answers.c.at_ms // _MINUTE_MS).label("minute")
    failed = answers.c.outcome == ERROR
    group = answers.c.arm, minute, failed
    ranked = (
        select(
            answers.c.arm,
            minute,
            cast(failed, Integer).label("failed"),
            answers.c.latency_ms,
            func.row_number().over(partition_by=group, order_by=answers.c.latency_ms).label("rank"),
            func.count().over(partition_by=group).label("of"),
        )
        .where(answers.c.experiment == name, answers.c.at_ms >= since_ms, answers.c.outcome != CANCELLED)
        .subquery()
    )
    in_the_tail = (ranked.c.failed == 0) & (ranked.c.rank * 100 >= ranked.c.of * 95)
    query = (
        select(
            ranked.c.arm,
            ranked.c.minute,
            func.count(),
            func.sum(ranked.c.failed),
            func.min(case((in_the_tail, ranked.c.latency_ms))),
        )
        .group_by(ranked.c.arm, ranked.c.minute)
        .order_by(ranked.c.minute, ranked.c.arm)
    )
    return [
        MinuteHealth(arm, int(minute), int(requests), int(errors), p95)
        for arm, minute, requests, errors, p95 in connection.execute(query)
    ]
