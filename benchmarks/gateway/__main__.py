"""`python -m benchmarks.gateway`: the service and other gateways before one provider, a table, and a last line of JSON.

The load and the provider run on the first core, each gateway on all others.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.engine.figures import Target, json_line, median
from benchmarks.engine.servers import ServerFailed
from benchmarks.engine.shapes import BUILD_FOLDER
from benchmarks.gateway.gateways import PEER_STARTS, Missing, Side, on_cores, start_provider, start_softcue
from benchmarks.gateway.load import press
from benchmarks.gateway.measuring import CONCURRENCIES, Added, Cell, compare, local_gaps

PARTS = (*PEER_STARTS, "local")
TARGETS = (
    Target("added_p50_ms", 1.0, 1.0, at_most=True),
    Target("added_p99_ms", 3.0, 3.0, at_most=True),
    Target("rps", 700.0, 700.0),
    Target("vs_litellm_p99", 10.0, 10.0),
    Target("vs_portkey_p99", 1.0, 1.0),
)


class Run:
    """One run: what came of it, and what could not be measured and why."""

    def __init__(self, folder: Path, parts: frozenset[str], rounds: int, seconds: float) -> None:
        self.figures: dict[str, float | None] = {target.figure: None for target in TARGETS}
        self.cells: dict[Cell, Added] = {}
        self.missing: list[str] = []
        self._folder, self._parts, self._rounds, self._seconds = folder, parts, rounds, seconds
        first, *others = sorted(os.sched_getaffinity(0))
        self._gateway_cores = set(others or (first,))
        os.sched_setaffinity(0, {first})

    def measure(self) -> None:
        with ExitStack() as stack:
            direct = start_provider()
            stack.callback(direct.server.end)
            port = direct.server.port
            with on_cores(self._gateway_cores):
                ours = start_softcue(port, self._folder / "alone")
                stack.callback(ours.server.end)
                gateways = [ours, *self._peers(port, stack)]
            say(f"comparing {', '.join(gateway.name for gateway in gateways)}")
            for gateway in gateways:
                gateway.server.pause()
            self.cells = compare(direct, gateways, self._rounds, self._seconds)
            self.figures["resident_mb"] = sum(one.memory_info().rss for one in ours.server.processes()) / 1e6
            self._summarise()
            if "local" in self._parts:
                say("streams by the local engine under load")
                self.figures |= self._local(port)

    def _peers(self, port: int, stack: ExitStack) -> list[Side]:
        peers = []
        for name, start in PEER_STARTS.items():
            if name not in self._parts:
                continue
            try:
                peer = start(port, self._folder)
                stack.callback(peer.server.end)
                press(peer.server.port, peer.request(stream=False), 1, 0.1)
                peers.append(peer)
            except (Missing, ServerFailed) as reason:
                self.missing.append(f"{name}: {reason}")
        return peers

    def _local(self, port: int) -> dict[str, float]:
        """The engine needs cores too, so that nothing but the load is kept to one."""
        with on_cores(self._gateway_cores | os.sched_getaffinity(0)):
            service = start_softcue(port, self._folder / "local", local_engine=True)
        try:
            return local_gaps(service, self._seconds * self._rounds)
        finally:
            service.server.end()

    def _summarise(self) -> None:
        for (name, concurrency, stream), added in self.cells.items():
            place = f"{name}_c{concurrency}{'_stream' if stream else ''}"
            self.figures |= {
                f"{place}_added_p50_ms": median(added.p50_ms),
                f"{place}_added_p99_ms": median(added.p99_ms),
                f"{place}_rps": median(added.rate),
            }
            if stream:
                self.figures[f"{place}_ttft_added_ms"] = median(added.first_token_p50_ms)
        low, high = CONCURRENCIES
        for figure in ("added_p50_ms", "added_p99_ms"):
            self.figures[figure] = self.figures[f"softcue_c{low}_{figure}"]
        self.figures["rps"] = self.figures[f"softcue_c{high}_rps"]
        self.figures["stream_ttft_added_ms"] = self.figures[f"softcue_c{low}_stream_ttft_added_ms"]
        ours = self.cells["softcue", low, False]
        for peer in PEER_STARTS:
            if (theirs := self.cells.get((peer, low, False))) is not None:
                self.figures[f"vs_{peer}_p99"] = median(theirs.p99_ms) / median(ours.p99_ms)


def main(
    only: Annotated[str, typer.Option(help=f"Parts to run, of {', '.join(PARTS)}; the service always.")] = ",".join(
        PARTS
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up; the median counts.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.5, help="How long each cell is measured in a round.")] = 3.0,
) -> None:
    """Measure what the service adds to a provider's latency, beside other gateways."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended
    parts = frozenset(filter(None, only.split(",")))
    if unknown := parts - set(PARTS):
        raise typer.BadParameter(f"there is no part {min(unknown)}; there are {', '.join(PARTS)}")
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=BUILD_FOLDER) as folder:
        run = Run(Path(folder), parts, rounds, seconds)
        run.measure()
    console = Console()
    console.print(cell_table(run.cells))
    console.print(target_table(run.figures))
    for reason in run.missing:
        console.print(f"null: {reason}")
    print(json_line(run.figures, {"processor": platform.machine(), "cores": cores, "rounds": rounds}))


def cell_table(cells: Mapping[Cell, Added]) -> Table:
    """What each gateway added, by concurrency and kind of answer."""
    columns = ("gateway", "answers", "at once", "p50, ms", "p99, ms", "TTFT, ms", "per s")
    table = Table(*columns, title="Added to the provider's latency, and answers per second")
    for (name, concurrency, stream), added in sorted(cells.items(), key=lambda item: (item[0][1:], item[0][0])):
        latencies = (median(one) for one in (added.p50_ms, added.p99_ms, added.first_token_p50_ms))
        kind = "streamed" if stream else "whole"
        shown = (f"{value:.2f}" for value in latencies)
        table.add_row(name, kind, str(concurrency), *shown, f"{median(added.rate):.0f}")
    return table


def target_table(figures: Mapping[str, float | None]) -> Table:
    """Each figure that has a target, beside it."""
    table = Table("figure", "measured", "target", "reached")
    for target in TARGETS:
        value = figures[target.figure]
        bound = f"{'at most' if target.at_most else 'at least'} {target.goal:g}"
        verdict = {"goal": "yes", "missed": "no"}.get(target.verdict(value), "not measured")
        table.add_row(target.figure, "–" if value is None else f"{value:.2f}", bound, verdict)
    return table


def say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
