"""Whole runs on the demo base: publish, gate, interrupt and resume."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from prompt_store.access import ANONYMOUS
from prompt_store.database import Database
from prompt_store.errors import InvalidName
from prompt_store.prompts.artifact import read_artifact
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.task import Message, load_task
from prompt_store.prompts.version import TextPayload
from tests.training.recipes import write_recipe
from training import checkpoint
from training.errors import CheckpointError, RecipeError
from training.optimise import Step
from training.recipe import load_recipe
from training.run import Event, Finished, Interrupted, Started, Validated, tune_soft_prompt


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Database.open(tmp_path / "store.db") as database:
        yield Registry(database)


@pytest.fixture
def tune(tmp_path: Path, registry: Registry) -> Callable[..., list[Event]]:
    def tune(recipe: Path, *, stop_after: int | None = None, runs: str = "runs") -> list[Event]:
        events: list[Event] = []

        def should_stop() -> bool:
            return stop_after is not None and sum(isinstance(event, Step) for event in events) >= stop_after

        for event in tune_soft_prompt(
            load_recipe(recipe), registry, tmp_path / runs, ANONYMOUS, should_stop=should_stop
        ):
            events.append(event)
        return events

    return tune


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def test_a_run_trains_evaluates_and_publishes_a_candidate(
    tmp_path: Path, registry: Registry, tune: Callable[..., list[Event]]
) -> None:
    events = tune(write_recipe(tmp_path / "r"))
    started, end = events[0], finished(events)
    assert isinstance(started, Started)
    assert [event.number for event in events if isinstance(event, Step)] == list(range(1, 9))
    assert [event.step for event in events if isinstance(event, Validated)] == [4, 8]
    assert list(end.evaluations) == ["no prompt", "text prompt", "soft prompt"]
    assert end.verdict.reference == "text prompt"
    version = registry.version("colours", "candidate")
    assert end.published is not None
    assert end.published.version == version
    report = registry.evidence(version.digest).report
    assert report is not None
    assert report["test_metrics"]["soft prompt"] == end.evaluations["soft prompt"].metrics
    artifact = read_artifact(end.prompt_file)
    assert artifact.prompt == registry.soft_prompt(version.digest)
    assert artifact.base_fingerprint == started.base.fingerprint
    assert json.loads(end.report_file.read_text()) == report
    assert "| soft prompt |" in end.report_file.with_suffix(".md").read_text()


def test_a_version_says_what_it_was_made_of(
    tmp_path: Path, registry: Registry, tune: Callable[..., list[Event]]
) -> None:
    started = tune(write_recipe(tmp_path / "r"))[0]
    assert isinstance(started, Started)
    recipe = load_recipe(tmp_path / "r" / "recipe.toml")
    version = registry.version("colours", "candidate")
    provenance = version.provenance
    assert (provenance.recipe_hash, provenance.seed) == (recipe.hash, recipe.optimise.seed)
    assert registry.evidence(version.digest).recipe == recipe.model_dump(mode="json")
    assert [(use.name, use.rows) for use in provenance.datasets] == [("train.jsonl", 22), ("test.jsonl", 6)]
    assert len({use.digest for use in provenance.datasets}) == 2
    assert provenance.base_fingerprint == version.base_fingerprint == started.base.fingerprint
    assert provenance.code_version == importlib.metadata.version("softcue")
    assert provenance.parent is None  # it started from scratch
    assert (version.principal, version.payload.kind) == (ANONYMOUS.name, "soft_prompt")


def test_a_recipe_in_bfloat16_is_evaluated_and_stored_so(
    tmp_path: Path, registry: Registry, tune: Callable[..., list[Event]]
) -> None:
    end = finished(tune(write_recipe(tmp_path / "r", **{"length = 4": 'length = 4\ndtype = "BF16"'})))
    version = registry.version("colours", "candidate")
    prompt = registry.soft_prompt(version.digest)
    assert (prompt.dtype, prompt.shape, len(prompt.data)) == ("BF16", (4, 192), 2 * 4 * 192)
    assert read_artifact(end.prompt_file).prompt == prompt
    single = finished(tune(write_recipe(tmp_path / "single"), runs="single")).prompt_file
    full = read_artifact(single).prompt.to_float32()
    # Rounded once from the same training: 8 bits of significand.
    assert 0 < np.abs(prompt.to_float32() - full).max() <= np.abs(full).max() * 2**-8


def test_the_same_recipe_gives_the_same_content_and_one_version(
    tmp_path: Path, registry: Registry, tune: Callable[..., list[Event]]
) -> None:
    recipe = write_recipe(tmp_path / "r")
    first = finished(tune(recipe))
    again = finished(tune(recipe, runs="elsewhere"))
    assert first.published is not None
    assert again.published is not None
    assert again.published.version == first.published.version
    assert not again.published.created


def test_an_interrupted_run_resumes_to_the_same_content(
    tmp_path: Path, registry: Registry, tune: Callable[..., list[Event]]
) -> None:
    recipe = write_recipe(tmp_path / "r")
    whole = finished(tune(recipe, runs="whole"))
    interrupted = tune(recipe, stop_after=6)[-1]
    assert isinstance(interrupted, Interrupted)
    assert interrupted.step == 6
    resumed = tune(recipe)
    assert isinstance(resumed[0], Started)
    assert resumed[0].resumed_at == 6
    assert [event.number for event in resumed if isinstance(event, Step)] == [7, 8]
    end = finished(resumed)
    assert end.prompt_file.read_bytes() == whole.prompt_file.read_bytes()
    report = json.loads(end.report_file.read_text())
    assert report["training"]["history"] == json.loads(whole.report_file.read_text())["training"]["history"]


def test_what_does_not_pass_the_gate_is_kept_and_not_published(
    tmp_path: Path, registry: Registry, tune: Callable[..., list[Event]]
) -> None:
    end = finished(tune(write_recipe(tmp_path / "r", minimum_gain=1.1)))
    assert end.published is None
    assert "did not pass the gate" in end.verdict.sentence()
    assert end.prompt_file.is_file()
    assert registry.tasks() == []


def test_the_gate_holds_a_candidate_against_production_once_there_is_one(
    tmp_path: Path, registry: Registry, tune: Callable[..., list[Event]]
) -> None:
    first = finished(tune(write_recipe(tmp_path / "r")))
    assert first.published is not None
    registry.move_alias("colours", "production", "v1", reason="good", principal=ANONYMOUS)
    second = finished(tune(write_recipe(tmp_path / "s", **{"max_steps = 8": "max_steps = 4"})))
    assert second.verdict.reference == "production (v1)"
    assert second.verdict.reference_value == first.verdict.candidate


def test_a_text_prompt_in_production_is_what_the_gate_compares_with(
    tmp_path: Path, registry: Registry, tune: Callable[..., list[Event]]
) -> None:
    recipe = write_recipe(tmp_path / "r")
    task = load_task(tmp_path / "r" / "task.toml")
    registry.apply_task(task, ANONYMOUS)
    text = TextPayload(messages=(Message(role="system", content="Colour?"), *task.messages))
    registry.publish(NewVersion(task="colours", payload_content=text), "production", "", ANONYMOUS)
    end = finished(tune(recipe))
    assert end.verdict.reference == "production (v1)"
    assert list(end.evaluations) == ["no prompt", "text prompt", "production (v1)", "soft prompt"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('metric = "accuracy"', 'metric = "bleu"', r"gate\.metric 'bleu' is not among the task's metrics: accuracy"),
        ("minimum_gain = -1.0", 'minimum_gain = -1.0\n[publish]\nalias = "v7"', "'v7' is not an alias"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_the_start(
    tmp_path: Path, tune: Callable[..., list[Event]], old: str, new: str, said: str
) -> None:
    with pytest.raises((RecipeError, InvalidName), match=said):
        tune(write_recipe(tmp_path / "r", **{old: new}))
    assert not (tmp_path / "runs").exists()


def test_a_gate_on_what_callers_report_is_refused_naming_what_is_computed(
    tmp_path: Path, tune: Callable[..., list[Event]]
) -> None:
    recipe = write_recipe(tmp_path / "r", **{'metric = "accuracy"': 'metric = "helpful"'})
    task = recipe.with_name("task.toml")
    task.write_text(task.read_text() + '[[metrics]]\nname = "helpful"\ndirection = "maximise"\ntype = "boolean"\n')
    with pytest.raises(RecipeError, match=r"gate\.metric 'helpful' is what callers report .* choose accuracy"):
        tune(recipe)


def test_a_stop_during_the_last_evaluation_publishes_nothing(
    tmp_path: Path, registry: Registry, tune: Callable[..., list[Event]]
) -> None:
    recipe = write_recipe(tmp_path / "r")
    events = tune(recipe, stop_after=8)
    assert isinstance(events[-1], Interrupted)
    assert registry.tasks() == []
    assert finished(tune(recipe)).published is not None


def test_training_stops_early_when_validation_gains_nothing(tmp_path: Path, tune: Callable[..., list[Event]]) -> None:
    changes = {"max_steps = 8": "max_steps = 40\npatience = 1", "learning_rate = 0.3": "learning_rate = 1e-9"}
    events = tune(write_recipe(tmp_path / "r", **changes))
    assert [event.step for event in events if isinstance(event, Validated)] == [4, 8]
    assert sum(isinstance(event, Step) for event in events) == 8


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    checkpoint.save(file, "a", checkpoint.Progress(step=3), {})
    loaded = checkpoint.load(file, "a")
    assert loaded is not None
    assert loaded[0].step == 3
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        checkpoint.load(file, "b")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(file, "a")
