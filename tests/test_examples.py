"""The shipped examples: their rows, their committed prompts, and that a fresh store serves them."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest

from prompt_store.access import ANONYMOUS
from prompt_store.bundle import load_bundle
from prompt_store.database import Database
from prompt_store.prompts.artifact import read_artifact
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.task import load_task
from service.engines.base_model import BaseModel
from service.engines.local.weights import load_weights
from tests.conftest import ROOT
from training.dataset import Findings, load_dataset, read_examples
from training.evaluate import Evaluator
from training.recipe import load_recipe

EXAMPLES = ROOT / "examples"
NAMES = ("support_intents", "product_copy", "data_questions")
KINDS = {"support_intents": "classify", "product_copy": "generate", "data_questions": "extract"}


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_many_distinct_and_shared_by_no_split(name: str, base: BaseModel) -> None:
    recipe = load_recipe(EXAMPLES / name / "recipe.toml")
    task = load_task(recipe.path(recipe.task))
    dataset = load_dataset(recipe, task, base)  # refuses rows that stand in both files
    assert dataset.findings == Findings()
    assert len(dataset.train) + len(dataset.validation) >= 400
    assert len(dataset.test) >= 200
    assert task.kind == KINDS[name]
    if task.kind == "classify":
        assert len(task.labels) >= 12
        assert {row.answer for row in dataset.test} == set(task.labels)


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_rows_are_what_the_generator_makes(name: str, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / name / "generate.py", tmp_path)
    runpy.run_path(str(tmp_path / "generate.py"), run_name="__main__")
    for file in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / file).read_bytes() == (EXAMPLES / name / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_prompt_fits_base_recipe_and_report(name: str, base: BaseModel) -> None:
    recipe = load_recipe(EXAMPLES / name / "recipe.toml")
    artifact = read_artifact(EXAMPLES / name / "prompt.safetensors")
    report = json.loads((EXAMPLES / name / "report.json").read_text())
    assert (artifact.task, artifact.base_fingerprint) == (name, base.fingerprint)
    assert artifact.provenance.recipe_hash == report["recipe_hash"] == recipe.hash
    assert artifact.prompt.shape == (recipe.prompt.length, base.hidden_size)
    assert artifact.prompt.size_bytes < 64_000
    metrics, metric = report["test_metrics"], recipe.gate.metric
    assert metrics["soft prompt"][metric] > max(metrics["text prompt"][metric], metrics["no prompt"][metric]) + 0.1


def test_a_committed_prompt_earns_what_its_report_says(base: BaseModel) -> None:
    name = "support_intents"
    task = load_task(EXAMPLES / name / "task.toml")
    rows = read_examples(EXAMPLES / name / "test.jsonl", task, Findings())
    report = json.loads((EXAMPLES / name / "report.json").read_text())
    prompt = read_artifact(EXAMPLES / name / "prompt.safetensors").prompt
    with Evaluator(base, load_weights(base), task) as evaluator:
        measured = evaluator.soft_prompt(prompt, rows).metrics["accuracy"]
    assert measured == pytest.approx(report["test_metrics"]["soft prompt"]["accuracy"], abs=1 / len(rows))


def test_loading_the_examples_twice_changes_nothing_the_second_time(base: BaseModel, tmp_path: Path) -> None:
    with Database.open(tmp_path / "store.db") as database:
        registry = Registry(database)
        registry.register_base(base.describe(), ANONYMOUS)
        first = load_bundle(registry, EXAMPLES, "production", ANONYMOUS)
        assert {(entry.task, entry.version, entry.alias_set) for entry in first} == {(n, "v1", True) for n in NAMES}
        before = registry.snapshot()
        assert not any(entry.changed for entry in load_bundle(registry, EXAMPLES, "production", ANONYMOUS))
        assert registry.snapshot() == before
