"""`python -m benchmarks.store`: both databases, a table, and one JSON object as the last line.

In that object each figure is the worse of the two databases'; what each measured stands under its name.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.store import measuring
from benchmarks.store.filling import TASKS, VERSIONS, fill
from prompt_store.database import Database
from service.engines.base_model import open_base_model
from tests.postgresql import running_server

# What each figure may be at most; news may take longer where a database has to be asked for them.
TARGETS = {"resolve_us": 5.0, "list_ms": 20.0, "publish_p99_ms": 100.0, "start_extra_s": 2.0}
NOTIFY_TARGETS_MS = {"sqlite": 1000.0, "postgresql": 250.0}
DATABASES = tuple(NOTIFY_TARGETS_MS)


@contextmanager
def places(database: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Where an empty and a filled store may lie. PostgreSQL is durable here as SQLite is."""
    if database == "sqlite":
        yield str(folder / "empty.db"), str(folder / "filled.db")
        return
    with running_server(durable=True) as server:
        empty, filled = server.create(), server.create()
        yield empty, filled
        server.drop(empty)
        server.drop(filled)


def measure(database: str, folder: Path, versions: int, rounds: int) -> dict[str, float]:
    """Every figure of one database, and beside them how long filling the store took."""
    folder.mkdir()
    base = open_base_model(measuring.BASE_FOLDER).describe()
    with places(database, folder) as (empty, filled):
        Database.open(empty).close()
        with Database.open(filled) as opened:
            say(f"{database}: publishing {versions} versions")
            began_s = time.perf_counter()
            fill(opened, base, versions)
            figures = {"fill_s": time.perf_counter() - began_s}
            say(f"{database}: publishing [100, 4096] prompts")
            taken = measuring.publish_latencies_ms(opened, 20 * rounds)
            figures |= {"publish_p50_ms": statistics.median(taken), "publish_p99_ms": measuring.p99(taken)}
            say(f"{database}: resolving")
            figures["resolve_us"] = measuring.resolve_us(filled, 20 * rounds)
            say(f"{database}: starting services")
            starts = [[measuring.start_s(place, folder / "log") for place in (empty, filled)] for _ in range(3)]
            figures["start_empty_s"], figures["start_filled_s"] = map(statistics.median, zip(*starts, strict=True))
            figures["start_extra_s"] = figures["start_filled_s"] - figures["start_empty_s"]
            with measuring.running(filled, folder / "log") as service:
                say(f"{database}: listing and news")
                figures["list_ms"] = measuring.list_ms(service, 10 * rounds)
                news = measuring.notify_ms(opened, service, 5 * rounds)
                figures |= {"notify_ms": statistics.median(news), "notify_max_ms": max(news)}
    return figures


def main(
    databases: Annotated[str, typer.Option(help="Databases to measure.")] = ",".join(DATABASES),
    versions: Annotated[int, typer.Option(min=TASKS, help="Versions in the store.")] = VERSIONS,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 10,
) -> None:
    """Measure the store on this machine."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are ended
    with tempfile.TemporaryDirectory() as folder:
        found = {name: measure(name, Path(folder) / name, versions, rounds) for name in databases.split(",")}
    table = Table("figure", *found, "at most")
    for figure in next(iter(found.values())):
        most = " / ".join(f"{NOTIFY_TARGETS_MS[name]:g}" for name in found) if figure == "notify_ms" else None
        most = most or (f"{TARGETS[figure]:g}" if figure in TARGETS else "")
        table.add_row(figure, *(f"{figures[figure]:.4g}" for figures in found.values()), most)
    Console().print(table)
    worst = {figure: max(figures[figure] for figures in found.values()) for figure in (*TARGETS, "notify_ms")}
    about = {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0)), "versions": versions}
    rounded = {name: {key: shown(value) for key, value in figures.items()} for name, figures in found.items()}
    print(json.dumps({**about, **{key: shown(value) for key, value in worst.items()}, **rounded}))


def shown(value: float) -> float:
    return float(f"{value:.4g}")


def say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
