from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from prompt_store.prompts.task import Task, load_task
from service.engines.base import Messages
from service.engines.base_model import BaseModel
from tests.training.recipes import THINGS, rows, write_recipe, write_rows
from training.dataset import Dataset, Findings, batches, load_dataset, read_examples, tokenise
from training.errors import DatasetError
from training.recipe import Recipe, load_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(write_recipe(tmp_path))


@pytest.fixture
def task(recipe: Recipe) -> Task:
    return load_task(recipe.path(recipe.task))


def load(recipe: Recipe, task: Task, base: BaseModel) -> Dataset:
    return load_dataset(recipe, task, base)


GOOD: dict[str, Any] = {"inputs": {"message": "x"}, "answer": "red"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        pytest.param("[" * 100_000, "not JSON", id="nested too deeply"),
        ("[]", 'not of the form {"inputs"'),
        ('{"inputs": {"message": "x"}}', 'not of the form {"inputs"'),
        ('{"inputs": {"message": "x"}, "answer": ""}', "answer is not a text, or empty"),
        ('{"inputs": {"message": 3}, "answer": "red"}', "inputs is not an object of texts"),
        ('{"inputs": {"mesage": "x"}, "answer": "red"}', "missing input 'message'"),
        ('{"inputs": {"message": "x"}, "answer": "green"}', "answer 'green' is not among the task's labels"),
    ],
)
def test_a_bad_line_is_named_by_file_line_and_reason(tmp_path: Path, task: Task, line: str, said: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"inputs": {"message": "good"}, "answer": "red"}\n\n' + line + "\n")
    with pytest.raises(DatasetError, match=r"1 rows cannot be used") as refused:
        read_examples(file, task, Findings())
    assert f"{file}:3: " in str(refused.value)
    assert said in str(refused.value)


def test_a_line_ends_at_its_newline_only(tmp_path: Path, task: Task) -> None:
    file = tmp_path / "rows.jsonl"
    text = "one\u2028two\x85three"
    file.write_text(json.dumps({**GOOD, "inputs": {"message": text}}, ensure_ascii=False) + "\n{\n")
    with pytest.raises(DatasetError, match=r"1 rows cannot be used.*\n.*:2: not JSON"):
        read_examples(file, task, Findings())


def test_every_bad_line_is_counted(tmp_path: Path, task: Task) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{\n" * 30)
    with pytest.raises(DatasetError, match=r"(?s)30 rows cannot be used.*rows.jsonl:20: .*… and 10 more"):
        read_examples(file, task, Findings())


def test_two_answers_to_the_same_inputs_are_refused_and_repeats_are_named(tmp_path: Path, task: Task) -> None:
    file = tmp_path / "rows.jsonl"
    findings = Findings()
    write_rows(file, [GOOD, GOOD])
    assert len(read_examples(file, task, findings)) == 1
    assert findings.lines() == [f"1 rows stand there twice and are used once: {file}:2 repeats {file}:1"]
    write_rows(file, [GOOD, {**GOOD, "answer": "blue"}])
    with pytest.raises(DatasetError, match=r":2: answers 'blue' but .*:1 answers 'red' to the same inputs"):
        read_examples(file, task, findings)


def test_an_answer_that_does_not_fit_the_schema_is_refused(tmp_path: Path, task: Task) -> None:
    schema = {"type": "object", "required": ["table"]}
    extract = Task.model_validate({**task.document(), "kind": "extract", "labels": [], "json_schema": schema})
    file = tmp_path / "rows.jsonl"
    for answer, said in (("{}", "does not fit the task's schema"), ("{", "answer is not JSON")):
        write_rows(file, [{"inputs": {"message": "x"}, "answer": answer}])
        with pytest.raises(DatasetError, match=said):
            read_examples(file, extract, Findings())


def test_a_row_keeps_its_split_whatever_is_added(recipe: Recipe, task: Task, base: BaseModel) -> None:
    before = load(recipe, task, base)
    file = recipe.path(recipe.data.train)
    write_rows(file, [*rows(("star", "tree", "fish")), *rows(THINGS[:11])])
    after = load(recipe, task, base)

    def messages(part: Any) -> set[str]:
        return {row.inputs["message"] for row in part}

    assert messages(before.validation) <= messages(after.validation)
    assert messages(before.train) <= messages(after.train)
    assert len(after.train) + len(after.validation) == 28


def test_without_a_test_file_a_part_of_train_is_held_out(recipe: Recipe, task: Task, base: BaseModel) -> None:
    data = recipe.data.model_copy(update={"test": None, "test_fraction": 0.3})
    dataset = load(recipe.model_copy(update={"data": data}), task, base)
    parts = [{row.inputs_digest for row in part} for part in (dataset.train, dataset.validation, dataset.test)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 22


def test_a_row_in_both_train_and_test_is_refused_with_both_places(recipe: Recipe, task: Task, base: BaseModel) -> None:
    write_rows(recipe.path(recipe.data.test or Path()), rows(THINGS[10:12]))
    with pytest.raises(DatasetError, match=r"2 rows stand in both train and test.*train\.jsonl:21 and .*test\.jsonl:1"):
        load(recipe, task, base)


def test_a_row_that_does_not_fit_the_context_is_named_with_its_length(
    recipe: Recipe, task: Task, base: BaseModel
) -> None:
    write_rows(
        recipe.path(recipe.data.train), [*rows(THINGS[:11]), {"inputs": {"message": "a " * 1100}, "answer": "red"}]
    )
    dataset = load(recipe, task, base)
    assert len(dataset.train) + len(dataset.validation) == 22
    (line,) = dataset.findings.lines()
    assert "1 rows do not fit the context and are left out" in line
    assert "train.jsonl:23 has 11" in line
    assert "of 1024" in line


def test_one_class_only_is_refused(recipe: Recipe, task: Task, base: BaseModel) -> None:
    write_rows(recipe.path(recipe.data.train), [row for row in rows(THINGS[:11]) if row["answer"] == "red"])
    with pytest.raises(DatasetError, match="rows of one label only"):
        load(recipe, task, base)


def test_an_empty_file_is_refused(recipe: Recipe, task: Task, base: BaseModel) -> None:
    recipe.path(recipe.data.train).write_text("\n")
    with pytest.raises(DatasetError, match="has no rows"):
        load(recipe, task, base)


def test_an_example_is_laid_out_as_serving_does_it(recipe: Recipe, task: Task, base: BaseModel) -> None:
    example = load(recipe, task, base).train[0]
    tokens = tokenise(example, task, base)
    assert tokens.prompt == base.lay_out(Messages(task.render(example.inputs)))
    assert tokens.answer == [*base.tokenizer.encode(example.answer).ids, base.eos_token_id]


def test_batches_are_a_function_of_seed_and_step() -> None:
    whole = list(islice(batches(10, 3, seed=1, start=0), 9))
    assert list(islice(batches(10, 3, seed=1, start=4), 5)) == whole[4:]
    assert list(islice(batches(10, 3, seed=2, start=0), 9)) != whole
    assert sorted(row for batch in whole[:4] for row in batch) == list(range(10))
    assert [sorted(batch) for batch in islice(batches(2, 8, seed=1, start=0), 2)] == [[0, 1], [0, 1]]
