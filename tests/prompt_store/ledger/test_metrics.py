from typing import Any

import pytest

from prompt_store.errors import InvalidOutcome, InvalidTask
from prompt_store.ledger.metrics import MAX_TEXT_BYTES, MetricRule, checked_value, find_metric
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.task import Metric, Task
from tests.prompt_store.building import ANNA, task

JUDGED = task(
    metrics=[
        {"name": "accuracy", "direction": "maximise"},
        {"name": "helpful", "direction": "maximise", "type": "boolean"},
        {"name": "comment", "direction": "maximise", "type": "text"},
    ]
)
EXTRACT = task(
    "order",
    kind="extract",
    labels=[],
    json_schema={"type": "object", "properties": {"amount": {"type": "number"}}, "required": ["amount"]},
)


def test_the_type_of_a_metric_changes_no_digest_while_it_is_a_number() -> None:
    # The digest of the task before metrics had types: do not edit it, keep the digest.
    assert task().digest == "98d67d9e188a081178d8956d8bb52d252c178d38578e8c1a40437ae8dbff3345"
    spelled = task(metrics=[{"name": "accuracy", "direction": "maximise", "type": "number"}])
    assert spelled.digest == task().digest
    assert spelled.document()["metrics"] == [{"name": "accuracy", "direction": "maximise"}]


def test_another_type_of_a_metric_is_kept_and_changes_the_digest(registry: Registry) -> None:
    revision = registry.apply_task(JUDGED, ANNA)
    assert JUDGED.digest != task(metrics=[{"name": each, "direction": "maximise"} for each in "abc"]).digest
    assert registry.task(JUDGED.name).task.metrics == JUDGED.metrics
    assert Task.model_validate(JUDGED.document()).digest == revision.digest == JUDGED.digest


@pytest.mark.parametrize("name", ["latency_ms", "error", "demonstration"])
def test_a_task_is_not_applied_with_a_metric_that_every_task_has(name: str) -> None:
    with pytest.raises(InvalidTask, match=f"every task has the metric '{name}' already; leave it out"):
        task(metrics=[{"name": name, "direction": "maximise"}])


def test_a_stored_task_with_such_a_metric_is_still_read(registry: Registry) -> None:
    older = task().model_copy(update={"metrics": (Metric(name="cost", direction="maximise"),)})
    registry.apply_task(older, ANNA)
    stored = registry.task(older.name).task
    assert stored.metrics == older.metrics
    assert find_metric(stored, "cost") == MetricRule("cost", "minimise", "number", automatic=True)


def test_a_metric_is_the_tasks_own_an_automatic_one_or_the_demonstration() -> None:
    assert find_metric(JUDGED, "helpful") == MetricRule("helpful", "maximise", "boolean")
    assert find_metric(JUDGED, "valid_json") == MetricRule("valid_json", "maximise", "boolean", automatic=True)
    assert find_metric(JUDGED, "demonstration") == MetricRule("demonstration", "maximise", "text")


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("helpful", True, True),
        ("accuracy", 1, 1.0),
        ("accuracy", -0.5, -0.5),
        ("comment", "", ""),
        ("comment", "ä" * (MAX_TEXT_BYTES // 2), "ä" * (MAX_TEXT_BYTES // 2)),
        ("demonstration", "refund", "refund"),
    ],
)
def test_a_value_of_the_metrics_type_is_taken(name: str, value: Any, kept: Any) -> None:
    checked = checked_value(JUDGED, name, value)
    assert checked == kept
    assert type(checked) is type(kept)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("helpfull", True, "task 'support_intents' has no metric 'helpfull'; did you mean 'helpful'?"),
        ("zzz", True, "has no metric 'zzz'; name one of accuracy, helpful, comment, latency_ms"),
        ("latency_ms", 3.0, "'latency_ms' is measured by the service itself; report another metric"),
        ("helpful", 1, "metric 'helpful' is true or false and was given a number; give true or false"),
        ("helpful", "true", "metric 'helpful' is true or false and was given text; give true or false"),
        ("accuracy", True, "metric 'accuracy' is a number and was given true; give a number"),
        ("accuracy", None, "metric 'accuracy' is a number and was given a value of type NoneType; give a number"),
        ("accuracy", float("nan"), "the value of 'accuracy' is not finite; give a number that a double can hold"),
        ("accuracy", float("-inf"), "the value of 'accuracy' is not finite"),
        ("accuracy", 10**400, "the value of 'accuracy' is not finite"),
        ("comment", 3, "metric 'comment' is text and was given a number; give text"),
        ("comment", "a\0b", "the value of 'comment' 'a\\x00b' holds NUL or half a character; remove it"),
        ("comment", "\ud800", "holds NUL or half a character"),
        ("comment", "ä" * 16385, "the value of 'comment' has 32770 bytes; give 32768 at most"),
        ("demonstration", "refunds", "is no label of task 'support_intents'; did you mean 'refund'?"),
        ("demonstration", "zzz", "is no label of task 'support_intents'; give one of refund, delivery"),
    ],
)
def test_a_value_that_its_metric_does_not_take_is_refused_with_the_reason(name: str, value: Any, reason: str) -> None:
    with pytest.raises(InvalidOutcome) as caught:
        checked_value(JUDGED, name, value)
    assert reason in str(caught.value)


def test_a_demonstration_of_an_extract_task_is_json_that_fits_its_schema() -> None:
    assert checked_value(EXTRACT, "demonstration", '{"amount": 3}') == '{"amount": 3}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "the demonstration is not JSON"),
        ('{"amount": NaN}', "the demonstration is not JSON: NaN is no JSON"),
        ('{"amount": "3"}', "does not fit the schema of task 'order': '3' is not of type 'number'; correct it"),
        ("[" * 10_000, "nested too deeply"),
    ],
)
def test_a_demonstration_that_an_extract_task_could_not_answer_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidOutcome) as caught:
        checked_value(EXTRACT, "demonstration", text)
    assert reason in str(caught.value)


def test_a_demonstration_of_a_generate_task_is_any_text() -> None:
    assert checked_value(task(kind="generate", labels=[]), "demonstration", "Dear Anna") == "Dear Anna"
