"""Versions that go by way of a model repository; the hub is a stand-in, as no test may reach the real one."""

from collections.abc import Callable, Iterator

import huggingface_hub
import pytest

from prompt_store.errors import Conflict, InvalidArtifact, StoreError, StoreUnavailable
from prompt_store.interchange import hub as hub_module
from prompt_store.interchange.hub import HubRepository
from prompt_store.interchange.sharing import Place, parse_place, pull, push
from prompt_store.prompts.registry import Registry
from tests.prompt_store.building import ANNA, BASE, BORIS, prefix, prompt, publish, task
from tests.prompt_store.interchange.shared import EVIDENCE, NAME, ensemble, same
from tests.prompt_store.interchange.standin_hub import TOKEN, Hub, running_hub

# huggingface_hub's own call of its HTTP client, for LFS uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PLACE = HubRepository("acme/prompts")


def point_at(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """As HF_ENDPOINT and HF_HUB_DISABLE_XET do for a process that starts with them, and without anybody's login."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process takes for the real one, and is logged in to."""
    with running_hub({"acme"}) as running:
        point_at(monkeypatch, running)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def test_versions_go_to_a_repository_and_come_back_the_same(registry: Registry, other: Registry, hub: Hub) -> None:
    versions = [
        publish(registry, 1, alias="production", **EVIDENCE).version,
        publish(registry, payload_content=prefix(2)).version,
        ensemble(registry),
    ]
    pushed = push(registry, NAME, None, PLACE)
    repository = hub.repositories["acme/prompts"]
    assert (pushed.place, len(pushed.written), pushed.present) == ("hf://acme/prompts", 5, ())
    assert pushed.commit == f"{hub.endpoint}/acme/prompts/commit/{repository.name_of(1)}"
    assert repository.private
    assert repository.messages == ["initial commit", "Add v1, v2, v3, v4, v5 of support_intents"]
    assert f"{NAME}/{versions[0].digest}/prompt.safetensors" in repository.commits[-1]
    pulled = pull(other, PLACE, principal=BORIS)
    assert {entry.version.digest for entry in pulled} == {version.digest for version in registry.versions(NAME)}
    for version in versions:
        same(registry, other, version.digest)
    assert other.prompt(versions[0].digest) == prompt(1)


def test_only_what_is_asked_for_is_downloaded(registry: Registry, other: Registry, hub: Hub) -> None:
    first, second = publish(registry, 1).version, publish(registry, 2, alias="production").version
    push(registry, NAME, None, PLACE)
    hub.requests.clear()
    (pulled,) = pull(other, PLACE, NAME, "production", alias="candidate", principal=BORIS)
    assert (pulled.version.digest, other.version(NAME, "candidate").digest) == (second.digest, second.digest)
    assert any(f"{second.digest}/prompt.safetensors" in request for request in hub.requests)
    assert not any(f"{first.digest}/prompt.safetensors" in request for request in hub.requests)


def test_a_revision_is_pulled_as_it_was(registry: Registry, other: Registry, hub: Hub) -> None:
    first = publish(registry, 1).version
    push(registry, NAME, None, PLACE)
    publish(registry, 2)
    push(registry, NAME, None, PLACE)
    place = parse_place(f"hf://acme/prompts@{hub.repositories['acme/prompts'].name_of(1)}")
    assert [entry.version.digest for entry in pull(other, place, principal=BORIS)] == [first.digest]


def test_pushing_again_makes_no_commit(registry: Registry, hub: Hub) -> None:
    publish(registry)
    push(registry, NAME, None, PLACE)
    again = push(registry, NAME, None, PLACE)
    assert (again.written, [version.label for version in again.present]) == ((), ["v1"])
    assert len(hub.repositories["acme/prompts"].commits) == 2


def test_a_repository_is_public_only_when_asked(registry: Registry, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry)
    push(registry, NAME, None, PLACE, public=True)
    assert not hub.repositories["acme/prompts"].private
    push(registry, NAME, None, PLACE)
    assert not hub.repositories["acme/prompts"].private
    monkeypatch.delenv("HF_TOKEN")
    assert len(pull(registry, PLACE, principal=ANNA)) == 1


def test_a_push_that_another_overtakes_is_added_to_what_that_one_left(
    registry: Registry, other: Registry, hub: Hub
) -> None:
    publish(registry, 1)
    other.register_base(BASE, BORIS)
    other.apply_task(task(), BORIS)
    publish(other, 2)

    def overtake(running: Hub, repository: str) -> None:
        running.before_commit = lambda hub, repository: None
        push(other, NAME, None, PLACE)

    push(other, NAME, None, HubRepository("acme/elsewhere"))
    hub.before_commit = overtake
    push(registry, NAME, None, PLACE)
    repository = hub.repositories["acme/prompts"]
    assert len(repository.commits) == 3
    card = repository.commits[-1]["README.md"].decode()
    for store in (registry, other):
        assert store.version(NAME, "v1").digest[:12] in card
    assert len(pull(registry, PLACE, principal=ANNA)) == 2


def test_a_push_that_is_always_overtaken_gives_up(registry: Registry, hub: Hub) -> None:
    publish(registry)

    def overtake(running: Hub, repository: str) -> None:
        running.repositories[repository].commits.append({})

    hub.before_commit = overtake
    with pytest.raises(Conflict, match="somebody else keeps committing"):
        push(registry, NAME, None, PLACE)


def test_a_damaged_repository_is_refused(registry: Registry, other: Registry, hub: Hub) -> None:
    version = publish(registry, **EVIDENCE).version
    push(registry, NAME, None, PLACE)
    files = hub.repositories["acme/prompts"].commits[-1]
    name = f"{NAME}/{version.digest}/prompt.safetensors"
    files[name] = files[name][:-4] + b"\x00\x00\x00\x00"
    with pytest.raises(InvalidArtifact, match=f"acme/prompts/{name}: is not what version.json says"):
        pull(other, PLACE, principal=BORIS)
    assert other.snapshot().sequence == 0


def test_sizes_are_judged_before_anything_is_downloaded(
    registry: Registry, other: Registry, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish(registry).version
    push(registry, NAME, None, PLACE)
    name = f"{NAME}/{version.digest}/task.json"
    hub.repositories["acme/prompts"].commits[-1][name] = b" " * (4 * 2**20 + 1)
    hub.requests.clear()
    with pytest.raises(InvalidArtifact, match=f"{name} is 4194305 bytes, more than the limit"):
        pull(other, PLACE, principal=BORIS)
    assert not any("task.json" in request for request in hub.requests)
    monkeypatch.setattr(hub_module, "MAX_REPOSITORY_FILES", 3)
    with pytest.raises(InvalidArtifact, match="has more than 3 files"):
        pull(other, PLACE, principal=BORIS)


def test_files_with_other_names_are_not_downloaded(registry: Registry, other: Registry, hub: Hub) -> None:
    version = publish(registry).version
    push(registry, NAME, None, PLACE)
    files = hub.repositories["acme/prompts"].commits[-1]
    for name in ("../escaped", f"{NAME}/{version.digest}/model.bin", f"../{NAME}/aliases.json", "setup.py"):
        files[name] = b"\x80\x04"
    hub.requests.clear()
    assert len(pull(other, PLACE, principal=BORIS)) == 1
    asked = [request for request in hub.requests if "resolve" in request]
    assert not any(name in request for request in asked for name in ("..", "model.bin", "setup.py"))


def test_what_the_hub_refuses_is_said_with_a_remedy_and_without_the_token(
    registry: Registry, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry)
    push(registry, NAME, None, PLACE)

    def refusal(action: Callable[[Place], object], place: str) -> StoreError:
        with pytest.raises(StoreError) as caught:
            action(parse_place(place))
        assert TOKEN not in str(caught.value)
        assert caught.value.__suppress_context__
        return caught.value

    def pulling(place: Place) -> object:
        return pull(registry, place, principal=ANNA)

    def pushing(place: Place) -> object:
        return push(registry, NAME, None, place)

    assert "is not there, or not for this account to see" in str(refusal(pulling, "hf://acme/other"))
    assert "has no such revision" in str(refusal(pulling, "hf://acme/prompts@v2"))
    assert "has no such revision" in str(refusal(pushing, "hf://acme/prompts@v2"))
    assert "refuses this to this account (status 403)" in str(refusal(pushing, "hf://globex/prompts"))
    for status, what in ((401, "log in with `hf auth login`"), (403, "token that may do it"), (400, "status 400")):
        hub.failing = status
        assert what in str(refusal(pulling, "hf://acme/prompts"))
    hub.failing = 503
    assert isinstance(refusal(pulling, "hf://acme/prompts"), StoreUnavailable)
    hub.failing = None
    monkeypatch.delenv("HF_TOKEN")
    assert "is not there, or not for this account to see" in str(refusal(pulling, "hf://acme/prompts"))


def test_a_hub_that_cannot_be_reached_is_unavailable(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry)
    with running_hub({"acme"}) as gone:
        point_at(monkeypatch, gone)
    with pytest.raises(StoreUnavailable, match="cannot be reached; check the network"):
        pull(registry, PLACE, principal=ANNA)
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        push(registry, NAME, None, PLACE)
    assert len(registry.versions(NAME)) == 1
