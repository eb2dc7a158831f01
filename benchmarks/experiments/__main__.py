"""`python -m benchmarks.experiments`: every figure of experiments, tables, and one JSON object as the last line."""

from __future__ import annotations

import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.engine.figures import Target, json_line, median
from benchmarks.engine.shapes import BUILD_FOLDER
from benchmarks.experiments import assigning, recording, reporting
from prompt_store.database import Database
from tests.postgresql import running_server

STORES = ("PostgreSQL", "SQLite")
PARTS = ("assigning", "recording", "reporting")
TARGETS = (
    Target("assign_us", 5.0, 5.0, at_most=True),
    Target("record_added_p99_ms", 0.2, 0.2, at_most=True),
    Target("report_s", 2.0, 2.0, at_most=True),
)


def main(
    only: Annotated[str, typer.Option(help=f"Parts to run, of {', '.join(PARTS)}.")] = ",".join(PARTS),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each part; the median counts.")] = 5,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long each load lasts in a round.")] = 12.0,
) -> None:
    """Measure what experiments cost on this machine."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended
    parts = frozenset(filter(None, only.split(",")))
    if unknown := parts - set(PARTS):
        raise typer.BadParameter(f"there is no part {min(unknown)}; there are {', '.join(PARTS)}")
    figures: dict[str, float | None] = {target.figure: None for target in TARGETS}
    console = Console()
    if "assigning" in parts:
        say("assigning units")
        figures["assign_us"] = assigning.assign_us(10 * rounds)
    if "reporting" in parts:
        figures |= report_figures(rounds, console)
    if "recording" in parts:
        for kind in STORES:
            say(f"asking a service whose store is in {kind}")
            recorded = recording_figures(kind, rounds, seconds)
            console.print(latency_table(kind, recorded))
            suffix = "" if kind == "PostgreSQL" else f"_{kind.lower()}"
            added, twice = recorded.added_ms, recorded.without_twice
            figures |= {
                f"record_added_p99_ms{suffix}": added(recorded.reported, twice, "p99_ms"),
                f"record_added_p50_ms{suffix}": added(recorded.reported, twice, "p50_ms"),
                f"exposure_added_p99_ms{suffix}": added(recorded.exposed, recorded.without, "p99_ms"),
                f"outcome_requests_added_p99_ms{suffix}": added(recorded.reported, recorded.without, "p99_ms"),
            }
    console.print(target_table(figures))
    about = {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0)), "rounds": rounds}
    print(json_line(figures, about))


def recording_figures(kind: str, rounds: int, seconds: float) -> recording.Recorded:
    """What recording adds to requests with a store of this kind."""
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=BUILD_FOLDER)))
        store = str(folder / "store.db")
        if kind == "PostgreSQL":
            with out_of_the_way():
                store = stack.enter_context(running_server(durable=True)).create()
        return recording.record(store, folder, rounds, seconds)


@contextmanager
def out_of_the_way() -> Iterator[None]:
    """What is started inside gets what processors have left: it stands for what runs on a machine of its own."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def report_figures(rounds: int, console: Console) -> dict[str, float | None]:
    """A report over a million exposures, on a durable PostgreSQL of its own."""
    with running_server(durable=True) as server:
        location = server.create()
        with Database.open(location) as database:
            say("filling PostgreSQL")
            reporting.fill(database)
            say("reporting")
            found = reporting.report(database, rounds)
        server.drop(location)
    console.print(f"The report says: {found.sentence}", markup=False)
    return {
        "report_s": found.whole_s,
        "report_figures_s": found.figures_s,
        "report_page_s": found.page_s,
    }


def latency_table(kind: str, recorded: recording.Recorded) -> Table:
    """Milliseconds of each kind of request: the median round, and what it took beyond that without, by round."""
    table = Table(
        "requests",
        "p50, ms",
        "p99, ms",
        "added p50",
        "added p99",
        title=f"At {recording.RATE:g} requests a second, with {kind}",
    )
    for name, cell, base in (
        ("without an experiment", recorded.without, recorded.without),
        ("of an experiment", recorded.exposed, recorded.without),
        ("without, each asked for again", recorded.without_twice, recorded.without_twice),
        ("of an experiment, an outcome for each", recorded.reported, recorded.without_twice),
    ):
        values = (
            median(cell.p50_ms),
            median(cell.p99_ms),
            recorded.added_ms(cell, base, "p50_ms"),
            recorded.added_ms(cell, base, "p99_ms"),
        )
        table.add_row(name, *(f"{value:.2f}" for value in values))
    return table


def target_table(figures: dict[str, float | None]) -> Table:
    """Each figure that has a target, beside it."""
    table = Table("figure", "measured", "at most", "reached")
    for target in TARGETS:
        value = figures[target.figure]
        verdict = {"goal": "yes", "missed": "no"}.get(target.verdict(value), "not measured")
        table.add_row(target.figure, "–" if value is None else f"{value:.3f}", f"{target.goal:g}", verdict)
    return table


def say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
