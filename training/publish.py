"""The quality gate, and publishing what passes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prompt_store.access import Principal
from prompt_store.prompts.publishing import NewVersion, Published
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import Task
from prompt_store.prompts.version import Provenance
from training.recipe import GateRecipe

_ROUNDING = 1e-9  # 0.9 - 0.8 is a little less than 0.1


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a candidate may be published, and the figures that decided. `reference` is what it was held against."""

    passed: bool
    metric: str
    candidate: float
    reference_value: float
    reference: str
    gain: float
    minimum_gain: float

    def sentence(self) -> str:
        """The verdict in words."""
        outcome = "passed" if self.passed else "did not pass"
        return (
            f"{outcome} the gate: {self.metric} {self.candidate:.3f} against {self.reference_value:.3f} of "
            f"{self.reference}, a gain of {self.gain:+.3f} where at least {self.minimum_gain:+.3f} is asked for"
        )


def gain(task: Task, metric: str, value: float, reference: float) -> float:
    """How much better a value of a metric is than another, in the metric's own direction."""
    direction = next((known.direction for known in task.metrics if known.name == metric), "maximise")
    return value - reference if direction == "maximise" else reference - value


def judge(
    gate: GateRecipe, task: Task, candidate: Mapping[str, float], reference: Mapping[str, float], name: str
) -> Verdict:
    """Hold a candidate's metrics against a reference's, which `name` names. Both hold the gate's metric."""
    gained = gain(task, gate.metric, candidate[gate.metric], reference[gate.metric])
    return Verdict(
        passed=gained >= gate.minimum_gain - _ROUNDING,
        metric=gate.metric,
        candidate=candidate[gate.metric],
        reference_value=reference[gate.metric],
        reference=name,
        gain=gained,
        minimum_gain=gate.minimum_gain,
    )


def publish(
    registry: Registry,
    task: Task,
    prompt: SoftPrompt,
    *,
    base_fingerprint: str,
    provenance: Provenance,
    recipe: dict[str, Any],
    report: dict[str, Any],
    alias: str,
    principal: Principal,
    reason: str,
) -> Published:
    """Publish a soft prompt under an alias, in one transaction with its report, recipe and provenance."""
    new = NewVersion(
        task=task.name,
        payload_content=prompt,
        base_fingerprint=base_fingerprint,
        task_revision=task.digest,
        provenance=provenance,
        report=report,
        recipe=recipe,
    )
    return registry.publish(new, alias, reason, principal)
