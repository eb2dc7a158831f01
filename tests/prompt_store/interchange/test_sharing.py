"""Versions that go from one store into another by way of a directory."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from prompt_store.canonical import canonical_digest
from prompt_store.database import Database
from prompt_store.errors import (
    Conflict,
    InvalidArtifact,
    InvalidName,
    SchemaMismatch,
    StoreError,
    UnknownAlias,
    UnknownTask,
    UnknownVersion,
)
from prompt_store.interchange import sharing
from prompt_store.interchange.hub import HubRepository
from prompt_store.interchange.sharing import Directory, parse_place, pull, push
from prompt_store.interchange.version_folder import FILE_LIMITS
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.template import Message
from prompt_store.prompts.version import (
    DatasetUse,
    EnsemblePayload,
    PromptVersion,
    Provenance,
    RemoteModelPayload,
    TextPayload,
)
from tests.prompt_store.building import ANNA, BASE, BORIS, prefix, prompt, publish, task

NAME = "support_intents"
EVIDENCE = {
    "provenance": Provenance(recipe_hash="ab", datasets=(DatasetUse(name="rows", digest="cd", rows=7),), seed=3),
    "report": {"rows": 7, "test_metrics": {"accuracy": 0.5}},
    "recipe": {"seed": 3, "optimise": {"learning_rate": 0.05}},
    "tags": ("first", "größer"),
    "notes": "tuned | by <hand>\nand twice",
    "author": "carla",
}
WORDS = TextPayload(messages=(Message(role="user", content="{message}?"),))
MODEL = RemoteModelPayload(provider="openai", model="ft:gpt-4o-mini-2024-07-18:acme::Ab12")


@pytest.fixture
def place(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "shared")


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Registry]:
    """A store that knows nothing yet."""
    with Database.open(tmp_path / "other" / "softcue.db", create=True) as database:
        yield Registry(database)


def ensemble(registry: Registry) -> PromptVersion:
    members = tuple(publish(registry, seed).version.digest for seed in (11, 12))
    content = EnsemblePayload(members=members, base_fingerprint=BASE.fingerprint, vote="mean_logprob")
    return publish(registry, payload_content=content, base_fingerprint=None).version


def same(here: Registry, there: Registry, digest: str) -> None:
    """Asserts that two stores say the same of a version, all but its number, time and who put it there."""
    one, two = here.version(NAME, digest), there.version(NAME, digest)
    assert (one.payload, one.task_revision, one.provenance) == (two.payload, two.task_revision, two.provenance)
    assert (one.tags, one.notes, one.author or one.principal) == (two.tags, two.notes, two.author)
    assert here.evidence(digest) == there.evidence(digest)
    assert here.task_revision(one.task_revision).task == there.task_revision(one.task_revision).task


def test_a_soft_prompt_goes_from_store_to_store_with_all_that_is_known_of_it(
    registry: Registry, other: Registry, place: Directory
) -> None:
    version = publish(registry, alias="production", **EVIDENCE).version
    pushed = push(registry, NAME, "production", place)
    assert ([entry.digest for entry in pushed.written], pushed.present, pushed.commit) == ([version.digest], (), None)
    assert sorted(path.name for path in (place.path / NAME / version.digest).iterdir()) == sorted(FILE_LIMITS)
    (pulled,) = pull(other, place, NAME, "production", alias="candidate", principal=BORIS, reason="from the team")
    assert (pulled.version.digest, pulled.label_there, pulled.created, pulled.alias) == (
        version.digest, "v1", True, "candidate",
    )  # fmt: skip
    same(registry, other, version.digest)
    assert other.prompt(version.digest) == prompt()
    assert other.bases() == [BASE]
    assert (pulled.version.principal, pulled.version.author) == ("boris", "carla")
    (move,) = other.alias_history(NAME, "candidate")
    assert (move.target, move.reason, move.principal) == (version.digest, "from the team", "boris")


def test_every_kind_of_version_arrives_as_the_same_version(
    registry: Registry, other: Registry, place: Directory
) -> None:
    contents = [prompt(1), prefix(2), WORDS, MODEL]
    versions = [publish(registry, payload_content=content).version for content in contents] + [ensemble(registry)]
    push(registry, NAME, None, place)
    pulled = pull(other, place, principal=BORIS)
    assert {entry.version.digest for entry in pulled} == {version.digest for version in registry.versions(NAME)}
    for version in versions:
        same(registry, other, version.digest)
    assert other.prompt(versions[1].digest) == prefix(2)


def test_an_ensemble_brings_its_members_before_itself(registry: Registry, other: Registry, place: Directory) -> None:
    publish(registry, 1)
    whole = ensemble(registry)
    assert len(push(registry, NAME, whole.digest, place).written) == 3
    pulled = pull(other, place, NAME, whole.digest[:10], alias="candidate", principal=BORIS)
    assert [entry.version.payload.kind for entry in pulled] == ["soft_prompt", "soft_prompt", "ensemble"]
    assert [entry.alias for entry in pulled] == [None, None, "candidate"]
    assert other.version(NAME, "candidate").digest == whole.digest


def test_an_ensemble_without_its_member_is_refused(registry: Registry, other: Registry, place: Directory) -> None:
    whole = ensemble(registry)
    push(registry, NAME, whole.digest, place)
    member = place.path / NAME / registry.version(NAME, "v1").digest
    member.rename(place.path / "elsewhere")
    with pytest.raises(InvalidArtifact, match=f"{member.name}: is not there, but the ensemble {whole.digest[:12]}"):
        pull(other, place, NAME, whole.digest, principal=BORIS)
    assert other.snapshot().sequence == 0


def test_pushing_and_pulling_again_changes_nothing(registry: Registry, other: Registry, place: Directory) -> None:
    publish(registry, alias="production", **EVIDENCE)
    push(registry, NAME, None, place)
    pull(other, place, principal=BORIS)
    files = {path: path.read_bytes() for path in place.path.rglob("*") if path.is_file()}
    before = other.snapshot()
    again = push(registry, NAME, None, place)
    assert (again.written, [version.label for version in again.present]) == ((), ["v1"])
    assert {path: path.read_bytes() for path in place.path.rglob("*") if path.is_file()} == files
    assert [entry.created for entry in pull(other, place, principal=BORIS)] == [False]
    assert other.snapshot() == before


def test_two_stores_push_to_one_place_and_neither_loses_anything(
    registry: Registry, other: Registry, place: Directory, tmp_path: Path
) -> None:
    other.register_base(BASE, BORIS)
    other.apply_task(task(), BORIS)
    publish(registry, 1, alias="production")
    shared = publish(registry, 2).version
    publish(other, 2, author="someone else")
    publish(other, 3, alias="mine")
    push(registry, NAME, None, place)
    pushed = push(other, NAME, None, place)
    assert [version.digest for version in pushed.present] == [shared.digest]
    aliases = json.loads((place.path / NAME / "aliases.json").read_text())
    assert aliases == {
        "mine": other.version(NAME, "mine").digest,
        "production": registry.version(NAME, "production").digest,
    }
    with Database.open(tmp_path / "third.db", create=True) as database:
        third = Registry(database)
        assert len(pull(third, place, principal=ANNA)) == 3
        assert third.version(NAME, shared.digest).author == "anna"


def test_a_pulled_revision_does_not_change_what_callers_are_asked(
    registry: Registry, other: Registry, place: Directory
) -> None:
    version = publish(registry).version
    push(registry, NAME, None, place)
    edited = task(labels=["refund", "delivery", "other"])
    other.apply_task(edited, BORIS)
    pull(other, place, principal=BORIS)
    assert other.task(NAME).task == edited
    assert other.version(NAME, "v1").task_revision == version.task_revision == task().digest


def test_a_task_keeps_its_authors_order_of_keys(registry: Registry, other: Registry, place: Directory) -> None:
    properties = {"z": {"type": "string"}, "a": {"type": "string"}}
    ordered = task("ordered", kind="extract", labels=[], json_schema={"type": "object", "properties": properties})
    registry.apply_task(ordered, ANNA)
    publish(registry, task="ordered")
    push(registry, "ordered", None, place)
    pull(other, place, principal=BORIS)
    schema = other.task("ordered").task.json_schema
    assert schema is not None
    assert list(schema["properties"]) == ["z", "a"]


def test_a_base_that_is_known_with_other_sizes_is_refused(
    registry: Registry, other: Registry, place: Directory
) -> None:
    publish(registry)
    push(registry, NAME, None, place)
    edit(version_json(place), lambda document: document["base"].update(layers=3))
    other.register_base(BASE, BORIS)
    with pytest.raises(Conflict, match="layers=3"):
        pull(other, place, principal=BORIS)


def test_a_version_is_found_by_digest_label_and_alias(registry: Registry, other: Registry, place: Directory) -> None:
    first, second = publish(registry, 1).version, publish(registry, 2, alias="production").version
    push(registry, NAME, None, place)
    for selector, version in ((first.digest[:8], first), ("v1", first), ("v2", second), ("production", second)):
        (pulled,) = pull(other, place, NAME, selector, principal=BORIS)
        assert pulled.version.digest == version.digest
    with pytest.raises(UnknownTask, match="did you mean 'support_intents'"):
        pull(other, place, "support_intent", principal=BORIS)
    with pytest.raises(UnknownVersion, match="no version 'v9'"):
        pull(other, place, NAME, "v9", principal=BORIS)
    with pytest.raises(UnknownAlias, match="did you mean 'production'"):
        pull(other, place, NAME, "prodution", principal=BORIS)
    with pytest.raises(InvalidName, match="name the version to pull"):
        pull(other, place, NAME, alias="candidate", principal=BORIS)
    with pytest.raises(InvalidName, match="name the task too"):
        pull(other, place, None, "v1", principal=BORIS)
    with pytest.raises(InvalidName, match="is not a task name"):
        pull(other, place, "../..", principal=BORIS)


def test_a_label_that_two_stores_gave_is_ambiguous(registry: Registry, other: Registry, place: Directory) -> None:
    other.register_base(BASE, BORIS)
    other.apply_task(task(), BORIS)
    for store, seed in ((registry, 1), (other, 2)):
        publish(store, seed)
        push(store, NAME, None, place)
    with pytest.raises(InvalidName, match="fits 2 versions"):
        pull(registry, place, NAME, "v1", principal=ANNA)


def test_places_are_parsed() -> None:
    assert parse_place("some/folder") == Directory(Path("some/folder"))
    assert parse_place("hf://acme/prompts") == HubRepository("acme/prompts")
    assert parse_place("hf://acme/prompts@v1.0") == HubRepository("acme/prompts", "v1.0")
    assert str(parse_place("hf://acme/prompts@v1.0")) == "hf://acme/prompts@v1.0"
    for text in ("", "s3://bucket", "hf://prompts", "hf://a/b/c", "hf://acme/..", "hf://acme/prompts@", "hf://a b/c"):
        with pytest.raises(InvalidName, match=r"place to share at|names no model repository"):
            parse_place(text)


def test_the_card_lists_what_lies_there_and_somebodys_own_readme_stays(registry: Registry, place: Directory) -> None:
    publish(registry, **EVIDENCE)
    push(registry, NAME, None, place)
    card = place.path / "README.md"
    text = card.read_text()
    assert text.startswith("---\nlibrary_name: softcue\ntags:\n- softcue\n")
    assert "demo-base | carla" in text
    assert "tuned \\| by &lt;hand&gt; and twice" in text
    assert "base_model" not in text  # the hub refuses names that are no model ids
    card.write_text("# My own\n")
    push(registry, NAME, None, place)
    assert card.read_text() == "# My own\n"


def test_the_card_names_a_base_that_is_a_model_of_the_hub(other: Registry, place: Directory) -> None:
    other.register_base(replace(BASE, name="acme/small"), BORIS)
    other.apply_task(task(), BORIS)
    publish(other)
    push(other, NAME, None, place)
    assert "base_model:\n- acme/small\n" in (place.path / "README.md").read_text()


def test_a_push_that_is_interrupted_leaves_no_half_version(
    registry: Registry, other: Registry, place: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = publish(registry, 1, **EVIDENCE).version, publish(registry, 2, **EVIDENCE).version
    writes = 0
    write_bytes = Path.write_bytes

    def stop(self: Path, data: bytes) -> int:
        nonlocal writes
        writes += 1
        if writes == 8:
            raise KeyboardInterrupt
        return write_bytes(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            push(registry, NAME, None, place)
    assert [path.name for path in (place.path / NAME).iterdir()] == [first.digest]
    assert [entry.version.digest for entry in pull(other, place, principal=BORIS)] == [first.digest]
    assert [version.digest for version in push(registry, NAME, None, place).written] == [second.digest]


def version_json(place: Directory) -> Path:
    (path,) = place.path.glob(f"{NAME}/*/version.json")
    return path


def edit(path: Path, change: Callable[..., object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


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
