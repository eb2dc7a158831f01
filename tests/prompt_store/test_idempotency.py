import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select

from prompt_store.database import Database
from prompt_store.errors import Conflict, InvalidArtifact, InvalidName, KeyReused, UnknownVersion
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.tables import idempotency_keys
from tests.prompt_store.building import ANNA, BASE, BORIS, prompt, publish, task


class Clock:
    def __init__(self) -> None:
        self.at = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(database: Database, clock: Clock) -> Registry:
    registry = Registry(database, now=clock)
    registry.register_base(BASE, ANNA)
    registry.apply_task(task(), ANNA)
    return registry


def new(seed: int = 0, **changes: Any) -> NewVersion:
    return NewVersion("support_intents", prompt(seed), BASE.fingerprint, **changes)


def keys(registry: Registry) -> int:
    with registry.database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(idempotency_keys)).scalar_one())


def test_a_publish_sent_again_is_answered_as_it_was_and_done_once(registry: Registry) -> None:
    first = registry.publish(new(), "candidate", "try", ANNA, idempotency_key="k")
    registry.move_alias("support_intents", "candidate", publish(registry, 1).version.digest, reason="", principal=BORIS)
    again = registry.publish(new(), "candidate", "try", ANNA, idempotency_key="k")
    assert first.created
    assert again == first
    # The alias stays where somebody moved it since.
    assert registry.version("support_intents", "candidate").label == "v2"
    without = registry.publish(new(), None, "try", ANNA)
    assert (without.version, without.created) == (first.version, False)


def test_the_same_request_is_answered_after_the_task_was_edited(registry: Registry) -> None:
    first = registry.publish(new(), None, "", ANNA, idempotency_key="k")
    registry.apply_task(task(description="edited"), ANNA)
    assert registry.publish(new(), None, "", ANNA, idempotency_key="k") == first
    assert registry.publish(new(), None, "", ANNA).created


@pytest.mark.parametrize(
    "change",
    [
        lambda registry: registry.publish(new(1), "candidate", "try", ANNA, idempotency_key="k"),
        lambda registry: registry.publish(new(notes="other"), "candidate", "try", ANNA, idempotency_key="k"),
        lambda registry: registry.publish(new(), None, "try", ANNA, idempotency_key="k"),
        lambda registry: registry.publish(new(), "candidate", "other", ANNA, idempotency_key="k"),
        lambda registry: registry.move_alias(
            "support_intents", "candidate", "v1", reason="try", principal=ANNA, idempotency_key="k"
        ),
    ],
)
def test_a_key_for_another_request_is_refused(registry: Registry, change: Callable[[Registry], object]) -> None:
    registry.publish(new(), "candidate", "try", ANNA, idempotency_key="k")
    with pytest.raises(KeyReused, match="was used at 2030-01-01 00:00:00 UTC with another request; use a new key"):
        change(registry)
    assert len(registry.versions("support_intents")) == 1


def test_a_key_belongs_to_the_principal_that_used_it(registry: Registry) -> None:
    registry.publish(new(), None, "", ANNA, idempotency_key="k")
    assert registry.publish(new(1), None, "", BORIS, idempotency_key="k").created


def test_a_key_is_free_again_after_a_day_and_forgotten(registry: Registry, clock: Clock) -> None:
    registry.publish(new(), None, "", ANNA, idempotency_key="k")
    clock.at += timedelta(hours=23, minutes=59)
    with pytest.raises(KeyReused):
        registry.publish(new(1), None, "", ANNA, idempotency_key="k")
    clock.at += timedelta(minutes=1)
    assert registry.publish(new(1), None, "", ANNA, idempotency_key="other").created
    assert keys(registry) == 1
    assert registry.publish(new(2), None, "", ANNA, idempotency_key="k").created


def test_every_move_of_an_alias_is_done_once_for_a_key(registry: Registry) -> None:
    one, two = (publish(registry, seed).version.digest for seed in range(2))
    name = ("support_intents", "production")
    registry.move_alias(*name, "v1", reason="", principal=ANNA)

    def twice(act: Callable[[], object]) -> None:
        assert act() == act()

    asked: dict[str, Any] = {"reason": "", "principal": ANNA}
    twice(lambda: registry.move_alias(*name, "v2", expected=one, **asked, idempotency_key="move"))
    twice(lambda: registry.rollback_alias(*name, expected=two, **asked, idempotency_key="back"))
    assert registry.version(*name).label == "v1"
    twice(lambda: registry.remove_alias(*name, expected=one, **asked, idempotency_key="gone"))
    assert registry.aliases("support_intents") == []
    assert len(registry.alias_history(*name)) == 4


def test_what_failed_leaves_its_key_free(registry: Registry) -> None:
    publish(registry, alias="production")
    move: dict[str, Any] = {"reason": "", "principal": ANNA, "idempotency_key": "k"}
    with pytest.raises(Conflict):
        registry.move_alias("support_intents", "production", "v1", expected=None, **move)
    assert registry.move_alias("support_intents", "production", "v1", expected="v1", **move).number == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a\0b", "a\nb", "\ud800"])
def test_what_is_no_key_is_refused(registry: Registry, key: str) -> None:
    with pytest.raises(InvalidName, match="an idempotency key has 1 to 255"):
        registry.publish(new(), None, "", ANNA, idempotency_key=key)


def test_a_key_of_the_longest_kind_is_kept(registry: Registry) -> None:
    first = registry.publish(new(), None, "", ANNA, idempotency_key="é" * 255)
    assert registry.publish(new(), None, "", ANNA, idempotency_key="é" * 255) == first


def test_a_request_that_json_cannot_say_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidArtifact, match="write NaN as null"):
        registry.publish(new(report={"loss": float("nan")}), None, "", ANNA, idempotency_key="k")


def test_what_was_published_and_deleted_since_is_not_published_again(registry: Registry) -> None:
    registry.publish(new(), None, "", ANNA, idempotency_key="k")
    registry.delete_version("support_intents", "v1", reason="", principal=ANNA)
    with pytest.raises(UnknownVersion):
        registry.publish(new(), None, "", ANNA, idempotency_key="k")


def test_of_requests_with_one_key_at_once_one_does_it_and_all_get_its_answer(registry: Registry) -> None:
    at_once = threading.Barrier(8)
    answers: list[Any] = []

    def ask() -> None:
        at_once.wait()
        answers.append(registry.publish(new(), "candidate", "try", ANNA, idempotency_key="k"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert all(answer == answers[0] and answer.created for answer in answers)
    assert len(registry.alias_history("support_intents", "candidate")) == 1


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_text_that_a_database_cannot_hold_is_refused_everywhere(registry: Registry, text: str) -> None:
    publish(registry)
    for act in (
        lambda: registry.publish(new(1, notes=text), None, "", ANNA),
        lambda: registry.publish(new(1, tags=("fine", text)), None, "", ANNA),
        lambda: registry.publish(new(1, author=text), None, "", ANNA),
        lambda: registry.publish(new(1), None, text, ANNA),
        lambda: registry.move_alias("support_intents", "production", "v1", reason=text, principal=ANNA),
    ):
        with pytest.raises(InvalidArtifact, match="holds NUL or half a character"):
            act()
    for ask in (lambda: registry.task(text), lambda: registry.aliases(text), lambda: registry.version(text, "v1")):
        with pytest.raises(InvalidName):
            ask()
