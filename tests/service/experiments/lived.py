"""A task with two versions, an experiment over them, and what units left of it in the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prompt_store.access import ANONYMOUS
from prompt_store.experiments.experiment import parse_experiment
from prompt_store.experiments.records import ExperimentRecord
from prompt_store.ledger.entries import Answered, Entry, Exposure, Outcome
from prompt_store.prompts.registry import Registry
from prompt_store.routing.backends import BackendDescription
from service.engines.scripted import FEATURES
from tests.conftest import random_prompt
from tests.service.serving import COPY, Store

FRIENDLIER: dict[str, Any] = {
    "name": "friendlier",
    "task": "copy",
    "control": "control",
    "arms": [{"name": "control", "weight": 0.5}, {"name": "candidate", "weight": 0.5, "version": "candidate"}],
    "metric": "helpful",
    "guardrails": [{"metric": "latency_ms", "margin": 50.0}],
}


def prepare(store: Store) -> None:
    """The task copy is judged by whether answers help, and has v1 in production and v2 as its candidate."""
    kinds = frozenset({"soft_prompt", "prefix", "text"})
    store.registry.register_backends([BackendDescription("local", "local", None, kinds, FEATURES)], ANONYMOUS)
    store.task({**COPY, "metrics": [{"name": "helpful", "direction": "maximise", "type": "boolean"}]})
    store.publish("copy", random_prompt(7, 5), alias="candidate")


def started(registry: Registry, **changes: Any) -> ExperimentRecord:
    return registry.start_experiment(parse_experiment({**FRIENDLIER, **changes}), ANONYMOUS)


def live(registry: Registry, record: ExperimentRecord, helped: Mapping[str, tuple[int, int]]) -> None:
    """Units come to the arms: of each arm so many, of whom so many were helped. All are answered in 100 to 109 ms."""
    experiment, begin_ms = record.experiment, round(record.started_at.timestamp() * 1000) + 1
    entries: list[Entry] = []
    for arm, (units, good) in helped.items():
        version = registry.version(experiment.task, record.versions[arm][0]).digest
        for place in range(units):
            request = f"{arm}-{place}"
            at_ms = begin_ms + place
            who = {"request": request, "task": experiment.task, "experiment": experiment.name, "arm": arm}
            entries.append(
                Exposure(
                    **who, allocation=1, probability=record.weights[arm], unit_hash=request, version=version,
                    forced=False, at_ms=at_ms, principal="anonymous",
                )
            )  # fmt: skip
            entries.append(
                Answered(
                    **who, unit_hash=request, version=version, backend="local", outcome="stop",
                    latency_ms=100.0 + place % 10, first_token_ms=20.0, cost=0.0, prompt_tokens=8,
                    completion_tokens=12, refused=False, valid_json=None, at_ms=at_ms, principal="anonymous",
                )
            )  # fmt: skip
            entries.append(
                Outcome(
                    **who, unit_hash=request, version=version[:16], generated_ms=at_ms, metric="helpful",
                    value=place < good, at_ms=at_ms, source="caller", principal="anonymous",
                )
            )  # fmt: skip
    registry.add_entries(entries)
