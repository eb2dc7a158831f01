from pathlib import Path

import pytest

from prompt_store.bundle import Loaded, load_bundle
from prompt_store.errors import InvalidArtifact, InvalidTask, StoreError, UnknownBase
from prompt_store.prompts.artifact import Artifact, write_artifact
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.task import load_task
from prompt_store.prompts.version import Provenance
from tests.prompt_store.building import ANNA, BASE, TASK_TOML, bundle, prompt, publish


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One task with a tuned prompt and its report, and files beside it that are no task."""
    inner = bundle(tmp_path / "examples")
    artifact = Artifact(prompt(), "support_intents", BASE.fingerprint, Provenance(seed=5), "tuned")
    write_artifact(inner / "prompt.safetensors", artifact)
    (inner / "report.json").write_text('{"accuracy": 0.9}')
    (tmp_path / "examples" / "base").mkdir()
    (tmp_path / "examples" / "README.md").write_text("")
    return tmp_path / "examples"


@pytest.fixture
def with_base(empty_registry: Registry) -> Registry:
    empty_registry.register_base(BASE, ANNA)
    return empty_registry


def test_a_bundle_brings_task_prompt_report_and_alias(with_base: Registry, folder: Path) -> None:
    assert load_bundle(with_base, folder, "production", ANNA) == [Loaded("support_intents", True, "v1", True, True)]
    version = with_base.version("support_intents", "production")
    assert (version.provenance, version.notes) == (Provenance(seed=5), "tuned")
    assert with_base.evidence(version.digest).report == {"accuracy": 0.9}
    assert with_base.soft_prompt(version.digest) == prompt()


def test_loading_twice_changes_nothing(with_base: Registry, folder: Path) -> None:
    load_bundle(with_base, folder, "production", ANNA)
    before = with_base.snapshot()
    (second,) = load_bundle(with_base, folder, "production", ANNA)
    assert second == Loaded("support_intents", False, "v1", False, False)
    assert not second.changed
    assert with_base.snapshot() == before


def test_loading_never_moves_an_alias_that_somebody_set(with_base: Registry, folder: Path) -> None:
    load_bundle(with_base, folder, "production", ANNA)
    publish(with_base, seed=7, alias="production")
    load_bundle(with_base, folder, "production", ANNA)
    assert with_base.version("support_intents", "production").label == "v2"


def test_a_newer_prompt_in_the_bundle_is_published_beside_the_alias(with_base: Registry, folder: Path) -> None:
    load_bundle(with_base, folder, "production", ANNA)
    newer = Artifact(prompt(8), "support_intents", BASE.fingerprint)
    write_artifact(folder / "support_intents" / "prompt.safetensors", newer)
    assert load_bundle(with_base, folder, "production", ANNA) == [Loaded("support_intents", False, "v2", True, False)]
    assert with_base.version("support_intents", "production").label == "v1"


def test_a_task_that_somebody_edited_stays_edited(with_base: Registry, folder: Path) -> None:
    path = folder / "support_intents" / "task.toml"
    load_bundle(with_base, folder, "production", ANNA)
    path.write_text(TASK_TOML.replace("Which intent", "What intent"))
    edited = with_base.apply_task(load_task(path), ANNA)
    path.write_text(TASK_TOML)
    assert not load_bundle(with_base, folder, "production", ANNA)[0].changed
    assert with_base.task("support_intents") == edited
    path.write_text(TASK_TOML.replace("Which intent", "Another edition of which intent"))
    (skipped,) = load_bundle(with_base, folder, "production", ANNA)
    assert (skipped.changed, skipped.version) == (False, None)
    assert skipped.skipped is not None
    assert "apply-task" in skipped.skipped
    assert with_base.task("support_intents") == edited


def test_a_task_without_a_prompt_is_applied(with_base: Registry, folder: Path) -> None:
    (folder / "support_intents" / "prompt.safetensors").unlink()
    (loaded,) = load_bundle(with_base, folder, "production", ANNA)
    assert (loaded.task_applied, loaded.version) == (True, None)
    assert with_base.versions("support_intents") == []


def test_a_damaged_prompt_is_refused_by_name_and_not_stored(with_base: Registry, folder: Path) -> None:
    path = folder / "support_intents" / "prompt.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidArtifact, match=r"prompt\.safetensors: the file is not whole safetensors"):
        load_bundle(with_base, folder, "production", ANNA)
    assert with_base.versions("support_intents") == []


def test_a_prompt_in_the_wrong_folder_for_another_base_or_a_broken_task_is_refused(
    with_base: Registry, folder: Path
) -> None:
    path = folder / "support_intents" / "prompt.safetensors"
    write_artifact(path, Artifact(prompt(), "other", BASE.fingerprint))
    with pytest.raises(InvalidArtifact, match="was made for task 'other'"):
        load_bundle(with_base, folder, "production", ANNA)
    write_artifact(path, Artifact(prompt(), "support_intents", "c" * 64))
    with pytest.raises(UnknownBase):
        load_bundle(with_base, folder, "production", ANNA)
    (folder / "support_intents" / "task.toml").write_text("name = 1")
    with pytest.raises(InvalidTask, match=r"task\.toml"):
        load_bundle(with_base, folder, "production", ANNA)
    with pytest.raises(StoreError, match="there is no folder"):
        load_bundle(with_base, folder / "absent", "production", ANNA)
