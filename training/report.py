"""A run's report: one JSON document for machines and the store, the same as Markdown for people."""

from __future__ import annotations

from typing import Any

from training.checkpoint import Progress
from training.dataset import Dataset
from training.evaluate import Answered, Evaluation
from training.publish import Verdict
from training.recipe import Recipe

_SHOWN_MISTAKES = 10
_SHOWN_SAMPLES = 5


def build(
    recipe: Recipe,
    dataset: Dataset,
    progress: Progress,
    evaluations: dict[str, Evaluation],
    verdict: Verdict,
) -> dict[str, Any]:
    """What the run found out. `evaluations` are over the held-out split, the candidate's under 'soft prompt'."""
    candidate = evaluations["soft prompt"]
    return {
        "schema": "softcue.report/1",
        "recipe_hash": recipe.hash,
        "rows": {"train": len(dataset.train), "validation": len(dataset.validation), "test": len(dataset.test)},
        "findings": dataset.findings.lines(),
        "test_metrics": {name: dict(evaluation.metrics) for name, evaluation in evaluations.items()},
        "gate": {
            "passed": verdict.passed,
            "metric": verdict.metric,
            "reference": verdict.reference,
            "gain": verdict.gain,
            "minimum_gain": verdict.minimum_gain,
        },
        "training": {
            "steps": progress.step,
            "best_step": progress.best_step,
            "best_validation": progress.best_metric,
            "seconds": round(progress.elapsed_s, 1),
            "history": [
                {"step": step, "validation": metric, "training_loss": loss} for step, metric, loss in progress.history
            ],
        },
        "samples": [_shown(row) for row in candidate.answers[:_SHOWN_SAMPLES]],
        "mistakes": [_shown(row) for row in candidate.mistakes(_SHOWN_MISTAKES)],
    }


def _shown(row: Answered) -> dict[str, Any]:
    return {"inputs": row.example.inputs, "expected": row.example.answer, "answered": row.answer}


def markdown(task_name: str, report: dict[str, Any], sentence: str) -> str:
    """The report for people."""
    rows, training = report["rows"], report["training"]
    metrics = report["test_metrics"]
    names = list(next(iter(metrics.values())))
    lines = [
        f"# {task_name}: {sentence}",
        "",
        f"| held-out rows: {rows['test']} | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        *(
            f"| {who} | " + " | ".join(f"{values[name]:.3f}" for name in names) + " |"
            for who, values in metrics.items()
        ),
        "",
        f"Trained on {rows['train']} rows, validated on {rows['validation']}: {training['steps']} steps in "
        f"{training['seconds']} s, best at step {training['best_step']}.",
        "",
        "| step | validation | training loss |",
        "|---|---|---|",
        *(f"| {h['step']} | {h['validation']:.3f} | {h['training_loss']:.3f} |" for h in training["history"]),
    ]
    if report["findings"]:
        lines += ["", "## Rows that were not used", "", *(f"- {line}" for line in report["findings"])]
    if report["mistakes"]:
        lines += ["", "## Mistakes on held-out rows", "", "| inputs | expected | answered |", "|---|---|---|"]
        for row in report["mistakes"]:
            inputs = "; ".join(f"{key}: {value}" for key, value in row["inputs"].items())
            cells = (inputs, row["expected"], row["answered"])
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
