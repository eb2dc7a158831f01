"""A whole run, as a generator of events: read, train with validation and checkpoints, evaluate, judge, publish."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prompt_store.access import Principal
from prompt_store.canonical import canonical_digest
from prompt_store.errors import UnknownAlias
from prompt_store.names import check_alias
from prompt_store.prompts.artifact import Artifact, write_artifact
from prompt_store.prompts.publishing import Published
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import Message, Task, load_task
from prompt_store.prompts.version import PromptVersion, Provenance, SoftPromptPayload, TextPayload
from prompt_store.routing.routes import DEFAULT_ALIAS
from service.engines.base_model import BaseModel, open_base_model
from service.engines.local.weights import embedding_matrix, load_weights
from training import checkpoint, report
from training.checkpoint import Progress
from training.dataset import Dataset, load_dataset, tokenise
from training.errors import RecipeError
from training.evaluate import Evaluation, Evaluator
from training.initialise import initial_prompt
from training.optimise import Optimiser, Step
from training.publish import Verdict, gain, judge, publish
from training.recipe import Recipe
from training.scorers import metric_names, reported_names

_TRAINING_ATTENTION = "sdpa"


@dataclass(frozen=True, slots=True)
class Started:
    """The run is about to train. `resumed_at` is the checkpoint's step, 0 for a new run."""

    task: Task
    base: BaseModel
    dataset: Dataset
    folder: Path
    resumed_at: int
    max_steps: int


@dataclass(frozen=True, slots=True)
class Validated:
    """A validation after a step; `best` when it is the best so far."""

    step: int
    metric: str
    value: float
    best: bool


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The run stopped on request; the same command resumes from the checkpoint."""

    step: int
    checkpoint: Path


@dataclass(frozen=True, slots=True)
class Finished:
    """The run's end. `published` is None when the gate was not passed."""

    verdict: Verdict
    evaluations: dict[str, Evaluation]
    report_file: Path
    prompt_file: Path
    published: Published | None
    alias: str


Event = Started | Step | Validated | Interrupted | Finished


