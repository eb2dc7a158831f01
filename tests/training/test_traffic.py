"""Which captured answers become rows, and on which side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_store.ledger.captured import CapturedRow
from prompt_store.ledger.entries import DEMONSTRATION
from prompt_store.prompts.task import Task
from tests.prompt_store.building import task
from tests.training.traffic import Asked
from training.conditions import check, holds, parse_condition
from training.dataset import Findings, read_examples
from training.errors import DatasetError
from training.traffic import Chosen, TrafficRow, choose, facts_of, held_out, jsonl, known_names, refuse_empty

COLOURS = task(
    "colours", labels=["red", "blue"], metrics=[{"name": "helpful", "direction": "maximise", "type": "boolean"}]
)


def row(asked: Asked) -> CapturedRow:
    facts = {"latency_ms": asked.latency_ms, "error": 0.0, "first_token_ms": None}
    outcomes = {name: float(value) if isinstance(value, bool) else value for name, value in asked.outcomes.items()}
    return CapturedRow(asked.captured(), outcomes, facts, asked.experiment, asked.arm)


def chosen(
    *asked: Asked,
    wanted: Callable[[CapturedRow], bool] = lambda _: True,
    test_fraction: float = 0.0,
    limit: int | None = None,
    of: Task = COLOURS,
) -> Chosen:
    return choose(map(row, asked), of, wanted, test_fraction=test_fraction, limit=limit)


def content(rows: Sequence[TrafficRow]) -> list[tuple[str, str]]:
    return [(one.example.inputs["message"], one.example.answer) for one in rows]


def test_a_demonstration_is_the_answer_and_stands_before_answers_that_were_wanted() -> None:
    found = chosen(
        Asked("r1", "the sea", "blue", outcomes={"helpful": True}, at_ms=9_000),
        Asked("r2", "a fire", "blue", outcomes={DEMONSTRATION: "red", "helpful": False}),
        Asked("r3", "a rose", "blue", outcomes={"helpful": False}),
        wanted=lambda one: holds(parse_condition("outcome.helpful = true"), facts_of(one)),
    )
    assert content(found.train) == [("a fire", "red"), ("the sea", "blue")]
    assert [one.demonstrated for one in found.train] == [True, False]
    assert found.left_out() == {"are not asked for": ["r3"]}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (Asked("r1", None, "red"), "it was a conversation or raw text, without the task's inputs"),
        (Asked("r1", "x", "red", inputs={"text": "x"}), "missing input 'message'"),
        (Asked("r1", "x", "green"), "answer 'green' is not among the task's labels"),
        (Asked("r1", "x", " "), "answer is not a text, or empty"),
        (Asked("r1", "x", "red", outcomes={DEMONSTRATION: "green"}), "answer 'green' is not among the task's labels"),
    ],
)
def test_what_the_task_cannot_take_is_named_with_the_reason(asked: Asked, reason: str) -> None:
    found = chosen(asked, Asked("r2", "fine", "red"))
    ((said, requests),) = found.left_out().items()
    assert said.startswith("cannot be used: ")
    assert reason in said
    assert requests == ["r1"]
    assert content(found.train) == [("fine", "red")]


def test_an_answer_that_does_not_fit_the_schema_is_named() -> None:
    extract = task(
        "colours", kind="extract", labels=[], json_schema={"type": "object", "required": ["colour"]}, metrics=[]
    )
    found = chosen(Asked("r1", "x", "{}"), Asked("r2", "y", "{"), Asked("r3", "z", '{"colour": 1}'), of=extract)
    assert content(found.train) == [("z", '{"colour": 1}')]
    said = " ".join(found.left_out())
    assert "does not fit the task's schema: 'colour' is a required property" in said
    assert "answer is not JSON" in said


def test_of_equal_inputs_the_demonstration_is_used_and_else_the_newest() -> None:
    found = chosen(
        Asked("r1", "a fire", "blue", at_ms=3_000),
        Asked("r2", "a fire", "blue", outcomes={DEMONSTRATION: "red"}, at_ms=1_000),
        Asked("r3", "a fire", "red", at_ms=2_000),
        Asked("r4", "a fire", "red", outcomes={DEMONSTRATION: "blue"}, at_ms=500),
        Asked("r5", "the sea", "blue", at_ms=1_000),
        Asked("r6", "the sea", "red", at_ms=2_000),
        Asked("r7", "the sea", "blue", at_ms=3_000),
    )
    assert content(found.train) == [("a fire", "red"), ("the sea", "blue")]
    assert (found.repeated, found.corrected, found.conflicting) == (["r3", "r5"], ["r1"], ["r4", "r6"])


def test_the_limit_takes_demonstrations_first_and_then_the_newest() -> None:
    found = chosen(
        Asked("r1", "one", "red", at_ms=1_000),
        Asked("r2", "two", "red", at_ms=3_000),
        Asked("r3", "three", "red", outcomes={DEMONSTRATION: "blue"}, at_ms=500),
        limit=2,
    )
    assert [message for message, _ in content(found.train)] == ["three", "two"]
    assert found.over_limit == ["r1"]


def side_of(unit_side: bool, *, fraction: float = 0.3) -> str:
    """The name of a unit on that side."""
    return next(unit for unit in map(str, range(1000)) if held_out(unit, fraction) == unit_side)


def test_inputs_of_both_sides_are_trained_on_by_the_answer_of_the_unit_that_is() -> None:
    trained, tested = side_of(False), side_of(True)
    found = chosen(
        Asked("r1", "shared", "red", trained),
        Asked("r2", "shared", "blue", tested, outcomes={DEMONSTRATION: "blue"}, at_ms=9_000),
        Asked("r3", "its own", "blue", tested),
        test_fraction=0.3,
    )
    assert content(found.train) == [("shared", "red")]
    assert content(found.test) == [("its own", "blue")]
    assert found.shared == ["r2"]


TRAFFIC = st.lists(
    st.builds(
        Asked,
        request=st.uuids().map(str),
        message=st.sampled_from("abcdefgh"),
        answer=st.sampled_from(["red", "blue", "green"]),
        unit=st.sampled_from([*map(str, range(12)), ""]),
        outcomes=st.sampled_from([{}, {DEMONSTRATION: "red"}, {DEMONSTRATION: "blue"}]),
        at_ms=st.integers(0, 5),
    ),
    max_size=40,
    unique_by=lambda asked: asked.request,
)
FRACTIONS = st.sampled_from([0.1, 0.3, 0.5])


def sides(found: Chosen) -> dict[str, set[str]]:
    """Where each unit has rows."""
    where: dict[str, set[str]] = defaultdict(set)
    for name, rows in (("train", found.train), ("test", found.test)):
        for one in rows:
            where[one.unit].add(name)
    return where


@given(TRAFFIC, TRAFFIC, FRACTIONS)
def test_no_unit_and_no_inputs_are_on_both_sides_and_later_exports_keep_them(
    traffic: list[Asked], later: list[Asked], fraction: float
) -> None:
    before = chosen(*traffic, test_fraction=fraction)
    after = chosen(*traffic, *later, test_fraction=fraction)
    for found in (before, after):
        assert all(len(where) == 1 for where in sides(found).values())
        trained, tested = ({one.example.inputs_digest for one in rows} for rows in (found.train, found.test))
        assert not trained & tested
        assert len(trained) + len(tested) == len(found.train) + len(found.test)
    moved = {unit: where for unit, where in sides(after).items() if sides(before).get(unit, where) != where}
    assert not moved
    seen = {one.example.inputs_digest for one in before.train}
    assert not seen & {one.example.inputs_digest for one in after.test}


@given(TRAFFIC, FRACTIONS, st.integers(1, 10) | st.none())
def test_every_captured_generation_is_a_row_or_named_once(
    traffic: list[Asked], fraction: float, limit: int | None
) -> None:
    found = chosen(*traffic, wanted=lambda one: one.entry.at_ms > 2, test_fraction=fraction, limit=limit)
    rows = [one.example.place for one in (*found.train, *found.test)]
    named = [request for requests in found.left_out().values() for request in requests]
    assert sorted([*rows, *named]) == sorted(asked.request for asked in traffic)
    assert found.captured == len(traffic)


@given(TRAFFIC)
def test_what_is_written_is_read_by_training_as_it_was_chosen(
    tmp_path_factory: pytest.TempPathFactory, traffic: list[Asked]
) -> None:
    found = chosen(*traffic)
    if not found.train:
        return
    file = Path(tmp_path_factory.getbasetemp()) / "rows.jsonl"
    file.write_bytes(jsonl(found.train))
    findings = Findings()
    read = read_examples(file, COLOURS, findings)
    assert [(one.inputs, one.answer) for one in read] == [
        (one.example.inputs, one.example.answer) for one in found.train
    ]
    assert not findings.lines()


def test_a_larger_fraction_only_holds_out_more_units() -> None:
    units = [str(number) for number in range(2000)]
    held = [{unit for unit in units if held_out(unit, fraction)} for fraction in (0.0, 0.1, 0.3)]
    assert held[0] == set()
    assert held[1] < held[2]
    assert 140 < len(held[1]) < 260  # 200, and four standard deviations beside


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("outcome.helpful = true and latency_ms < 500", True),
        ("outcome.demonstration != 'red'", False),
        ("first_token_ms < 10000 or error = true", False),
        ("experiment = 'tone' and arm = 'short'", True),
    ],
)
def test_a_condition_speaks_of_outcomes_automatic_metrics_and_the_experiment(condition: str, *, expected: bool) -> None:
    asked = Asked("r1", "x", "red", outcomes={"helpful": True}, experiment="tone", arm="short")
    read: Any = parse_condition(condition)
    check(read, known_names(COLOURS))
    assert holds(read, facts_of(row(asked))) is expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "nothing of task 'colours' is captured; have the service capture it"),
        ([Asked("r1", "x", "green")], "none of 1 captured generations of 'colours' is a row: 1 cannot be used: answer"),
        ([Asked("r1", "x", "red", side_of(True))], r"train\.jsonl would be empty"),
        ([Asked("r1", "x", "red", side_of(False))], r"test\.jsonl would be empty; choose another --test-fraction"),
    ],
)
def test_an_export_without_rows_is_refused_saying_why(asked: list[Asked], said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        refuse_empty(chosen(*asked, test_fraction=0.3), "colours", 0.3)
