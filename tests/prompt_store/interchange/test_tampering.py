"""Shared places that somebody damaged or made up: what is refused, and that nothing of it is stored."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prompt_store.canonical import canonical_digest
from prompt_store.errors import (
    InvalidArtifact,
    InvalidName,
    SchemaMismatch,
    StoreError,
)
from prompt_store.interchange import sharing
from prompt_store.interchange.sharing import Directory, pull, push
from prompt_store.interchange.version_folder import FILE_LIMITS
from prompt_store.prompts.registry import Registry
from tests.prompt_store.building import BORIS, publish
from tests.prompt_store.interchange.shared import EVIDENCE, NAME, edit, ensemble, version_json


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["task.json", "prompt.safetensors", "report.json", "recipe.json", "version.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "pickle", "too large", "link"])
def test_a_damaged_file_is_refused_by_name_and_nothing_is_stored(
    registry: Registry, other: Registry, place: Directory, tmp_path: Path, name: str, how: str
) -> None:
    publish(registry, 1, **EVIDENCE)
    push(registry, NAME, None, place)
    whole = ensemble(registry)
    path = version_json(place).with_name(name)
    push(registry, NAME, whole.digest, place)  # whole ones beside it do not come in either
    if how == "flipped":
        flip(path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "missing":
        path.unlink()
    elif how == "pickle":
        path.write_bytes(b"\x80\x04\x95\x00")
    elif how == "too large":
        with open(path, "ab") as file:
            file.truncate(FILE_LIMITS[name] + 1)
    else:
        outside = tmp_path / "outside"
        path.rename(outside)
        path.symlink_to(outside)
    with pytest.raises(InvalidArtifact, match=f"{path.parent.name}/{name}: "):
        pull(other, place, principal=BORIS)
    assert other.snapshot().sequence == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda it: it.update(schema="softcue.shared/2"), SchemaMismatch, r"'softcue.shared/2'.*'softcue.shared/1'"),
        (lambda it: it.update(surprise=1), InvalidArtifact, "surprise"),
        (lambda it: it.update(digest="0" * 64), InvalidArtifact, "not where it lies"),
        (lambda it: it.update(task="other"), InvalidArtifact, "not where it lies"),
        (lambda it: it.update(kind="text"), InvalidArtifact, "says both 'text' and 'soft_prompt'"),
        (lambda it: it.update(task_revision="0" * 64), InvalidArtifact, "not the revision that the version answers"),
        (lambda it: it["payload"].update(tensor_digest="0" * 64), InvalidArtifact, "does not have the digest"),
        (lambda it: it["payload"].update(shape=[2, 32]), InvalidArtifact, "not the tensor"),
        (lambda it: it["payload"].update(dtype="F16"), InvalidArtifact, "not the tensor"),
        (lambda it: it["payload"].update(base_fingerprint="c3" * 32), InvalidArtifact, "does not have the digest"),
        (lambda it: it["base"].update(fingerprint="c3" * 32), InvalidArtifact, "does not describe the base"),
        (lambda it: it.update(base=None), InvalidArtifact, "does not describe the base"),
        (lambda it: it["base"].update(hidden_size=0), InvalidArtifact, "base.hidden_size"),
        (lambda it: it["files"].pop("prompt.safetensors"), InvalidArtifact, r"names no prompt.safetensors"),
        (lambda it: it["files"].pop("task.json"), InvalidArtifact, r"names no task.json"),
        (lambda it: it["files"].update({"../../aliases.json": "0" * 64}), InvalidArtifact, "files"),
        (lambda it: it.update(notes="a\x00b"), InvalidArtifact, "notes"),
        (lambda it: it.update(label="production"), InvalidArtifact, "label"),
    ],
)
def test_a_version_that_is_not_what_it_says_is_refused(
    registry: Registry,
    other: Registry,
    place: Directory,
    change: Callable[..., object],
    error: type[StoreError],
    message: str,
) -> None:
    publish(registry, **EVIDENCE)
    push(registry, NAME, None, place)
    edit(version_json(place), change)
    with pytest.raises(error, match=message):
        pull(other, place, principal=BORIS)
    assert other.snapshot().sequence == 0


def test_what_a_hash_beside_it_vouches_for_must_still_be_sound(
    registry: Registry, other: Registry, place: Directory
) -> None:
    publish(registry, **EVIDENCE)
    push(registry, NAME, None, place)
    version = version_json(place)
    task_file = version.with_name("task.json")
    for name, data, message in (
        ("report.json", b'{"accuracy": NaN}', "is not JSON"),
        ("report.json", b'{"a": 1, "a": 2}', "a key appears twice"),
        ("recipe.json", b"[]", "holds no JSON object"),
        ("recipe.json", b"[" * 100_000, "is not JSON"),
        ("task.json", task_file.read_bytes().replace(b"refund", b"return"), "not the revision"),
        ("task.json", task_file.read_bytes().replace(b'"kind"', b'"kin"'), "kind: Field required"),
        ("prompt.safetensors", b"\x80\x04" + b"x" * 100, "pickle"),
    ):
        path = version.with_name(name)
        before = path.read_bytes(), version.read_bytes()
        path.write_bytes(data)
        edit(version, lambda it: it["files"].update({name: hashlib.sha256(data).hexdigest()}))  # noqa: B023
        with pytest.raises(InvalidArtifact, match=f"{name}: .*{message}"):
            pull(other, place, principal=BORIS)
        path.write_bytes(before[0])
        version.write_bytes(before[1])
    assert other.snapshot().sequence == 0
    assert len(pull(other, place, principal=BORIS)) == 1


def test_members_out_of_order_are_refused_because_a_store_would_name_them_otherwise(
    registry: Registry, other: Registry, place: Directory
) -> None:
    whole = ensemble(registry)
    push(registry, NAME, whole.digest, place)
    path = place.path / NAME / whole.digest / "version.json"
    edit(path, lambda it: it["payload"]["members"].reverse())
    with pytest.raises(InvalidArtifact, match="members are not in order"):
        pull(other, place, principal=BORIS)
    assert other.snapshot().sequence == 0


def test_no_link_is_followed_out_of_the_folder(
    registry: Registry, other: Registry, place: Directory, tmp_path: Path
) -> None:
    publish(registry)
    push(registry, NAME, None, place)
    folder = version_json(place).parent
    for path in (folder, folder.parent):
        outside = tmp_path / "outside"
        path.rename(outside)
        path.symlink_to(outside)
        with pytest.raises(InvalidArtifact, match=f"{path.name}: is a link"):
            pull(other, place, principal=BORIS)
        with pytest.raises(InvalidArtifact, match=f"{path.name}: is a link"):
            push(registry, NAME, None, place)
        path.unlink()
        outside.rename(path)
    assert len(pull(other, place, principal=BORIS)) == 1


def test_aliases_that_are_no_aliases_are_refused(registry: Registry, other: Registry, place: Directory) -> None:
    publish(registry, alias="production")
    push(registry, NAME, None, place)
    path = place.path / NAME / "aliases.json"
    path.write_text('{"production": "../../etc"}')
    with pytest.raises(InvalidArtifact, match=r"aliases.json: 'production' points at no digest"):
        pull(other, place, NAME, "production", principal=BORIS)
    path.write_text(json.dumps({"V1!": "0" * 64}))
    with pytest.raises(InvalidName, match="is not an alias"):
        pull(other, place, NAME, "production", principal=BORIS)


def test_the_number_of_versions_is_bounded(
    registry: Registry, other: Registry, place: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, 1)
    publish(registry, 2)
    push(registry, NAME, None, place)
    monkeypatch.setattr(sharing, "MAX_VERSIONS", 1)
    with pytest.raises(InvalidArtifact, match="holds more than 1 versions"):
        pull(other, place, principal=BORIS)


def test_a_place_without_versions_says_so(registry: Registry, place: Directory, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no folder"):
        pull(registry, place, principal=BORIS)
    place.path.mkdir()
    (place.path / "notes").mkdir()
    (place.path / canonical_digest({})).mkdir()
    with pytest.raises(StoreError, match="holds no version"):
        pull(registry, place, principal=BORIS)
    with pytest.raises(StoreError, match="publish one before"):
        push(registry, NAME, None, place)
    (tmp_path / "file").write_text("")
    publish(registry)
    with pytest.raises(InvalidArtifact, match="cannot be used"):
        push(registry, NAME, None, Directory(tmp_path / "file"))


def test_a_task_is_named_as_its_folder(registry: Registry, other: Registry, place: Directory) -> None:
    publish(registry)
    push(registry, NAME, None, place)
    (place.path / NAME).rename(place.path / "renamed")
    with pytest.raises(InvalidArtifact, match="not where it lies"):
        pull(other, place, principal=BORIS)
