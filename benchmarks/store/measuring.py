"""What is measured of one database: publishing, resolving, starting a service, listing, and how soon news arrives."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.engine.figures import quantile
from benchmarks.store.filling import LARGE_BASE, SOMEBODY, TASKS, large_prompts, task_name
from prompt_store.database import Database
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.version import TextPayload
from prompt_store.routing.routes import DEFAULT_ALIAS
from service.catalog import Catalog
from service.engines.scripted import ScriptedEngine
from service.routing.backends import Backend, Backends

ROOT = Path(__file__).parents[2]
BASE_FOLDER = ROOT / "examples" / "base"
_START_TIMEOUT_S = 120.0
_NEWS_TIMEOUT_S = 10.0
_START_POLL_S = 0.005
_ASK_AGAIN_S = 0.001


def publish_latencies_ms(database: Database, count: int) -> list[float]:
    """Milliseconds of each of `count` publishes of a [100, 4096] prompt that also move an alias, one after another."""
    registry = Registry(database)
    taken = []
    for index, prompt in enumerate(large_prompts(count)):
        new = NewVersion(task_name(index % TASKS), prompt, LARGE_BASE.fingerprint)
        started_s = time.perf_counter()
        registry.publish(new, "candidate", "benchmark", SOMEBODY)
        taken.append((time.perf_counter() - started_s) * 1000)
    return taken


def resolve_us(location: str, rounds: int) -> float:
    """Median microseconds of `Catalog.resolve` on names with an alias, over all tasks in turn."""
    names = [f"{task_name(index)}@{DEFAULT_ALIAS}" for index in range(TASKS)]
    backends = Backends([Backend("local", ScriptedEngine())])
    with Database.open(location) as database:
        catalog = Catalog(
            database, Registry(database), backends, base_name="none", base_fingerprint="none", poll_s=1.0,
            on_refresh=lambda _: None, on_failure=lambda: None,
        )  # fmt: skip
        asyncio.run(catalog.load())
        taken: list[float] = []
        for _ in range(rounds):
            started_s = time.perf_counter()
            for name in names:
                catalog.resolve(name)
            taken.append((time.perf_counter() - started_s) / len(names) * 1e6)
        catalog.close()
    return statistics.median(taken)


class Service:
    """`softcue serve` on a store, in processes of its own; `started_s` is how long it took to be ready."""

    def __init__(self, location: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        command = [sys.executable, "softcue.py", "serve", "--base", str(BASE_FOLDER), "--port", str(self.port)]
        began_s = time.perf_counter()
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                # By the environment: a URL may hold a password, and arguments are seen by everybody.
                env={**os.environ, "SOFTCUE_STORE_URL": location},
                stdout=output,
                stderr=output,
            )
        while self._status() != 200:
            if self._process.poll() is not None or time.perf_counter() - began_s > _START_TIMEOUT_S:
                self.end()
                raise RuntimeError(f"the service did not start; {log} says why")
            time.sleep(_START_POLL_S)
        self.started_s = time.perf_counter() - began_s

    def _status(self) -> int:
        try:
            return self.get("/health/ready")[0]
        except OSError:
            return 0

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_START_TIMEOUT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


@contextmanager
def running(location: str, log: Path) -> Iterator[Service]:
    service = Service(location, log)
    try:
        yield service
    finally:
        service.end()


def start_s(location: str, log: Path) -> float:
    """Seconds from the command to the first `ready`."""
    with running(location, log) as service:
        return service.started_s


def list_ms(service: Service, rounds: int) -> float:
    """Median milliseconds of the first page of versions, over HTTP on a new connection."""
    taken = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        status, body = service.get("/v1/prompts?limit=50")
        taken.append((time.perf_counter() - started_s) * 1000)
        if status != 200 or len(json.loads(body)["data"]) != 50:
            raise RuntimeError(f"the list was answered with {status}: {body[:200]!r}")
    return statistics.median(taken)


def notify_ms(database: Database, service: Service, rounds: int) -> list[float]:
    """Milliseconds from the moment a publish returned until the running service answers with the new version.

    Measured of a service that has nothing else to do: one that still warms prompts looks at the store all the time.
    """
    while not json.loads(service.get("/health/ready")[1])["warm"]:
        time.sleep(_START_POLL_S)
    registry = Registry(database)
    taken = []
    for index in range(rounds):
        task = task_name(index % TASKS)
        content = TextPayload.model_validate({"messages": [{"role": "user", "content": f"round {index}: {{text}}"}]})
        version = registry.publish(NewVersion(task, content), "news", "benchmark", SOMEBODY).version
        published_s = time.perf_counter()
        while json.loads(service.get(f"/v1/tasks/{task}")[1])["aliases"].get("news") != version.label:
            if time.perf_counter() - published_s > _NEWS_TIMEOUT_S:
                raise RuntimeError(f"{task}@{version.label} did not reach the service in {_NEWS_TIMEOUT_S:g} s")
            time.sleep(_ASK_AGAIN_S)
        taken.append((time.perf_counter() - published_s) * 1000)
    return taken


def p99(values: list[float]) -> float:
    return quantile(values, 0.99)
