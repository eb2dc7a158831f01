from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from threading import Thread

import pytest

from prompt_store.errors import InvalidArtifact, UnknownTask
from prompt_store.prompts.registry import Registry
from prompt_store.routing.shadows import ShadowAnswer, ShadowSummary
from tests.prompt_store.building import ANNA, task

TASK = "support_intents"
MONDAY, TUESDAY = date(2030, 1, 7), date(2030, 1, 8)
START = datetime(2030, 1, 7, 12, tzinfo=UTC)


def answer(number: int, **changes: object) -> ShadowAnswer:
    """Answers agree where their number is even."""
    made = ShadowAnswer(
        id=f"s{number}",
        generation_id=f"gen_{number}",
        task=TASK,
        at=START + timedelta(seconds=number),
        primary_version="a" * 64,
        primary_label=f"{TASK}@v1",
        primary_backend="local",
        primary_text="refund",
        primary_ms=10.0,
        shadow_version="b" * 64,
        shadow_label=f"{TASK}@v2",
        shadow_backend="openai",
        shadow_text="delivery" if number % 2 else "refund",
        shadow_error=None,
        shadow_ms=30.0 + number,
        agreement=float(number % 2 == 0),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_what_replicas_spend_is_summed_by_day_task_and_backend(registry: Registry) -> None:
    before = registry.snapshot().sequence
    registry.add_spending([(MONDAY, TASK, "openai", 0.25), (MONDAY, TASK, "openai", 0.5), (TUESDAY, TASK, "openai", 4)])
    registry.add_spending([(MONDAY, TASK, "openai", 1.0), (MONDAY, TASK, "local", 0.0), (MONDAY, "other", "openai", 2)])
    registry.add_spending([])
    assert registry.spending(MONDAY) == {(TASK, "openai"): 1.75, (TASK, "local"): 0.0, ("other", "openai"): 2.0}
    assert registry.spending(TUESDAY) == {(TASK, "openai"): 4.0}
    assert registry.spending(date(2029, 1, 1)) == {}
    assert registry.changes_since(before) == []


def test_nothing_is_lost_when_replicas_spend_at_once(registry: Registry) -> None:
    def spend() -> None:
        for _ in range(20):
            registry.add_spending([(MONDAY, TASK, "openai", 0.5)])

    replicas = [Thread(target=spend) for _ in range(3)]
    for replica in replicas:
        replica.start()
    for replica in replicas:
        replica.join()
    assert registry.spending(MONDAY) == {(TASK, "openai"): 30.0}


@pytest.mark.parametrize("amount", [-0.1, float("nan"), float("inf")])
def test_an_amount_that_is_none_is_refused(registry: Registry, amount: float) -> None:
    with pytest.raises(InvalidArtifact, match="give an amount of 0 or more"):
        registry.add_spending([(MONDAY, TASK, "openai", 1.0), (MONDAY, TASK, "openai", amount)])
    assert registry.spending(MONDAY) == {}


def test_shadow_answers_are_kept_once_and_listed_newest_first(registry: Registry) -> None:
    registry.apply_task(task("other"), ANNA)
    other = answer(9, task="other")
    registry.add_shadow_answers(map(answer, range(4)))
    registry.add_shadow_answers([answer(3, primary_text="sent again"), answer(4), answer(4), other])
    registry.add_shadow_answers([])
    assert registry.shadow_answers(TASK) == [answer(number) for number in (4, 3, 2, 1, 0)]
    assert registry.shadow_answers(TASK, limit=2) == [answer(4), answer(3)]
    assert registry.shadow_answers("other") == [other]
    with pytest.raises(UnknownTask):
        registry.shadow_answers("nobody")


def test_a_summary_counts_failures_and_averages_agreement_where_it_can_be_said(registry: Registry) -> None:
    failed = {"shadow_text": None, "shadow_error": "timeout", "agreement": None}
    registry.add_shadow_answers(
        [*map(answer, range(4)), answer(4, **failed), answer(5, shadow_label=f"{TASK}@v3", **failed)]
    )
    assert registry.shadow_summary(TASK) == [
        ShadowSummary("b" * 64, f"{TASK}@v2", "openai", 5, 1, 0.5, 10.0, 32.0),
        ShadowSummary("b" * 64, f"{TASK}@v3", "openai", 1, 1, None, 10.0, 35.0),
    ]


def test_what_a_database_cannot_hold_of_a_text_is_replaced(registry: Registry) -> None:
    registry.add_shadow_answers([answer(0, primary_text="a\0b", shadow_text="\ud800")])
    (kept,) = registry.shadow_answers(TASK)
    assert (kept.primary_text, kept.shadow_text) == ("a\ufffdb", "\ufffd")


def test_old_shadow_answers_are_deleted(registry: Registry) -> None:
    registry.add_shadow_answers(map(answer, range(4)))
    assert registry.delete_shadow_answers(START + timedelta(seconds=2)) == 2
    assert registry.shadow_answers(TASK) == [answer(3), answer(2)]


def test_what_a_shadow_said_of_an_erased_unit_is_not_written_later(registry: Registry) -> None:
    """It waits in memory for seconds, and a replica that erases does not know what the others have."""
    registry.erase_unit("u1", ANNA)
    later = datetime.now(UTC) + timedelta(days=1)
    before = later - timedelta(days=2)
    registry.add_shadow_answers(
        [
            answer(1, unit_hash="u1", at=before),
            answer(2, unit_hash="u2", at=before),
            answer(3, unit_hash="u1", at=later),
            answer(4, at=before),
        ]
    )
    assert {kept.id for kept in registry.shadow_answers(TASK)} == {"s2", "s3", "s4"}
