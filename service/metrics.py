"""Every Prometheus instrument of the service. Labels name tasks and versions of the catalog, never a user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from service.engines.base import Engine
from service.ledger.journal import JournalStats
from service.routing.run import Step

Instrument = TypeVar("Instrument", Counter, Histogram)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_LABELS = ("task", "version", "arm", "backend")


@dataclass(frozen=True, slots=True)
class Labels:
    """Whose request it was, for a metric's labels."""

    task: str
    version: str
    arm: str
    backend: str

    def values(self) -> tuple[str, str, str, str]:
        return (self.task, self.version, self.arm, self.backend)


class Metrics:
    """The instruments, in a registry of their own."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.registry = CollectorRegistry()
        self._labelled: dict[tuple[Counter | Histogram, tuple[str, ...]], Any] = {}
        self.requests = Counter(
            "softcue_requests", "Requests by how they ended", (*_LABELS, "outcome"), registry=self.registry
        )
        self.duration = Histogram(
            "softcue_request_duration_seconds", "From request to last token", _LABELS, buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.time_to_first_token = Histogram(
            "softcue_time_to_first_token_seconds", "From request to first token of a streamed answer", _LABELS,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.time_per_output_token = Histogram(
            "softcue_time_per_output_token_seconds", "Between the tokens of a streamed choice, on average", _LABELS,
            buckets=_TOKEN_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "softcue_prompt_tokens", "Tokens of text in, without virtual tokens", _LABELS, registry=self.registry
        )
        self.completion_tokens = Counter("softcue_completion_tokens", "Tokens out", _LABELS, registry=self.registry)
        self.store_sequence = Gauge(
            "softcue_store_sequence", "The last change of the store that is served", registry=self.registry
        )
        self.store_reachable = Gauge(
            "softcue_store_reachable", "Whether the store answered when it was last asked", registry=self.registry
        )
        self.damaged_versions = Gauge(
            "softcue_damaged_versions", "Versions whose tensors were found damaged in the store", registry=self.registry
        )
        self.aliases_fallen_back = Gauge(
            "softcue_aliases_fallen_back", "Aliases that an earlier target answers because theirs is damaged",
            registry=self.registry,
        )  # fmt: skip
        self.catalog_failures = Counter(
            "softcue_catalog_failures", "Reads of the store, or warm-ups, that failed", registry=self.registry
        )
        self.route_steps = Counter(
            "softcue_route_steps", "Leaves of routes that were asked, by how it came out",
            ("task", "version", "backend", "outcome"), registry=self.registry,
        )  # fmt: skip
        self.cost = Counter(
            "softcue_cost", "What answers cost, in the currency of the prices in the settings",
            ("task", "version", "backend"), registry=self.registry,
        )  # fmt: skip
        self.shadow_answers = Counter(
            "softcue_shadow_answers", "Answers of shadow routes, by whether they came, failed or were left out",
            ("task", "outcome"), registry=self.registry,
        )  # fmt: skip
        self.shadow_agreement = Histogram(
            "softcue_shadow_agreement", "How far a shadow's answer agrees with the one that was given",
            ("task",), buckets=(0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0), registry=self.registry,
        )  # fmt: skip
        self.leader = Gauge(
            "softcue_leader", "Whether this replica decides on experiments for all of them", registry=self.registry
        )
        self.experiment_decisions = Counter(
            "softcue_experiment_decisions", "What the rules of experiments decided, recommendations included",
            ("experiment", "action"), registry=self.registry,
        )  # fmt: skip
        self.captures_failed = Counter(
            "softcue_captures_failed", "Requests that were not captured because their redaction failed", ("task",),
            registry=self.registry,
        )  # fmt: skip
        self.judgements = Counter(
            "softcue_judgements", "Answers of experiments that were to be judged, by how that ended",
            ("task", "outcome"), registry=self.registry,
        )  # fmt: skip
        self.registry.register(_EngineCollector(engines))

    def labelled(self, instrument: Instrument, *labels: str) -> Instrument:
        """`instrument.labels(...)` at an eighth of its price, which a request pays several times."""
        known = self._labelled.get((instrument, labels))
        if known is None:
            known = self._labelled[instrument, labels] = instrument.labels(*labels)
        found: Instrument = known
        return found

    def count_step(self, task: str, step: Step) -> None:
        """A leaf of a route was asked, and this is how it came out."""
        target = step.target
        version = target.version.label if target is not None and target.version is not None else ""
        labels = (task, version, step.backend)
        self.labelled(self.route_steps, *labels, step.outcome).inc()
        if step.cost:
            self.labelled(self.cost, *labels).inc(step.cost)

    def count_shadow(self, task: str, outcome: str, agreement: float | None) -> None:
        """A shadow's answer came, failed or was left out."""
        self.shadow_answers.labels(task, outcome).inc()
        if agreement is not None:
            self.shadow_agreement.labels(task).observe(agreement)

    def count_decision(self, experiment: str, action: str) -> None:
        """The rules of an experiment decided something, and it was done or recommended."""
        self.experiment_decisions.labels(experiment, action).inc()

    def count_judgement(self, task: str, outcome: str) -> None:
        """A judge's verdict was recorded, said nothing clear, failed or was left out."""
        self.judgements.labels(task, outcome).inc()

    def watch_retirements(self, timestamps: Callable[[], Mapping[tuple[str, str, str], float]]) -> None:
        """Show when models go away, by task, version and backend, as it is known when metrics are scraped."""
        self.registry.register(_RetirementCollector(timestamps))

    def watch_journal(self, stats: Callable[[], JournalStats]) -> None:
        """Show what the journal holds, and what became of entries, as it is known when metrics are scraped."""
        self.registry.register(_JournalCollector(stats))

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class _RetirementCollector(Collector):
    """The days on which routes lose a model."""

    def __init__(self, timestamps: Callable[[], Mapping[tuple[str, str, str], float]]) -> None:
        self._timestamps = timestamps

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(
            "softcue_model_shutdown_timestamp_seconds", "When the model behind a version goes away, in Unix time",
            labels=["task", "version", "backend"],
        )  # fmt: skip
        for labels, at in self._timestamps().items():
            gauge.add_metric(labels, at)
        yield gauge


