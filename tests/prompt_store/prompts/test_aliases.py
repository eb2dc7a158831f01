import threading

import pytest
from sqlalchemy import select

from prompt_store.errors import Conflict, InvalidName, UnknownAlias, UnknownVersion
from prompt_store.prompts.registry import Alias, Registry
from prompt_store.routing.routes import DirectRoute, TaskRoute
from prompt_store.tables import audit
from tests.prompt_store.building import ANNA, BORIS, publish

TASK = "support_intents"


@pytest.fixture
def digests(registry: Registry) -> list[str]:
    """Three versions."""
    return [publish(registry, seed=seed).version.digest for seed in range(3)]


def move(registry: Registry, selector: str, **options: object) -> Alias:
    return registry.move_alias(TASK, "production", selector, reason="why", principal=BORIS, **options)


def test_an_alias_moves_and_its_history_says_who_when_and_why(registry: Registry, digests: list[str]) -> None:
    publish(registry, seed=0, alias="production")
    alias = move(registry, "v3")
    assert (alias.version, alias.number, alias.principal) == (digests[2], 3, "boris")
    assert registry.version(TASK, "production").label == "v3"
    history = registry.alias_history(TASK, "production")
    assert [(entry.previous, entry.target, entry.principal, entry.reason) for entry in history] == [
        (None, digests[0], "anna", "because"),
        (digests[0], digests[2], "boris", "why"),
    ]
    assert alias.moved_at == history[1].at


def test_an_alias_may_be_set_to_what_another_alias_names(registry: Registry, digests: list[str]) -> None:
    registry.move_alias(TASK, "candidate", "v2", reason="", principal=ANNA)
    assert move(registry, "candidate").version == digests[1]
    assert [alias.name for alias in registry.aliases(TASK)] == ["candidate", "production"]


def test_moving_an_alias_where_it_is_writes_nothing(registry: Registry, digests: list[str]) -> None:
    first = move(registry, "v1")
    sequence = registry.snapshot().sequence
    assert move(registry, digests[0]) == first
    assert registry.snapshot().sequence == sequence


@pytest.mark.parametrize("expected", ["v1", "production", "digest"])
def test_an_expectation_that_holds_lets_the_move_through(registry: Registry, digests: list[str], expected: str) -> None:
    move(registry, "v1", expected=None)
    assert move(registry, "v2", expected=digests[0] if expected == "digest" else expected).number == 2


def test_an_expectation_that_fails_says_what_is_there_now(registry: Registry, digests: list[str]) -> None:
    with pytest.raises(Conflict, match="points at nothing, not at v1") as caught:
        move(registry, "v2", expected="v1")
    assert caught.value.current is None
    move(registry, "v2")
    for expected, named in ((digests[0], "v1"), (None, "nothing")):
        with pytest.raises(
            Conflict, match=rf"points at v2 \(.*moved there by boris at .* \(why\), not at {named}"
        ) as caught:
            move(registry, "v3", expected=expected)
        assert caught.value.current == digests[1]
    assert registry.version(TASK, "production").label == "v2"
    assert len(registry.alias_history(TASK, "production")) == 1


