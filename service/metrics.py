"""Every Prometheus instrument of the service. Labels name tasks and versions of the catalog, never a user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from service.engines.base import Engine

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
        self.registry.register(_EngineCollector(engines))

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


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
        )
        for field, text in gauges:
            gauge = GaugeMetricFamily(f"softcue_engine_{field}", text, labels=["backend"])
            for name, values in stats.items():
                gauge.add_metric([name], float(getattr(values, field)))
            yield gauge
        counters = (
            ("tokens_generated", "Tokens made"),
            ("preemptions", "Times a request gave its KV back and waited again"),
            ("restarts", "Times the engine was lost"),
        )
        for field, text in counters:
            counter = CounterMetricFamily(f"softcue_engine_{field}", text, labels=["backend"])
            for name, values in stats.items():
                counter.add_metric([name], float(getattr(values, field)))
            yield counter
