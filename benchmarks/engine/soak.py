"""Memory under many requests with many prompts: `make bench-engine-soak`, or `python -m benchmarks.engine.soak`.

Asks a `softcue serve` for short answers, each with another prompt than the one before, and samples the resident size
of the HTTP process and of the engine, and the engine's KV where `/metrics` says it. Prints a table, and one JSON object
as its last line.
"""

from __future__ import annotations

import random
import re
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.engine.figures import json_line
from benchmarks.engine.servers import Server, start_softcue
from benchmarks.engine.shapes import BUILD_FOLDER, SHAPES, make_base
from benchmarks.engine.sides import ServedSide
from benchmarks.engine.store import fill_store
from benchmarks.engine.workload import questions, soft_prompts, softcue_request

_CONCURRENCY, _NEW_TOKENS, _SAMPLES, _SCRAPE_S = 32, 4, 20, 0.2
_KV = "softcue_engine_kv_bytes"
_MEBIBYTE = 1024**2


def main(
    requests: Annotated[int, typer.Option(min=_SAMPLES * _CONCURRENCY, help="Requests in all.")] = 20_000,
    prompts: Annotated[int, typer.Option(min=1, help="Soft prompts in the store.")] = 1000,
    kv_memory_mib: Annotated[int, typer.Option(min=1, help="The engine's budget for KV, in MiB.")] = 512,
) -> None:
    """Soak a service in requests and watch its memory."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is ended
    shape = SHAPES["8m"]
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    base = make_base(shape)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(dir=BUILD_FOLDER) as folder:
        store = Path(folder) / "soak.db"
        fill_store(store, base, soft_prompts(prompts, shape.hidden_size))
        budget = {"SOFTCUE_ENGINE_KV_MEMORY_BYTES": str(kv_memory_mib * _MEBIBYTE)}
        server = start_softcue("soak", base, store, budget)
        try:
            side = ServedSide("softcue", server, partial(softcue_request, base.name))
            samples = [sample(server, None)]
            for turn in range(_SAMPLES):
                chosen = draw.choices(range(prompts), k=requests // _SAMPLES)
                asked = questions(chosen, shape.vocabulary_size, turn, new=_NEW_TOKENS)
                with ThreadPoolExecutor(1) as pool:
                    work = pool.submit(side.measure, asked, _CONCURRENCY)
                    kv = [scrape(server, _KV)]
                    while not wait([work], timeout=_SCRAPE_S).done:
                        kv.append(scrape(server, _KV))
                work.result()
                samples.append(sample(server, max((size for size in kv if size is not None), default=None)))
        finally:
            server.end()
    show(samples, requests // _SAMPLES)


def sample(server: Server, kv_peak_bytes: float | None) -> dict[str, float | None]:
    """Resident MiB of both processes now, and the engine's KV: its peak since the last sample, and its budget."""
    http, engine = (process.memory_info().rss / _MEBIBYTE for process in server.processes())
    return {
        "http_mb": http,
        "engine_mb": engine,
        "kv_peak_bytes": kv_peak_bytes,
        "kv_budget_bytes": scrape(server, "softcue_engine_kv_budget_bytes"),
    }


def scrape(server: Server, name: str) -> float | None:
    """The value of one of the service's metrics; None where it is not exposed."""
    return gauge(server.get("/metrics")[1], name)


def gauge(metrics: str, name: str) -> float | None:
    """The value of a metric in Prometheus' text; None where it is not there."""
    found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else None


def show(samples: list[dict[str, float | None]], requests_each: int) -> None:
    """The table, and the JSON object. The first sample that counts is the one after the first tenth, all being warm."""
    table = Table("requests", *samples[0])
    for index, values in enumerate(samples):
        shown = ("–" if value is None else f"{value:,.0f}" for value in values.values())
        table.add_row(f"{index * requests_each:,}", *shown)
    Console().print(table)
    sizes = [(values["http_mb"] or 0.0) + (values["engine_mb"] or 0.0) for values in samples]
    kv = [peak for values in samples if (peak := values["kv_peak_bytes"]) is not None]
    figures = {
        "rss_first_mb": sizes[_SAMPLES // 10],
        "rss_last_mb": sizes[-1],
        "kv_budget_bytes": samples[-1]["kv_budget_bytes"],
        "kv_peak_bytes": max(kv, default=None),
    }
    print(json_line(figures, {"requests": requests_each * _SAMPLES}))


if __name__ == "__main__":
    typer.run(main)
