"""What is measured of recording: latencies of requests with an experiment on their task, beside those without.

One service with its journal, a provider behind it that takes 20 ms, and two tasks that ask it the same: one has a
running experiment. So both kinds of request meet the same process, in turns.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.engine.figures import median, quantile
from benchmarks.engine.servers import ROOT, Server
from benchmarks.experiments.open_loop import FollowUp, OpenLoop
from benchmarks.gateway.gateways import BASE_FOLDER, MODEL, free_port, on_cores, post, start_provider
from benchmarks.gateway.load import NoAnswer
from prompt_store.access import ANONYMOUS
from prompt_store.database import Database
from prompt_store.experiments.experiment import parse_experiment
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.task import parse_task
from prompt_store.prompts.version import RemoteModelPayload
from prompt_store.routing.backends import BackendDescription
from prompt_store.routing.routes import DEFAULT_ALIAS

RATE = 500.0
PLAIN, TRIED, EXPERIMENT, METRIC = "plain", "tried", "replies", "helpful"
_UNITS = 100_000
_SETTLING_S = 2.0  # until what a round left behind is shipped
_GENERATION = re.compile(rb'"id":\s*"([^"]+)"')


@dataclass
class Cell:
    """Milliseconds of one kind of request by round."""

    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)

    def note(self, taken_s: list[float]) -> None:
        self.p50_ms.append(median(taken_s) * 1000)
        self.p99_ms.append(quantile(taken_s, 0.99) * 1000)


@dataclass
class Recorded:
    """Requests without an experiment and with one; then either with a further request for each answer.

    That further request asks for the generation where there is no experiment, and else reports an outcome of it: so
    both have the service answer as many requests, and differ by what is recorded.
    """

    without: Cell = field(default_factory=Cell)
    exposed: Cell = field(default_factory=Cell)
    without_twice: Cell = field(default_factory=Cell)
    reported: Cell = field(default_factory=Cell)

    def added_ms(self, cell: Cell, base: Cell, quantile_ms: str) -> float:
        """The median over rounds of what a cell took beyond another in the same round."""
        pairs = zip(getattr(cell, quantile_ms), getattr(base, quantile_ms), strict=True)
        return median([taken - without for taken, without in pairs])


def record(store: str, folder: Path, rounds: int, seconds: float) -> Recorded:
    """Every kind of request in turn, the order reversed from round to round. Raises NoAnswer, ServerFailed."""
    found = Recorded()
    with _service(store, folder) as port:
        cells = (
            (found.without, PLAIN, None),
            (found.exposed, TRIED, None),
            (found.without_twice, PLAIN, _asked_for),
            (found.reported, TRIED, _outcome),
        )
        for _, task, follow_up in cells:  # code is compiled, connections are opened
            _load(port, task, 2.0, follow_up, seed=0)
        for number in range(rounds):
            for cell, task, follow_up in cells[:: 1 if number % 2 else -1]:
                time.sleep(_SETTLING_S)
                cell.note(_load(port, task, seconds, follow_up, seed=number))
    _hold_against_store(store, found)
    return found


def _load(port: int, task: str, seconds: float, follow_up: FollowUp | None, *, seed: int) -> list[float]:
    return OpenLoop(port, RATE, seconds, seed=seed).run(_requests(task), follow_up)


def _requests(task: str) -> Iterator[bytes]:
    """Chat completions of many users in turn."""
    for number in itertools.count():
        body = {
            "model": task,
            "messages": [{"role": "user", "content": "Which planet is nearest to the sun, and has it a moon?"}],
            "max_tokens": 32,
            "user": f"user-{number * 7919 % _UNITS:06d}",
        }
        yield post("/v1/chat/completions", body, {})


def _asked_for(answer: bytes) -> bytes:
    return f"GET /v1/generations/{_generation(answer)} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()


def _outcome(answer: bytes) -> bytes:
    return post(f"/v1/generations/{_generation(answer)}/outcomes", {"metric": METRIC, "value": True}, {})


def _generation(answer: bytes) -> str:
    found = _GENERATION.search(answer)
    if found is None:
        raise NoAnswer(f"this answer has no id: {answer[-1000:]!r}")
    return found[1].decode()


def _hold_against_store(location: str, found: Recorded) -> None:
    """That what was measured was also written: a service that loses entries is quick."""
    with Database.open(location) as database:
        sums = Registry(database).experiment_sums(EXPERIMENT, TRIED, [METRIC], missing="ignore", started_ms=0)
    valued = sum(each.valued for each in sums.metrics[METRIC])
    if not sums.exposures or (found.reported.p99_ms and not valued):
        raise NoAnswer(f"the store holds {sums.exposures} exposures and {valued} units with an outcome")


@contextmanager
def _service(store: str, folder: Path) -> Iterator[int]:
    """The port of a service whose provider runs; the load and the provider are kept to the first core."""
    first, *others = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        stack.enter_context(on_cores({first}))
        provider = start_provider()
        stack.callback(provider.server.end)
        _fill(store)
        settings = folder / "softcue.toml"
        settings.write_text(
            _SETTINGS.format(store=json.dumps(store), base=json.dumps(str(BASE_FOLDER)), port=provider.server.port),
            "utf-8",
        )
        port = free_port()
        command = [sys.executable, "-m", "softcue", "serve", "--config", str(settings), "--port", str(port)]
        environment = {**os.environ, "PROVIDER_KEY": "benchmark"}
        with on_cores(set(others or (first,))):
            server = Server("experiments-softcue", command, environment, port, "/health/ready", ROOT)
        stack.callback(server.end)
        yield port


_SETTINGS = """
[store]
url = {store}

[base]
path = {base}

[engine]
enabled = false

[backends.provider]
kind = "openai_compatible"
flavour = "other"
url = "http://127.0.0.1:{port}/v1"
key_env = "PROVIDER_KEY"
"""


def _fill(location: str) -> None:
    """Both tasks, and the experiment on one of them: two versions, which ask the provider the same."""
    with Database.open(location) as database:
        registry = Registry(database)
        for name in (PLAIN, TRIED):
            document = {"name": name, "kind": "generate", "inputs": ["text"]}
            metrics = [{"name": METRIC, "direction": "maximise", "type": "boolean"}]
            messages = [{"role": "user", "content": "{text}"}]
            registry.apply_task(parse_task({**document, "messages": messages, "metrics": metrics}), ANONYMOUS)
            for alias, model in ((DEFAULT_ALIAS, MODEL), ("candidate", f"{MODEL}-2")):  # all the same to the provider
                version = NewVersion(name, RemoteModelPayload(provider="provider", model=model))
                registry.publish(version, alias, "benchmark", ANONYMOUS)
        arms = [{"name": "control", "weight": 0.5}, {"name": "other", "weight": 0.5, "version": "candidate"}]
        document = {"name": EXPERIMENT, "task": TRIED, "control": "control", "arms": arms, "metric": METRIC}
        registry.start_experiment(parse_experiment(document), ANONYMOUS, backends=[_PROVIDER])


_PROVIDER = BackendDescription("provider", "openai_compatible", "provider", frozenset({"remote_model", "text"}))
