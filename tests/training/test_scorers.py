from __future__ import annotations

import pytest

from prompt_store.prompts.task import Metric, Task
from training.dataset import Example
from training.publish import judge
from training.recipe import GateRecipe
from training.scorers import exact_match, field_coverage, json_validity, metric_names, reported_names


def example(answer: str, **inputs: str) -> Example:
    return Example(inputs, answer, "rows:1")


@pytest.mark.parametrize(
    ("expected", "given", "worth"),
    [
        ("blue", "blue", 1.0),
        ("blue", " blue\n", 1.0),
        ("blue", "Blue", 0.0),
        ('{"a":1,"b":2}', '{"b": 2, "a": 1}', 1.0),
        ('{"a":1}', '{"a":2}', 0.0),
        ('{"a":1}', "", 0.0),
        ("1", "1.0", 0.0),
    ],
)
def test_exact_match_compares_text_or_json_values(expected: str, given: str, worth: float) -> None:
    assert exact_match(example(expected), given) == worth


def test_field_coverage_counts_the_fields_that_the_expected_answer_quotes() -> None:
    row = example("A red kettle for you", colour="red", product="kettle", audience="teachers")
    assert field_coverage(row, "The RED one") == 0.5
    assert field_coverage(row, "red kettle") == 1.0
    assert field_coverage(example("hm", colour="red"), "x") == 1.0


def test_json_validity() -> None:
    assert [json_validity(example(""), text) for text in ("{}", "null", "{", "", "[" * 100_000)] == [
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
    ]


def gate(minimum_gain: float) -> GateRecipe:
    return GateRecipe(metric="m", minimum_gain=minimum_gain)


@pytest.mark.parametrize(("direction", "gain"), [("maximise", 0.25), ("minimise", -0.25)])
def test_the_gate_knows_which_way_is_better(direction: str, gain: float) -> None:
    metric = Metric(name="m", direction=direction)
    task = Task(
        name="t", kind="generate", inputs=("x",), messages=[{"role": "user", "content": "{x}"}], metrics=(metric,)
    )  # fmt: skip
    verdict = judge(gate(0.25), task, {"m": 0.75}, {"m": 0.5}, "text prompt")
    assert (verdict.gain, verdict.passed) == (gain, gain >= 0.25)
    assert judge(gate(0.1), task, {"m": 0.9}, {"m": 0.8}, "x").passed is (direction == "maximise")


@pytest.mark.parametrize(
    ("kind", "metrics", "computed", "reported"),
    [
        ("classify", ["helpful", "accuracy", "stars"], ["accuracy"], ["helpful", "stars"]),
        ("classify", ["helpful"], ["accuracy"], ["helpful"]),
        ("generate", ["helpful"], ["exact_match"], ["helpful"]),
        ("generate", ["field_coverage", "exact_match"], ["field_coverage", "exact_match"], []),
        ("generate", [], ["exact_match"], []),
    ],
)
def test_a_task_is_evaluated_by_what_a_scorer_computes_and_otherwise_by_the_metric_of_its_kind(
    kind: str, metrics: list[str], computed: list[str], reported: list[str]
) -> None:
    task = Task(
        name="t", kind=kind, inputs=("x",), messages=[{"role": "user", "content": "{x}"}],
        labels=("red", "blue") if kind == "classify" else (),
        metrics=[Metric(name=name, direction="maximise") for name in metrics],
    )  # fmt: skip
    assert (metric_names(task), reported_names(task)) == (computed, reported)