class _JournalCollector(Collector):
    """The journal's stats, read when they are scraped."""

    def __init__(self, stats: Callable[[], JournalStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        entries = CounterMetricFamily("softcue_journal_entries", "Entries kept in the journal", labels=["kind"])
        for kind, count in stats.entries.items():
            entries.add_metric([kind], count)
        yield entries
        lost = CounterMetricFamily("softcue_journal_lost", "Entries that could not be kept", labels=["kind"])
        for kind, count in stats.lost.items():
            lost.add_metric([kind], count)
        yield lost
        yield CounterMetricFamily("softcue_journal_refused", "Entries that were set aside", value=stats.refused)
        yield CounterMetricFamily(
            "softcue_journal_damaged", "Places where the journal could not be read", value=stats.damaged
        )
        yield GaugeMetricFamily(
            "softcue_journal_waiting_bytes", "Bytes that the store does not have yet", value=stats.waiting_bytes
        )


class _EngineCollector(Collector):
    """Engine stats, read when they are scraped."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        stats = {name: engine.stats() for name, engine in self._engines.items()}
        info = InfoMetricFamily("softcue_engine", "How the base model's weights are run", labels=["backend"])
        for name, engine in self._engines.items():
            info.add_metric([name], {"run_as": engine.capabilities().run_as})
        yield info
        gauges = (
            ("ready", "Whether the engine takes requests"),
            ("waiting", "Requests that wait to run"),
            ("running", "Requests in the batch"),
            ("kv_bytes", "Bytes of KV in use"),
            ("kv_budget_bytes", "Bytes of KV that may be used"),
            ("prompts", "Soft prompts whose KV is in memory"),
            ("prompt_bytes", "Bytes of their KV"),
            ("replicas", "Addresses of the backend"),
            ("replicas_healthy", "Addresses that take requests"),
        )
        for field, text in gauges:
            gauge = GaugeMetricFamily(f"softcue_engine_{field}", text, labels=["backend"])
            for name, values in stats.items():
                gauge.add_metric([name], float(getattr(values, field)))
            yield gauge
        breaker = GaugeMetricFamily(
            "softcue_engine_breaker_open", "Whether a provider is left alone: 1 open, 0.5 half open", labels=["backend"]
        )
        for name, values in stats.items():
            breaker.add_metric([name], {"closed": 0.0, "half_open": 0.5, "open": 1.0}[values.breaker])
        yield breaker
        counters = (
            ("tokens_generated", "Tokens made"),
            ("preemptions", "Times a request gave its KV back and waited again"),
            ("restarts", "Times the engine was lost"),
            ("retries", "Requests that were sent to a provider again"),
            ("failures", "Attempts at a provider that failed"),
        )
        for field, text in counters:
            counter = CounterMetricFamily(f"softcue_engine_{field}", text, labels=["backend"])
            for name, values in stats.items():
                counter.add_metric([name], float(getattr(values, field)))
            yield counter
