"""Experiments of a store as somebody at a command or the API meets them: their report, and acts that rest on it.

What is done to an experiment is written into its history with the figures that it had then.
"""

from __future__ import annotations

from dataclasses import dataclass

from prompt_store.access import Principal
from prompt_store.errors import Conflict, InvalidExperiment, InvalidOutcome
from prompt_store.experiments.records import ExperimentRecord
from prompt_store.ledger.metrics import find_metric
from prompt_store.prompts.registry import Registry
from service.experiments.advice import mismatch_of
from service.experiments.figures import Figures
from service.experiments.page import page_of
from service.experiments.reporting import figures_of, numbers_of


@dataclass(frozen=True, slots=True)
class Report:
    """An experiment and all that is known of it."""

    record: ExperimentRecord
    figures: Figures


def report(registry: Registry, name: str, now_ms: int) -> Report:
    """Raises UnknownExperiment, and InvalidOutcome where the task has lost one of its metrics."""
    record = registry.experiment(name)
    experiment = record.experiment
    task = registry.task(experiment.task).task
    guarded = [guardrail.metric for guardrail in experiment.guardrails]
    rules = {metric: find_metric(task, metric) for metric in (experiment.metric, *guarded, *experiment.metrics)}
    sums = registry.experiment_sums(
        name,
        experiment.task,
        list(rules),
        missing=experiment.missing,
        started_ms=round(record.started_at.timestamp() * 1000),
    )
    directions = {metric: rule.direction for metric, rule in rules.items()}
    booleans = {metric for metric, rule in rules.items() if rule.type == "boolean"}
    labels = {version.digest: version.label for version in registry.versions(experiment.task)}
    return Report(record, figures_of(record, sums, directions, now_ms, booleans=booleans, labels=labels))


def html_report(registry: Registry, found: Report) -> str:
    """A report as a page, with the experiment's history."""
    return page_of(found.figures, found.record, registry.experiment_history(found.record.experiment.name))


def promote(
    registry: Registry,
    name: str,
    arm: str,
    principal: Principal,
    now_ms: int,
    *,
    reason: str = "",
    despite_mismatch: bool = False,
    expected: int | None = None,
) -> ExperimentRecord:
    """Ends an experiment with a winner, unless units came to its arms otherwise than they were drawn.

    Raises Conflict for a mismatch that is not accepted, InvalidExperiment for one that is without a reason, and as
    `report` and `promote_arm`.
    """
    found = report(registry, name, now_ms)
    details = numbers_of(found.figures, arm)
    if found.record.state == "running" and found.figures.sample_ratio.mismatch:
        if not despite_mismatch:
            raise Conflict(
                f"experiment {name!r} cannot be read: {mismatch_of(found.figures)}; find the cause first, or promote "
                "despite the mismatch and give a reason",
                current=str(found.record.revision),
            )
        if not reason.strip():
            raise InvalidExperiment("promoting despite a sample-ratio mismatch needs a reason; give one")
        details["despite_mismatch"] = True
    return registry.promote_arm(name, arm, principal, reason=reason, details=details, expected=expected)


def stop(
    registry: Registry, name: str, principal: Principal, now_ms: int, *, reason: str = "", expected: int | None = None
) -> ExperimentRecord:
    """Ends an experiment without a winner, also one whose figures cannot be made any more.

    Raises as `stop_experiment`.
    """
    try:
        details = numbers_of(report(registry, name, now_ms).figures)
    except InvalidOutcome as error:
        details = {"figures": str(error)}
    return registry.stop_experiment(name, principal, reason=reason, details=details, expected=expected)
