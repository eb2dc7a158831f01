from pathlib import Path

import pytest

from prompt_store.errors import InvalidArtifact
from prompt_store.prompts.artifact import Artifact, read_artifact, read_report, write_artifact
from prompt_store.prompts.soft_prompt import METADATA_PROVENANCE, encode
from prompt_store.prompts.version import DatasetUse, Provenance
from tests.prompt_store.building import BASE, prompt


def test_an_artifact_reads_back_as_it_was_written(tmp_path: Path) -> None:
    provenance = Provenance(recipe_hash="r", datasets=(DatasetUse(name="train", digest="d", rows=3),), seed=1)
    artifact = Artifact(prompt(), "support_intents", BASE.fingerprint, provenance, "first try")
    write_artifact(tmp_path / "a.safetensors", artifact)
    write_artifact(tmp_path / "b.safetensors", artifact)
    assert read_artifact(tmp_path / "a.safetensors") == artifact
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}


def test_a_file_that_says_nothing_about_itself_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(encode(prompt()))
    assert read_artifact(tmp_path / "a.safetensors") == Artifact(prompt())


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(InvalidArtifact, match=f"{path}: cannot be read"):
        read_artifact(path)
    for data in (b"", encode(prompt())[:-1], encode(prompt(), {METADATA_PROVENANCE: '{"who": 1}'})):
        path.write_bytes(data)
        with pytest.raises(InvalidArtifact) as caught:
            read_artifact(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_a_report_is_a_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InvalidArtifact, match=r"report\.json"):
        read_report(path)
    path.write_text('{"accuracy": 0.9}')
    assert read_report(path) == {"accuracy": 0.9}
