"""The account of one request: whose it was, when its first token came, how it ended; in metrics and log once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from service.engines.base import Usage
from service.generation_ids import GenerationTag, sign
from service.metrics import Labels, Metrics
from service.routing.plan import Target
from service.routing.run import Run, Step

log = logging.getLogger("softcue.requests")


@dataclass(slots=True)
class Record:
    """What is known of one request while it runs; `end` writes it to metrics and log, once, then tells `on_end`.

    Its id is there once it is known who answers, or that nobody does.
    """

    run: Run
    metrics: Metrics
    signing_key: bytes
    on_end: Callable[[Record, str], object]
    streamed_choices: int = 0  # of an answer whose tokens come as they are made; 0 when all of them come at its end
    id: str = ""
    labels: Labels = field(init=False)
    created_s: int = field(init=False)
    target: Target | None = None
    first_token_s: float | None = None
    elapsed_s: float = 0.0
    usage: Usage | None = None
    completion_tokens: int = 0
    _ended: bool = False

    def __post_init__(self) -> None:
        self.labels = Labels(task=self.run.plan.name, version="", arm="", backend="")
        self.created_s = int(time.time())

    def answered_by(self, target: Target | None) -> None:
        """It is known who answers, or who was asked last in vain; the id says so from now on."""
        self.target = target
        version = target.version if target is not None else None
        self.labels = Labels(
            task=self.run.plan.name,
            version=version.label if version is not None else "",
            arm=self.run.arm,
            backend=target.backend if target is not None else "",
        )
        tag = GenerationTag(
            self.labels.task,
            version.digest[:16] if version is not None else "",
            self.run.arm,
            self.run.unit_hash,
            int(time.time() * 1000),
            self.run.id,
            self.run.experiment,
        )
        self.id = sign(tag, self.signing_key)

    def first_token(self) -> None:
        """Note the time of the first token; later calls change nothing, nor does one that comes with all others."""
        if self.first_token_s is None and self.streamed_choices:
            self.first_token_s = time.perf_counter() - self.run.caller.started_s

    def end(self, outcome: str, usage: Usage | None, completion_tokens: int = 0) -> None:
        """Write the request down; later calls change nothing. Without usage, so many tokens had been made."""
        if self._ended:
            return
        self._ended = True
        self.elapsed_s = elapsed_s = time.perf_counter() - self.run.caller.started_s
        self.usage = usage
        metrics, labels = self.metrics, self.labels.values()
        metrics.labelled(metrics.requests, *labels, outcome).inc()
        metrics.labelled(metrics.duration, *labels).observe(elapsed_s)
        if usage is not None:
            metrics.labelled(metrics.prompt_tokens, *labels).inc(usage.prompt_tokens)
            completion_tokens = usage.completion_tokens
        self.completion_tokens = completion_tokens
        if self.first_token_s is not None:
            metrics.labelled(metrics.time_to_first_token, *labels).observe(self.first_token_s)
            if (later := completion_tokens / self.streamed_choices - 1) > 0:
                per_token_s = (elapsed_s - self.first_token_s) / later
                metrics.labelled(metrics.time_per_output_token, *labels).observe(per_token_s)
        metrics.labelled(metrics.completion_tokens, *labels).inc(completion_tokens)
        line: dict[str, Any] = {
            "id": self.id,
            "task": self.labels.task,
            "arm": self.labels.arm,
            "version": self.labels.version,
            "backend": self.labels.backend,
            "principal": self.run.caller.principal.name,
            "outcome": outcome,
            "prompt_tokens": usage.prompt_tokens if usage else None,
            "completion_tokens": completion_tokens,
            "milliseconds": round(elapsed_s * 1000, 1),
            "cost": self.run.cost,
        }
        if len(self.run.steps) > 1 or outcome == "error":
            line["route"] = [_in_short(step) for step in self.run.steps]
        log.info(msgspec.json.encode(line).decode())
        self.on_end(self, outcome)


def _in_short(step: Step) -> dict[str, str]:
    """A step for the log: who was asked and how it came out, in no words of a provider's, who may repeat a prompt."""
    known = {"backend": step.backend, "version": step.label, "outcome": step.outcome}
    if step.error:
        known["error"] = step.error
    if step.provider_request_id:
        known["provider_request_id"] = step.provider_request_id
    return known