def tune_soft_prompt(
    recipe: Recipe,
    registry: Registry,
    runs: Path,
    principal: Principal,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Run a recipe. `should_stop` is asked between steps; when it says so, a checkpoint is written and the run ends.

    Raises TrainingError, EngineError or StoreError; nothing is published then.
    """
    base = open_base_model(recipe.path(recipe.base))
    task = load_task(recipe.path(recipe.task))
    _check(recipe, task)
    dataset = load_dataset(recipe, task, base)
    key = canonical_digest(
        {
            "recipe": recipe.hash,
            "task": task.digest,
            "base": base.fingerprint,
            "data": [use.digest for use in dataset.files],
        }
    )
    folder = runs / f"{task.name}-{key[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"runs cannot be kept in {runs}: {error.strerror}; name another folder with --runs"
        ) from error
    model = load_weights(base, attention_implementation=_TRAINING_ATTENTION)
    start = initial_prompt(recipe, task, base, embedding_matrix(model))
    optimiser = Optimiser(model, start, recipe.optimise)
    with Evaluator(base, model, task) as evaluator:
        progress, best = _resume(folder / "checkpoint.safetensors", key, optimiser)
        yield Started(task, base, dataset, folder, progress.step, recipe.optimise.max_steps)
        rows = [tokenise(example, task, base) for example in dataset.train]

        def save() -> None:
            checkpoint.save(
                folder / "checkpoint.safetensors", key, progress, {**optimiser.tensors(), "best_prompt": best}
            )

        started_s = time.perf_counter() - progress.elapsed_s
        metric = recipe.gate.metric
        model.set_attn_implementation(_TRAINING_ATTENTION)
        steps = iter(()) if progress.stale >= recipe.optimise.patience else optimiser.steps(rows)
        for step in steps:
            progress.losses.append(step.loss)
            yield step
            progress.step, progress.elapsed_s = step.number, time.perf_counter() - started_s
            last = step.number == recipe.optimise.max_steps
            if last or step.number % recipe.optimise.evaluate_every == 0:
                prompt = _stored(optimiser.prompt, recipe)
                value = evaluator.soft_prompt(prompt, dataset.validation).metrics[metric]
                model.set_attn_implementation(_TRAINING_ATTENTION)
                better = progress.best_metric is None or gain(task, metric, value, progress.best_metric) > 0
                progress.history.append((step.number, value, sum(progress.losses) / len(progress.losses)))
                progress.losses.clear()
                if better:
                    best = optimiser.prompt.detach().clone()
                    progress.best_metric, progress.best_step, progress.stale = value, step.number, 0
                else:
                    progress.stale += 1
                progress.elapsed_s = time.perf_counter() - started_s
                save()
                yield Validated(step.number, metric, value, better)
                if progress.stale >= recipe.optimise.patience:
                    break
            if should_stop():
                save()
                yield Interrupted(step.number, folder / "checkpoint.safetensors")
                return
        evaluations, reference = _evaluate(evaluator, registry, recipe, task, base, dataset, _stored(best, recipe))
        if should_stop():
            save()
            yield Interrupted(progress.step, folder / "checkpoint.safetensors")
            return
    verdict = judge(recipe.gate, task, evaluations["soft prompt"].metrics, evaluations[reference].metrics, reference)
    yield _finish(recipe, registry, task, base, dataset, progress, evaluations, verdict, best, folder, principal)


def _check(recipe: Recipe, task: Task) -> None:
    """What would otherwise be found out after the training. Raises RecipeError or InvalidName."""
    known = metric_names(task)
    if recipe.gate.metric in reported_names(task):
        raise RecipeError(
            f"gate.metric '{recipe.gate.metric}' is what callers report of answers, which held-out rows cannot say; "
            f"choose {' or '.join(known)}, and compare '{recipe.gate.metric}' by an experiment"
        )
    if recipe.gate.metric not in known:
        raise RecipeError(f"gate.metric '{recipe.gate.metric}' is not among the task's metrics: {', '.join(known)}")
    check_alias(recipe.publish.alias)


def _resume(file: Path, key: str, optimiser: Optimiser) -> tuple[Progress, Tensor]:
    found = checkpoint.load(file, key)
    if found is None:
        return Progress(), optimiser.prompt.detach().clone()
    progress, tensors = found
    optimiser.restore(tensors, progress.step)
    return progress, tensors["best_prompt"]


def _evaluate(
    evaluator: Evaluator,
    registry: Registry,
    recipe: Recipe,
    task: Task,
    base: BaseModel,
    dataset: Dataset,
    prompt: SoftPrompt,
) -> tuple[dict[str, Evaluation], str]:
    """Metrics on the held-out split, and the name of the one that the gate compares with."""
    text_prompt = (Message(role="system", content=_escaped(recipe.baseline.text)), *task.messages)
    evaluations = {
        "no prompt": evaluator.plain(dataset.test),
        "text prompt": evaluator.plain(dataset.test, text_prompt),
    }
    reference = "text prompt"
    production = _production(registry, task)
    payload = production.payload if production is not None else None
    if production is not None and isinstance(payload, TextPayload):
        reference = f"production ({production.label})"
        evaluations[reference] = evaluator.plain(dataset.test, payload.messages)
    elif production is not None and isinstance(payload, SoftPromptPayload):
        if payload.base_fingerprint == base.fingerprint:
            reference = f"production ({production.label})"
            evaluations[reference] = evaluator.soft_prompt(registry.soft_prompt(production.digest), dataset.test)
        else:
            reference = f"text prompt (production, {production.label}, is for another base)"
            evaluations[reference] = evaluations.pop("text prompt")
    evaluations["soft prompt"] = evaluator.soft_prompt(prompt, dataset.test)
    return evaluations, reference


def _production(registry: Registry, task: Task) -> PromptVersion | None:
    """The version in production, if there is one."""
    if task.name not in {revision.task.name for revision in registry.tasks()}:
        return None
    try:
        return registry.version(task.name, DEFAULT_ALIAS)
    except UnknownAlias:
        return None


def _finish(
    recipe: Recipe,
    registry: Registry,
    task: Task,
    base: BaseModel,
    dataset: Dataset,
    progress: Progress,
    evaluations: dict[str, Evaluation],
    verdict: Verdict,
    best: Tensor,
    folder: Path,
    principal: Principal,
) -> Finished:
    prompt = _stored(best, recipe)
    provenance = Provenance(
        recipe_hash=recipe.hash,
        datasets=dataset.files,
        base_fingerprint=base.fingerprint,
        code_version=importlib.metadata.version("softcue"),
        seed=recipe.optimise.seed,
        run_as=f"float32 on {torch.get_default_device()}",
    )
    document = report.build(recipe, dataset, progress, evaluations, verdict)
    report_file, prompt_file = folder / "report.json", folder / "prompt.safetensors"
    report_file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (folder / "report.md").write_text(report.markdown(task.name, document, verdict.sentence()), "utf-8")
    write_artifact(prompt_file, Artifact(prompt, task.name, base.fingerprint, provenance))
    published = None
    if verdict.passed:
        registry.register_base(base.describe(), principal)
        registry.apply_task(task, principal)
        published = publish(
            registry,
            task,
            prompt,
            base_fingerprint=base.fingerprint,
            provenance=provenance,
            recipe=recipe.model_dump(mode="json"),
            report=document,
            alias=recipe.publish.alias,
            principal=principal,
            reason=verdict.sentence(),
        )
    return Finished(verdict, evaluations, report_file, prompt_file, published, recipe.publish.alias)


def _stored(prompt: Tensor, recipe: Recipe) -> SoftPrompt:
    """The prompt as the store keeps it, in the recipe's dtype; what is evaluated is what is published."""
    values = prompt.detach().cpu().contiguous()
    shape = (int(values.shape[0]), int(values.shape[1]))
    if recipe.prompt.dtype == "F32":
        return SoftPrompt("F32", shape, values.float().numpy().tobytes())
    return SoftPrompt("BF16", shape, values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())


def _escaped(text: str) -> str:
    """A text that a template renders as it stands."""
    return text.replace("{", "{{").replace("}", "}}")