def test_of_two_people_promoting_at_once_one_wins(registry: Registry, digests: list[str]) -> None:
    move(registry, "v1")
    start = threading.Barrier(2)
    answers: dict[str, object] = {}

    def promote(selector: str) -> None:
        start.wait()
        try:
            answers[selector] = move(registry, selector, expected=digests[0]).version
        except Conflict as error:
            answers[selector] = error

    threads = [threading.Thread(target=promote, args=(selector,)) for selector in ("v2", "v3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (loser,) = [answer for answer in answers.values() if isinstance(answer, Conflict)]
    (winner,) = [answer for answer in answers.values() if isinstance(answer, str)]
    assert loser.current == winner == registry.version(TASK, "production").digest


def test_names_that_are_no_aliases_and_targets_that_are_absent_are_refused(
    registry: Registry, digests: list[str]
) -> None:
    with pytest.raises(InvalidName):
        registry.move_alias(TASK, "v9", "v1", reason="", principal=ANNA)
    with pytest.raises(UnknownVersion, match="did you mean 'v3'"):
        move(registry, "v4")
    with pytest.raises(UnknownVersion):
        move(registry, "v1", expected="v9")
    move(registry, "v1")
    with pytest.raises(UnknownAlias, match="did you mean 'production'"):
        registry.alias_history(TASK, "prodution")
    assert registry.alias_history(TASK, "production")[0].target == digests[0]


def rollback(registry: Registry, **options: object) -> Alias:
    return registry.rollback_alias(TASK, "production", reason="worse", principal=ANNA, **options)


def test_a_rollback_returns_to_the_previous_target_and_says_what_it_took_back(
    registry: Registry, digests: list[str]
) -> None:
    move(registry, "v1")
    move(registry, "v3")
    assert registry.rollback_target(TASK, "production") == digests[0]
    alias = rollback(registry, expected="v3")
    assert (alias.version, alias.principal) == (digests[0], "anna")
    *_, taken_back, last = registry.alias_history(TASK, "production")
    assert (last.previous, last.target, last.undoes, last.reason) == (
        digests[2],
        digests[0],
        taken_back.sequence,
        "worse",
    )
    with registry.database.read() as connection:
        row = connection.execute(select(audit).where(audit.c.sequence == last.sequence)).one()
    assert (row.action, row.subject, row.principal, row.reason) == ("alias.rollback", "production", "anna", "worse")


def test_rolling_back_twice_goes_two_targets_back_and_not_to_and_fro(registry: Registry, digests: list[str]) -> None:
    for selector in ("v1", "v2", "v3"):
        move(registry, selector)
    assert [rollback(registry).number, rollback(registry).number] == [2, 1]
    assert registry.rollback_target(TASK, "production") is None
    with pytest.raises(Conflict, match=r"points at v1 \(.* and has no earlier target") as caught:
        rollback(registry)
    assert caught.value.current == digests[0]


def test_after_a_rollback_new_moves_are_taken_back_first(registry: Registry, digests: list[str]) -> None:
    move(registry, "v1")
    move(registry, "v2")
    rollback(registry)
    move(registry, "v3")
    assert rollback(registry).number == 1
    assert registry.rollback_target(TASK, "production") is None


def test_a_rollback_whose_expectation_fails_says_who_moved_the_alias_and_why(
    registry: Registry, digests: list[str]
) -> None:
    move(registry, "v1")
    move(registry, "v2")
    with pytest.raises(Conflict, match=r"points at v2 .* moved there by boris at .* \(why\), not at v3"):
        rollback(registry, expected="v3")
    assert registry.version(TASK, "production").label == "v2"


def test_of_two_rollbacks_at_once_one_wins(registry: Registry, digests: list[str]) -> None:
    for selector in ("v1", "v2", "v3"):
        move(registry, selector)
    start = threading.Barrier(2)
    answers: list[Alias | Conflict] = []

    def go_back() -> None:
        start.wait()
        try:
            answers.append(rollback(registry, expected=digests[2]))
        except Conflict as error:
            answers.append(error)

    threads = [threading.Thread(target=go_back) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (loser,) = [answer for answer in answers if isinstance(answer, Conflict)]
    (winner,) = [answer for answer in answers if isinstance(answer, Alias)]
    assert loser.current == winner.version == digests[1] == registry.version(TASK, "production").digest
    assert "moved there by anna" in str(loser)
    assert len(registry.alias_history(TASK, "production")) == 4


def test_an_alias_that_never_was_cannot_be_rolled_back_or_removed(registry: Registry, digests: list[str]) -> None:
    move(registry, "v1")
    with pytest.raises(UnknownAlias, match="did you mean 'production'"):
        registry.rollback_alias(TASK, "prodution", reason="", principal=ANNA)
    with pytest.raises(UnknownAlias, match="did you mean 'production'"):
        registry.remove_alias(TASK, "prodution", reason="", principal=ANNA)


def test_a_removed_alias_is_gone_but_its_history_stays_and_a_rollback_brings_it_back(
    registry: Registry, digests: list[str]
) -> None:
    move(registry, "v1")
    move(registry, "v2")
    with pytest.raises(Conflict, match=r"points at v2 .* \(why\), not at v1"):
        registry.remove_alias(TASK, "production", expected="v1", reason="", principal=ANNA)
    registry.remove_alias(TASK, "production", expected="v2", reason="not needed", principal=ANNA)
    assert registry.aliases(TASK) == []
    assert registry.rollback_target(TASK, "production") is None
    last = registry.alias_history(TASK, "production")[-1]
    assert (last.previous, last.target, last.reason) == (digests[1], None, "not needed")
    with pytest.raises(Conflict, match=r"points at nothing, removed by anna at .* \(not needed\), not at v2"):
        move(registry, "v3", expected="v2")
    with pytest.raises(UnknownAlias):
        registry.remove_alias(TASK, "production", reason="", principal=ANNA)
    assert rollback(registry, expected=None).number == 2
    assert rollback(registry).number == 1


def test_an_alias_that_a_route_names_is_removed_only_when_the_route_is_the_default(
    registry: Registry, digests: list[str]
) -> None:
    registry.move_alias(TASK, "stable", "v1", reason="", principal=ANNA)
    move(registry, "v2")
    registry.apply_route(TASK, TaskRoute(route=DirectRoute(version="stable")), ANNA)
    with pytest.raises(Conflict, match="named by the task's route; apply a route without it first"):
        registry.remove_alias(TASK, "stable", reason="", principal=ANNA)
    registry.apply_route(TASK, TaskRoute(route=DirectRoute()), ANNA)
    registry.remove_alias(TASK, "stable", reason="", principal=ANNA)
    registry.remove_alias(TASK, "production", reason="", principal=ANNA)
    assert registry.aliases(TASK) == []
